"""diffusers, sentence-transformers: they save codes, which they cannot load again.

diffusers loads such a folder as weights drawn at random, so its own saving refuses quantized
layers. sentence-transformers saves the model of transformers within by that one's means, codes and
all; its other modules (a dense layer) are saved as the float numbers that their codes stand for.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from quantization.layers.quantized_module import QuantizedModule
from quantization.models.quantizer import dequantize_model

__all__ = ["note_swap"]


def note_swap(model: nn.Module) -> None:
    """Let the classes of a model, where they are of those libraries, save what can be loaded.

    Example:
        >>> note_swap(nn.Linear(2, 2))
    """
    for cls in {cls for module in model.modules() for cls in type(module).__mro__}:
        name, wrap = _WAYS.get(cls.__module__.partition(".")[0], ("", _refusing))
        method = vars(cls).get(name)
        if callable(method) and not hasattr(method, "knows_quantized"):
            wrapped = wrap(method)
            wrapped.knows_quantized = True  # type: ignore[attr-defined]
            setattr(cls, name, wrapped)


def _quantized(model: nn.Module) -> str | None:
    """The name of a quantized layer in a model."""
    named = model.named_modules()
    return next((name for name, module in named if isinstance(module, QuantizedModule)), None)


def _refusing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def save(self: Any, *args: Any, **kwargs: Any) -> Any:
        name = _quantized(self)
        if name is not None:
            raise ValueError(
                f"{name or type(self).__name__} is quantized, and diffusers would load its codes "
                "as weights drawn at random, so nothing was saved: save by save_quantized(model, "
                "folder), and load by load_quantized(folder, model)"
            )
        return original(self, *args, **kwargs)

    return save


def _as_floats(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def save(self: Any, *args: Any, **kwargs: Any) -> Any:
        name = _quantized(self)
        if name is None:
            return original(self, *args, **kwargs)
        warnings.warn(
            f"{name} of {type(self).__name__} is saved as the float numbers of its codes, as "
            "sentence-transformers loads no codes there; save_quantized(model, folder) keeps them",
            stacklevel=2,
        )
        plain = copy.deepcopy(self)
        dequantize_model(plain)
        return original(plain, *args, **kwargs)

    return save


#: Library -> the method that writes tensors, and what becomes of it.
_WAYS: dict[str, tuple[str, Callable[..., Any]]] = {
    "diffusers": ("save_pretrained", _refusing),
    "sentence_transformers": ("save_torch_weights", _as_floats),
}
