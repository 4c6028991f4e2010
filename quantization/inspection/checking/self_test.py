"""Each kernel of this CPU against the plain definition, on the layers that a user has."""

from __future__ import annotations

from collections.abc import Iterator
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
    is_table = isinstance(module, PackedEmbedding)
    cases = [] if is_table else list(_cases(module, weight))
    worst, problems = 0.0, []
    for isa in isas():
        set_isa(isa)
        if not _same(packed.dequantize("float32"), weight):
            problems.append(f"{isa}: decoded numbers differ from those of the definition")
            continue
        share = _table(module) if is_table else max(_share(module, *case) for case in cases)
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


def _cases(
    module: Any, weight: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Activations of each dtype, the exact answers, and how far off an answer may be."""
    x = torch.randn(_TOKENS[-1], weight.shape[1], generator=torch.Generator().manual_seed(0))
    bias = None if module.bias is None else module.bias.detach().double()
    exact_weight = weight.double().T
    sizes = exact_weight.abs()
    for dtype in _DTYPES:
        given, limits = x.to(dtype), torch.finfo(dtype)
        exact, size = given.double() @ exact_weight, given.double().abs() @ sizes
        if bias is not None:
            exact, size = exact + bias, size + bias.abs()
        bound = (weight.shape[1] + 6) * _UNIT * size
        if getattr(module, "input_scale", None) is not None:  # the input is rounded once more
            bound = bound + limits.eps / 2 * size
        bound = bound + limits.eps / 2 * (exact.abs() + bound) + limits.tiny
        yield given, exact, bound


def _share(module: Any, x: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor) -> float:
    """The largest error of a layer's answers as a share of its bound."""
    worst = 0.0
    for tokens in _TOKENS:
        with torch.inference_mode():
            answer = module(x[:tokens]).double()
        shares = (answer - exact[:tokens]).abs() / bound[:tokens]
        largest = torch.finfo(x.dtype).max
        is_known = exact[:tokens].isfinite() & (exact[:tokens].abs() + bound[:tokens] < largest)
        known = shares[is_known]
        worst = max(worst, float(known.max()) if known.numel() else 0.0)
    return worst
