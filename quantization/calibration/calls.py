"""Calling a model that somebody else wrote: batches of any form in, one tensor out."""

from __future__ import annotations

import hashlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "Batch",
    "as_batches",
    "call",
    "digest_of",
    "masks_of",
    "observed",
    "output_of",
    "recorded",
    "takes",
]

#: What a model is called with: a tensor, positional arguments, or named ones.
Batch = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


def as_batches(given: Any) -> Iterable[Any]:
    """An iterable of batches; a tensor or a mapping alone is one batch.

    Raises:
        TypeError: for what cannot be iterated, and for text.

    Example:
        >>> len(as_batches(torch.ones(3, 2)))
        1
    """
    if isinstance(given, Tensor | Mapping):
        return [given]
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise TypeError(
            f"batches is {given!r:.60}; expected an iterable of what the model is called with: "
            "tensors, tuples of arguments, or dicts of named ones (text is tokenized first)"
        )
    return given


def call(model: Any, batch: Any) -> Any:
    """``model(batch)``, ``model(*batch)`` or ``model(**batch)``, as the batch has it.

    Raises:
        TypeError: for a batch of another kind.

    Example:
        >>> call(nn.Identity(), (torch.ones(1),))
        tensor([1.])
    """
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    if isinstance(batch, Tensor):
        return model(batch)
    raise TypeError(
        f"a batch is {batch!r:.60}; expected a tensor, a tuple of arguments or a dict of named ones"
    )


def output_of(result: Any) -> tuple[Tensor, bool]:
    """The tensor that a model's result is about, and whether it is hidden states, not logits.

    That is what is called ``logits``, else ``last_hidden_state`` or ``sentence_embedding``, as an
    attribute or a key; else the result itself, or its first part, as logits.

    Raises:
        TypeError: if there is none.

    Example:
        >>> output_of((torch.ones(2), None))
        (tensor([1., 1.]), False)
    """
    for name in ("logits", "last_hidden_state", "sentence_embedding"):
        is_mapping = isinstance(result, Mapping)
        found = result.get(name) if is_mapping else getattr(result, name, None)
        if isinstance(found, Tensor):
            return found, name != "logits"
    first = result[0] if isinstance(result, tuple | list) and result else result
    if isinstance(first, Tensor):
        return first, False
    raise TypeError(
        f"the model returns a {type(result).__name__}, which has no logits, no last_hidden_state "
        "and is no tensor"
    )


def takes(model: nn.Module, name: str) -> bool:
    """Whether the model's forward has an argument of that name.

    Example:
        >>> takes(nn.Identity(), "input"), takes(nn.Identity(), "use_cache")
        (True, False)
    """
    return name in inspect.signature(model.forward).parameters


def masks_of(batch: Any) -> list[Tensor]:
    """Which positions of a batch are real ones: bool [batch, sequence], one or several, or none.

    Several where there are sources and targets, each with a shape of its own. If they share one,
    an input of a layer cannot be told to be of either: positions count that are real in any.

    Example:
        >>> masks_of({"input_ids": torch.ones(1, 2), "attention_mask": torch.tensor([[1, 0]])})
        [tensor([[ True, False]])]
    """
    if isinstance(batch, tuple | list):  # models that take one dict of all features
        batch = next((part for part in batch if isinstance(part, Mapping)), None)
    if not isinstance(batch, Mapping):
        return []
    masks: dict[torch.Size, Tensor] = {}
    sources = _mask(batch.get("attention_mask"))
    for mask in (sources, _target_mask(batch)):
        if mask is not None:
            masks[mask.shape] = masks[mask.shape] | mask if mask.shape in masks else mask
    return list(masks.values())


def _mask(value: Any) -> Tensor | None:
    return value.bool() if isinstance(value, Tensor) and value.ndim == 2 else None


def _target_mask(batch: Mapping[str, Any]) -> Tensor | None:
    mask = _mask(batch.get("decoder_attention_mask"))
    targets = batch.get("decoder_input_ids")
    if mask is None and isinstance(targets, Tensor) and targets.ndim == 2:
        return torch.ones_like(targets, dtype=torch.bool)
    return mask


def digest_of(batch: Any) -> bytes:
    """A hash of all numbers of a batch.

    Example:
        >>> digest_of(torch.ones(2)) == digest_of((torch.ones(2),))
        False
    """
    hasher = hashlib.sha256(type(batch).__name__.encode())
    if isinstance(batch, Tensor):
        plain = batch.detach().cpu().contiguous()
        hasher.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
        hasher.update(plain.reshape(-1).view(torch.uint8).numpy().data if plain.numel() else b"")
    elif isinstance(batch, Mapping):
        for name in sorted(batch, key=str):
            hasher.update(str(name).encode() + digest_of(batch[name]))
    elif isinstance(batch, tuple | list):
        for part in batch:
            hasher.update(digest_of(part))
    else:
        hasher.update(repr(batch).encode())
    return hasher.digest()


@contextmanager
def observed(*models: Any) -> Iterator[None]:
    """Models in eval mode, without gradients, and not compiled, so that every hook is called.

    Afterwards each module's training flag is what it was.
    """
    modules = {
        id(module): module
        for model in models
        if isinstance(model, nn.Module)
        for module in model.modules()
    }
    flags = [(module, module.training) for module in modules.values()]
    try:
        for module, _ in flags:
            module.training = False
        with (
            torch.inference_mode(False),  # what is kept is to be of use outside of it
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
        ):
            yield
    finally:
        for module, flag in flags:
            module.training = flag


def recorded(run: Callable[..., Any], most: int = 1 << 28) -> Callable[[], Callable[..., Any]]:
    """A call of a model for many rounds over the same batches: outputs are kept, up to a size.

    Args:
        run: the call.
        most: bytes of outputs that are kept, those of the first batches.

    Returns:
        What begins a round: it gives the call for its batches.

    Example:
        >>> rounds = recorded(lambda x: x + torch.rand(1))
        >>> bool(rounds()(torch.ones(1)) == rounds()(torch.ones(1)))
        True
    """
    said: list[Any] = []
    size = 0

    def begin() -> Callable[..., Any]:
        turns = itertools.count()

        def say(*args: Any, **named: Any) -> Any:
            nonlocal size
            turn = next(turns)
            if turn < len(said):
                return said[turn]
            result = run(*args, **named)
            size += output_of(result)[0].nbytes
            if turn == len(said) and size <= most:
                said.append(result)
            return result

        return say

    return begin
