"""One layer into another, with all that a user hung on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from quantization.layers.float_layers import as_linear, float_parts, is_conv1d
from quantization.layers.quantized_linear import accepted
from quantization.layers.quantized_module import QuantizedModule

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_NOT_CARRIED = {
    *nn.Linear(1, 1, device="meta").__dict__,
    *nn.Embedding(1, 1, _weight=torch.empty(1, 1, device="meta")).__dict__,  # draws nothing
    "_compiled_call_impl",
}

#: Builds a new layer out of (the old one, the name of its weight), and leaves the old one alone.
Maker = Callable[[nn.Module, str], nn.Module]


def convert(old: nn.Module, name: str, make: Maker) -> nn.Module:
    """The layer that comes in the place of ``old``, with all that a user hung on that.

    Args:
        old: a layer; it is left as it is.
        name: its dotted name, for messages.
        make: builds the new one.

    Raises:
        Exception: whatever ``make`` raises, with a note.

    Example:
        >>> from quantization import QWQALinearLayer
        >>> make = layer_maker(QWQALinearLayer, quantize=True, nonfinite="raise")
        >>> convert(nn.Linear(2, 3), "0", make).int8_weights.shape
        torch.Size([3, 2])
    """
    try:
        new = make(old, f"{name}.weight" if name else "weight")
    except BaseException as error:
        error.add_note(f"while replacing {name or 'the model'}; the model was not changed")
        raise
    _carry_over(old, new)
    return new


def layer_maker(cls: type[nn.Module], quantize: bool, nonfinite: str) -> Maker:
    """What builds layers of class ``cls``.

    Args:
        cls: what :class:`quantization.swap.target.Target.Linear` takes.
        quantize: False: a fresh layer of the same structure, with the bias of the old one.
        nonfinite: passed on to ``cls``, if it knows the option.

    Example:
        >>> from quantization import QWQALinearLayer
        >>> layer_maker(QWQALinearLayer, True, "raise")(nn.Linear(2, 3), "weight").in_features
        2
    """

    def make(old: nn.Module, name: str) -> nn.Module:
        options = {"nonfinite": nonfinite, "name": name}
        old = as_linear(old)
        if quantize and hasattr(cls, "from_float"):
            return cls.from_float(old, **accepted(cls.from_float, **options))
        return _construct(old, cls, quantize, options)

    return make


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
    if isinstance(new, QuantizedModule):
        new.was_conv1d = is_conv1d(old)
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
        is_own = isinstance(old, QuantizedModule) and name in type(old).OWN_ATTRIBUTES
        if not (name in _NOT_CARRIED or is_own or hasattr(type(new), name)):
            new.__dict__.setdefault(name, value)


def memory_of(tensor: torch.Tensor) -> tuple[int, int, int]:
    """What two tensors have in common exactly if they are the same numbers in memory."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.numel()


def weight_of(layer: nn.Module) -> torch.Tensor | None:
    """The tensor in memory that holds a layer's weight, if one does: itself, or its codes.

    Example:
        >>> from quantization import QWQALinearLayer
        >>> weight_of(QWQALinearLayer(2, 3)).dtype
        torch.int8
    """
    if isinstance(layer, QuantizedModule):
        return layer._buffers[layer._weight_names()[0]]
    return getattr(layer, "weight", None)


def share_weights(pairs: list[tuple[nn.Module, nn.Module]]) -> None:
    """Let new layers of one weight hold the same tensors, as the old ones did.

    Args:
        pairs: (old layer, new layer).
    """
    firsts: dict[tuple, nn.Module] = {}
    for old, new in pairs:
        weight = weight_of(old)
        if weight is None:
            continue
        key = (*memory_of(weight), weight.shape, weight.stride(), is_conv1d(old))
        first = firsts.setdefault(key, new)
        if first is not new:
            adopt(first, new)


def adopt(first: nn.Module, other: nn.Module) -> None:
    """Let ``other`` hold the tensors of ``first`` in the place of its own equal ones; not a bias.

    Example:
        >>> one, two = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> _ = two.load_state_dict(one.state_dict())
        >>> adopt(one, two)
        >>> two.weight is one.weight, two.bias is one.bias
        (True, False)
    """
    for group in ("_buffers", "_parameters"):
        theirs, own = getattr(first, group), getattr(other, group)
        for name, tensor in theirs.items():
            if name != "bias" and _same_numbers(tensor, own.get(name)):
                own[name] = tensor


def _same_numbers(a: Any, b: Any) -> bool:
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    return a is b or a.is_meta or torch.equal(a, b)
