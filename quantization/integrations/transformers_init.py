"""What transformers draws at random after loading: nothing that a quantized layer has read.

transformers initialises what a checkpoint lacks, and tells the rest by a mark on each module and
each tensor. A module initialises itself, but many initialise tensors of their children too
(SigLIP's attention the biases of its projections, wav2vec2 whole layers by ``reset_parameters``).
So each tensor of a quantized layer has the mark, and while numbers are drawn, what its codes stand
for has it too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from quantization.layers.quantized_module import QuantizedModule
from quantization.swap.experts import UnfusedExperts

__all__ = ["is_initialized", "keeping_codes", "mark_as_initialized"]

_MARK = "_is_hf_initialized"


def mark_as_initialized(new: nn.Module) -> None:
    """Keep transformers from drawing numbers for what has been read; a bias may yet come.

    Args:
        new: a quantized layer, or what holds some; tensors on meta have not been read.

    Example:
        >>> layer = nn.Linear(8, 8)
        >>> mark_as_initialized(layer)
        >>> is_initialized(layer.bias)
        True
    """
    for module in new.modules():
        tensors = [*module._parameters.values(), *module._buffers.values()]
        for tensor in tensors:
            if tensor is not None and not tensor.is_meta:
                setattr(tensor, _MARK, True)
        bias = getattr(module, "bias", None)
        if bias is None or not bias.is_meta:
            setattr(module, _MARK, True)


def is_initialized(tensor: torch.Tensor) -> bool:
    """Whether a tensor was read, and not drawn at random.

    Example:
        >>> is_initialized(torch.ones(2))
        False
    """
    return bool(getattr(tensor, _MARK, False))


@contextmanager
def keeping_codes(model: nn.Module, *_: Any, **__: Any) -> Iterator[None]:
    """For the time of drawing, let quantized layers be what float ones that were read are.

    Their weight has the mark, and ``reset_parameters`` is that of the float layer, which leaves
    alone what has it. A bias is a Parameter: some families ask a layer's first for its dtype.
    Experts that were unfused have the names of the fused ones, for what initialises these.

    Example:
        >>> with keeping_codes(nn.Linear(8, 8)):
        ...     pass
    """
    layers = [module for module in model.modules() if isinstance(module, QuantizedModule)]
    if not layers:
        yield
        return
    buffers = [(layer, dict(layer._buffers)) for layer in layers]
    experts = [
        (module, f"{name}{end}")
        for module in model.modules()
        if isinstance(module, UnfusedExperts)
        for name in module.projections
        for end in ("", "_bias")
    ]
    weight, reset = QuantizedModule.weight, QuantizedModule.reset_parameters
    cls: Any = QuantizedModule
    cls.weight = property(_marked, weight.fset)
    cls.reset_parameters = _reset_what_is_missing
    try:
        for layer, own in buffers:
            if own.get("bias") is not None:
                bias = layer._parameters["bias"] = nn.Parameter(layer._buffers.pop("bias"), False)
                setattr(bias, _MARK, is_initialized(own["bias"]))
        for each, name in experts:
            each.__dict__[name] = torch.empty(0)
            setattr(each.__dict__[name], _MARK, True)
        yield
    finally:
        for each, name in experts:
            each.__dict__.pop(name, None)
        cls.weight, cls.reset_parameters = weight, reset
        for layer, own in buffers:
            if "bias" in own and "bias" not in layer._buffers:
                del layer._parameters["bias"]
            layer._buffers.update(own)


def _marked(layer: Any) -> torch.Tensor:
    """The numbers of a layer, with the mark; code that does not ask for it may write them."""
    numbers: torch.Tensor = layer._decoded()
    setattr(numbers, _MARK, True)
    return numbers


def _reset_what_is_missing(layer: Any) -> None:
    super(QuantizedModule, layer).reset_parameters()
