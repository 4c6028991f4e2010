"""Each kernel of this CPU against the plain definition, on the layers that a user has."""

from __future__ import annotations

from typing import Any

import torch

from quantization.console.progress import Progress, shown
from quantization.inspection.checking.checks import Checked, Checks
from quantization.inspection.looked import Looked, Model, layers_of
from quantization.layers.packed_embedding import PackedEmbedding
from quantization.models.decisions import form_of
from quantization.ops.runtime import active_isa, isas, set_isa

__all__ = ["self_test"]

_TOKENS = (1, 5)  # of different kernels
_UNIT = 2.0**-24  # half the distance from 1 to the next float32
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def self_test(model: Model, *, progress: Progress | bool | None = None) -> Checks:
    """Whether every instruction set of this CPU gives the layers' numbers as they are defined.

    Each layer is called under each of :func:`quantization.isas` on random activations of float32,
    bfloat16 and float16, one row and five. Its answers must be those of a product in float64 of the
    numbers that its codes stand for, within the bound of a sum in float32, rounded once to the
    dtype; an embedding gives the numbers themselves. Decoded weights are the same bits under each.

    Args:
        model: a module, or a folder of ``save_quantized``.
        progress: True for a bar, or a function that is called with (done, total) layers.

    Returns:
        A row for each layer, with what is wrong; ``.ok`` tells whether nothing is.

    Raises:
        TypeError: if ``model`` is no model.

    Source: N. Higham, "Accuracy and Stability of Numerical Algorithms" (2002), section 3.1.

    Example:
        >>> from quantization import PackedLinearLayer
        >>> found = self_test(torch.nn.Sequential(PackedLinearLayer(64, 8, scheme="w4g32")))
        >>> found.ok, found["0"].checks == isas()
        (True, True)
    """
    before = active_isa()
    layers = layers_of(model)
    try:
        with shown(progress, "testing", layers) as told:
            rows = tuple(_test(layer) for layer in told)
    finally:
        set_isa(before)
    return Checks(rows, "self test")


def _test(layer: Looked) -> Checked:
    module: Any = layer.module
    name, scheme = layer.name or "(the model)", str(form_of(layer.module))
    packed = module.packed()
    if packed.packed_weights.device.type != "cpu" or 0 in packed.shape:
        return Checked(name, scheme, ())
    set_isa("reference")
    weight = packed.dequantize("float32")
    worst, problems = 0.0, []
    for isa in isas():
        set_isa(isa)
        if not _same(packed.dequantize("float32"), weight):
            problems.append(f"{isa}: decoded numbers differ from those of the definition")
            continue
        share = _table(module) if isinstance(module, PackedEmbedding) else _linear(module, weight)
        worst = max(worst, share)
        if not share <= 1:
            problems.append(f"{isa}: an answer is {share:.3g} times as far off as it may be")
    return Checked(name, scheme, isas(), tuple(problems), worst)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _table(module: PackedEmbedding) -> float:
    places = torch.arange(module.num_embeddings)[:: max(1, module.num_embeddings // 64)]
    rows = module(places)
    return 0.0 if _same(rows, module.packed().dequantize()[places]) else float("inf")


def _linear(module: Any, weight: torch.Tensor) -> float:
    """The largest error of a layer's answers as a share of its bound."""
    generator = torch.Generator().manual_seed(0)
    bias = None if module.bias is None else module.bias.detach().double()
    known = bool(weight.isfinite().all(1).any())
    exact_weight, worst = weight.double(), 0.0
    for tokens in _TOKENS:
        x = torch.randn(tokens, weight.shape[1], generator=generator)
        for dtype in _DTYPES if known else ():
            with torch.inference_mode():
                answer = module(x.to(dtype)).double()
            given = x.to(dtype).double()
            exact = given @ exact_weight.T
            size = given.abs() @ exact_weight.abs().T
            if getattr(module, "input_scale", None) is not None:  # the input is rounded once more
                size = size * (1 + torch.finfo(dtype).eps / _UNIT / 2 / (weight.shape[1] + 6))
            if bias is not None:
                exact, size = exact + bias, size + bias.abs()
            worst = max(worst, _share(answer, exact, size, weight.shape[1], dtype))
    return worst


def _share(
    answer: torch.Tensor, exact: torch.Tensor, size: torch.Tensor, terms: int, dtype: torch.dtype
) -> float:
    bound = (terms + 6) * _UNIT * size
    bound = bound + torch.finfo(dtype).eps / 2 * (exact.abs() + bound) + torch.finfo(dtype).tiny
    shares = (answer - exact).abs() / bound
    is_known = exact.isfinite() & (exact.abs() + bound < torch.finfo(dtype).max)
    return float(shares[is_known].max()) if bool(is_known.any()) else 0.0
