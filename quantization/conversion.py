"""One float layer into one of the target class, with all that a user hung on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from quantization.module_walker import float_parts
from quantization.target import accepted

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_NOT_CARRIED = {*nn.Linear(1, 1, device="meta").__dict__, "_compiled_call_impl"}


def convert(
    old: nn.Module, name: str, cls: type[nn.Module], quantize: bool, nonfinite: str
) -> nn.Module:
    """The layer of class ``cls`` that comes in the place of ``old``, which is left as it is.

    Args:
        old: a layer that :func:`quantization.module_walker.why_left` has nothing against.
        name: its dotted name, for messages.
        cls: what :class:`quantization.target.Target.Linear` takes.
        quantize: False: a fresh layer of the same structure, with the bias of ``old``.
        nonfinite: passed on to ``cls``, if it knows the option.

    Raises:
        ValueError: for a NaN or infinity in the weight; whatever ``cls`` raises, with a note.

    Example:
        >>> from quantization import QWQALinearLayer
        >>> convert(nn.Linear(2, 3), "0", QWQALinearLayer, True, "raise").int8_weights.shape
        torch.Size([3, 2])
    """
    options = {"nonfinite": nonfinite, "name": f"{name}.weight" if name else "weight"}
    try:
        if quantize and hasattr(cls, "from_float"):
            new = cls.from_float(old, **accepted(cls.from_float, **options))
        else:
            new = _construct(old, cls, quantize, options)
    except BaseException as error:
        error.add_note(f"while replacing {name or 'the model'}; the model was not changed")
        raise
    _carry_over(old, new)
    return new


def _construct(
    old: nn.Module, cls: type[nn.Module], quantize: bool, options: dict[str, str]
) -> nn.Module:
    """By the keyword constructor and quantize(weights): any class that Target.Linear takes."""
    weight, bias = float_parts(old)
    out_features, in_features = weight.shape
    with torch.random.fork_rng(devices=[]), torch.device(weight.device):
        new = cls(
            in_features=in_features,
            out_features=out_features,
            bias=bias is not None,
            dtype=weight.dtype,
        )
    if quantize:
        new.quantize(weight, **accepted(new.quantize, **options))
    if bias is not None:
        given = getattr(new, "bias", None)
        if not isinstance(given, torch.Tensor) or given.numel() != bias.numel():
            raise TypeError(f"{cls.__name__} was built with bias=True and has no fitting bias")
        bias = bias.reshape(given.shape)
        new.bias = nn.Parameter(bias) if isinstance(given, nn.Parameter) else bias
    return new


def _carry_over(old: nn.Module, new: nn.Module) -> None:
    """Training flag, hooks and attributes of the user's own."""
    new.train(old.training)
    for hooks in _HOOKS:
        theirs, own = getattr(old, hooks), getattr(new, hooks)
        # The same dict where possible: a handle that the user keeps can then still remove its hook.
        new.__dict__[hooks] = theirs if not own else type(own)([*own.items(), *theirs.items()])
    if old._is_full_backward_hook is not None:
        new._is_full_backward_hook = old._is_full_backward_hook
    for name, value in old.__dict__.items():
        if name not in _NOT_CARRIED and not hasattr(type(new), name):
            new.__dict__.setdefault(name, value)


def memory_of(tensor: torch.Tensor) -> tuple[int, int, int]:
    """What two tensors have in common exactly if they are the same numbers in memory."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.numel()


def share_codes(pairs: list[tuple[nn.Module, nn.Module]]) -> None:
    """Let new layers of one float weight hold the same tensors, as the old ones did.

    Args:
        pairs: (old layer, new layer).
    """
    firsts: dict[tuple, nn.Module] = {}
    for old, new in pairs:
        key = (*memory_of(old.weight), old.weight.shape, old.weight.stride(), type(old))
        first = firsts.setdefault(key, new)
        if first is new:
            continue
        for name, tensor in first._buffers.items():
            if name != "bias" and _same_numbers(tensor, new._buffers.get(name)):
                new._buffers[name] = tensor


def _same_numbers(a: Any, b: Any) -> bool:
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    return a.is_meta or torch.equal(a, b)
