"""Whether a shared model answers as the whole one does, and how many bytes each process holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle

from quantization.distributed.styles import RowwiseQuantized
from quantization.layers.quantized_module import QuantizedModule

__all__ = ["allowed_difference", "held_bytes"]

_UNIT = 2.0**-24  # half the distance from 1 to the next float32


def allowed_difference(
    model: nn.Module, plan: Mapping[str, ParallelStyle], run: Callable[[nn.Module], torch.Tensor]
) -> float:
    """How far a result moves when each layer that sums over processes errs as far as it may.

    A sum of K products in float32 errs by at most (K + 2) 2⁻²⁴ Σ|x·w|, in whatever order; the whole
    layer and its shares have different orders, so an output may differ by twice that. The model is
    run with each such output moved by so much, up or down at random. All other layers give the same
    bits.

    Args:
        model: the whole one, of float32 activations.
        plan: names of its layers, and styles, as :func:`quantization.distributed.plan_of` gives.
        run: calls a model and gives the result to compare.

    Returns:
        The largest difference of a number of the result; 0 if no layer is summed.

    Source: N. Higham, "Accuracy and Stability of Numerical Algorithms" (2002), section 3.1.

    Example:
        >>> from quantization import PackedLinearLayer
        >>> model, x = nn.Sequential(PackedLinearLayer(64, 8, scheme="w4g32")), torch.randn(2, 64)
        >>> 0 < allowed_difference(model, {"0": RowwiseQuantized()}, lambda m: m(x)) < 1e-3
        True
    """
    signs = torch.Generator().manual_seed(0)

    def err(layer: nn.Linear, args: tuple, output: torch.Tensor) -> torch.Tensor:
        size = args[0].abs() @ layer.weight.abs().T
        step = 2 * (layer.in_features + 2) * _UNIT * size
        return output + step * (torch.randint(0, 2, output.shape, generator=signs) * 2 - 1)

    names = [name for name, style in plan.items() if isinstance(style, RowwiseQuantized)]
    layers = [model.get_submodule(name) for name in names]
    with torch.no_grad():
        straight = run(model)
        hooks = [each.register_forward_hook(err) for each in layers if isinstance(each, nn.Linear)]
        try:
            moved = run(model)
        finally:
            for hook in hooks:
                hook.remove()
    return float((moved - straight).abs().max())


def held_bytes(model: nn.Module) -> int:
    """Bytes of codes, scales and what belongs to them in this process, tied layers counted once.

    Example:
        >>> from quantization import PackedLinearLayer
        >>> held_bytes(nn.Sequential(PackedLinearLayer(64, 8, scheme="w4")))
        288
    """
    tensors = {
        id(tensor): tensor.nbytes
        for module in model.modules()
        if isinstance(module, QuantizedModule)
        for name in module._weight_names()
        if (tensor := module._buffers[name]) is not None
    }
    return sum(tensors.values())
