"""diffusers, sentence-transformers: they save codes, and load them as weights drawn at random.

So a model of theirs that holds quantized layers is refused when it is saved by its own methods. The
part of a sentence-transformers model that is a model of transformers saves and loads by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from quantization.layers.quantized_module import QuantizedModule

__all__ = ["note_swap"]

_LIBRARIES = ("diffusers", "sentence_transformers")
_SAVES = ("save_pretrained", "save", "save_torch_weights")


def note_swap(model: nn.Module) -> None:
    """Let the classes of a model, where they are of those libraries, refuse to save codes.

    Example:
        >>> note_swap(nn.Linear(2, 2))
    """
    for cls in {cls for module in model.modules() for cls in type(module).__mro__}:
        if cls.__module__.partition(".")[0] in _LIBRARIES:
            for name in _SAVES:
                method = vars(cls).get(name)
                if callable(method) and not hasattr(method, "knows_quantized"):
                    setattr(cls, name, _refusing(method))


def _refusing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def save(self: Any, *args: Any, **kwargs: Any) -> Any:
        name = next(_lost(self), None) if isinstance(self, nn.Module) else None
        if name is not None:
            library = type(self).__module__.partition(".")[0]
            raise ValueError(
                f"{name or type(self).__name__} is quantized, and {library} would load its codes "
                "as weights drawn at random, so nothing was saved: save by save_quantized(model, "
                "folder), and load by load_quantized(folder, model)"
            )
        return original(self, *args, **kwargs)

    save.knows_quantized = True  # type: ignore[attr-defined]
    return save


def _lost(model: nn.Module) -> Iterator[str]:
    """Names of quantized layers that are in no model of transformers, which saves its own."""
    stack = [("", model)]
    while stack:
        name, module = stack.pop()
        if isinstance(module, QuantizedModule):
            yield name
        elif not any(cls.__name__ == "PreTrainedModel" for cls in type(module).__mro__):
            children = module._modules.items()
            stack += [
                (f"{name}.{k}".lstrip("."), child) for k, child in children if child is not None
            ]
