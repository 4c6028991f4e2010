"""Layers that hold matrices and are no linear layers: they stay in float, and reports name them."""

from __future__ import annotations

import torch
from torch import nn

from quantization.swap.conversion import memory_of
from quantization.swap.engine import tensors_of
from quantization.swap.walker import Site

__all__ = ["why_other"]

_KNOWN = (nn.Bilinear, nn.RNNBase, nn.RNNCellBase)


def why_other(sites: list[Site]) -> dict[int, str]:
    """Ids of such modules -> what they are, and what share of the model's parameters they hold.

    Those are convolutions of kernel 1, bilinear and recurrent layers, and attention that was not
    split. Matrices that other modules own are Parameters like any; reports have the biggest.

    Example:
        >>> from quantization.swap.walker import walk
        >>> model = nn.Sequential(nn.Conv1d(8, 8, 1, bias=False), nn.Conv1d(8, 8, 3), nn.ReLU())
        >>> list(why_other(list(walk(model))).values())
        ['a convolution of kernel 1, 24.2% of the parameters: only linear layers are quantized']
    """
    found: dict[int, tuple[str, list[nn.Parameter]]] = {}
    for site in sites:
        matrices = [p for p in site.module._parameters.values() if _is_matrix(p, site.module)]
        if matrices:
            found[id(site.module)] = _what(site.module), matrices
    if not found:
        return {}
    sizes = {
        memory_of(tensor): tensor.numel()
        for _, tensor, _ in tensors_of(sites)
        if isinstance(tensor, nn.Parameter)
    }
    total = sum(sizes.values())
    return {
        key: f"{what}, {sum(p.numel() for p in matrices) / total:.1%} of the parameters: only "
        "linear layers are quantized"
        for key, (what, matrices) in found.items()
    }


def _what(module: nn.Module) -> str:
    if isinstance(module, nn.modules.conv._ConvNd):
        return "a convolution of kernel 1"
    return f"{type(module).__name__} with weights of its own"


def _is_matrix(parameter: torch.Tensor | None, module: nn.Module) -> bool:
    """Whether a Parameter would be a matrix of weights to a user."""
    if parameter is None or nn.parameter.is_lazy(parameter) or not parameter.is_floating_point():
        return False
    if isinstance(module, nn.modules.conv._ConvNd):
        return parameter.ndim > 2 and parameter[0, 0].numel() == 1 and module.groups == 1
    if isinstance(module, nn.MultiheadAttention):  # of which nothing was split
        return parameter.ndim == 2
    return isinstance(module, _KNOWN) and parameter.ndim > 1
