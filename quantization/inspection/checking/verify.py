"""Whether the codes of a model are such as can be, and stand for the float model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from quantization.console.progress import Progress, shown
from quantization.inspection.checking.checks import Checked, Checks
from quantization.inspection.explain import levels_of
from quantization.inspection.looked import Looked, Model, layers_of, matching, reference_weights
from quantization.inspection.report import errors_of
from quantization.models.decisions import form_of
from quantization.numerics.weight_packing import pack_weights
from quantization.ops import native
from quantization.schemes.packed_weights import PARTS, PackedWeights, layout_of

__all__ = ["verify"]

_NUMBERS = 1 << 21  # that are decoded at a time
#: How much nearer another level must be, as a share of the distance between the two.
_SLACK = 0.1
_NEAREST = ("rtn",)


def verify(
    model: Model, reference: Model | None = None, *, progress: Progress | bool | None = None
) -> Checks:
    """Whether each quantized layer holds what its scheme allows, and what the float model says.

    Looked at are shapes and types of all tensors; codes, and bits of their bytes that belong to
    none; scales, levels, zero points, multipliers and biases, which are finite; the order of
    columns. With a reference each code that was rounded to nearest must be the nearest one, and
    under any method the noise is less than the signal.

    Args:
        model: a module, or a folder of ``save_quantized``, whose files
            :func:`quantization.checkpoint.verify_checkpoint` compares to their hashes.
        reference: the model in float, or its folder.
        progress: True for a bar, or a function that is called with (done, total) layers.

    Returns:
        A row for each layer, with what is wrong; ``.ok`` tells whether nothing is.

    Raises:
        TypeError: if ``model`` or ``reference`` is no model.
        ValueError: if the reference lacks a layer, or has one of another shape.

    Example:
        >>> from quantization import quantize_model
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 8))
        >>> _ = quantize_model(model, "w4g32")
        >>> verify(model).ok
        True
        >>> model[0].scales[3, 1] = float("nan")
        >>> verify(model)["0"].what
        'scales: 1 of 16 are not finite, the first at [3, 1]'
    """
    layers = layers_of(model)
    weights = None if reference is None else reference_weights(reference)
    pairs = [(layer, None if weights is None else (layer, weights)) for layer in layers]
    with shown(progress, "verifying", pairs) as told:
        rows = tuple(_check(one, None if pair is None else matching(*pair)) for one, pair in told)
    return Checks(rows, "verify")


def _check(layer: Looked, weight: torch.Tensor | None) -> Checked:
    module = layer.module
    checks = ["shapes", "codes", "numbers"]
    problems: list[str] = []
    try:
        packed = module.packed()
    except (TypeError, ValueError) as error:
        packed, problems = None, [str(error)]
    if packed is not None and not packed.packed_weights.is_meta and 0 not in packed.shape:
        problems += [*_tensors(packed), *_bias(module)]
        if weight is not None:
            checks.append("nearest levels" if module.method in _NEAREST else "noise")
            problems += [] if problems else _against(packed, weight, module.method)
    name = layer.name or "(the model)"
    return Checked(name, str(form_of(module)), tuple(checks), tuple(problems))


def _bias(module: Any) -> Iterator[str]:
    bias = getattr(module, "bias", None)
    if bias is not None:
        yield from _finite("bias", bias.detach())


def _tensors(packed: PackedWeights) -> Iterator[str]:
    """What is wrong with each tensor by itself."""
    for name in PARTS:
        tensor = getattr(packed, name)
        if tensor is not None and tensor.is_floating_point():
            yield from _finite(name, tensor)
    if packed.scheme.grid == "mxfp4":
        marked = native.to_array(packed.scales) == 255
        if marked.any():
            yield f"scales: {int(marked.sum())} of {marked.size} stand for NaN"
    yield from _padding("packed_weights", packed.packed_weights, packed, packed.shape[1])
    zeros = packed.zero_points
    if zeros is not None and zeros.dtype == torch.uint8:
        yield from _padding("zero_points", zeros, packed, packed.scheme.groups(packed.shape[1]))
    order = packed.input_order
    if order is not None and not torch.equal(
        order.sort().values, torch.arange(len(order)).to(order)
    ):
        yield "input_order: it is no order of all columns"


def _finite(name: str, tensor: torch.Tensor) -> Iterator[str]:
    wrong = ~tensor.isfinite()
    if bool(wrong.any()):
        place = wrong.nonzero()[0].tolist()
        yield f"{name}: {int(wrong.sum())} of {wrong.numel()} are not finite, the first at {place}"


def _padding(name: str, stored: torch.Tensor, packed: PackedWeights, count: int) -> Iterator[str]:
    """Bits behind the last code of a row are 0, and bytes of base 3 hold five digits."""
    rows = native.to_array(stored)
    if layout_of(packed.scheme) == "base3" and name == "packed_weights":
        wrong = (rows > 242).any(1) | (rows[:, -1] >= 3 ** (count - 5 * (rows.shape[1] - 1)))
    else:
        rest = count * packed.scheme.bits % 8
        wrong = rows[:, -1] >> rest != 0 if rest else np.zeros(len(rows), bool)
    if wrong.any():
        yield f"{name}: row {int(wrong.argmax())} has bits that belong to no code"


# ---- against the float weight ----------------------------------------------------------------


def _against(packed: PackedWeights, weight: torch.Tensor, method: str) -> list[str]:
    found = errors_of(packed, weight)
    if found.sqnr is not None and found.sqnr < 0:
        return [
            f"the noise is more than the signal ({found.sqnr:.1f} dB): not the codes of this weight"
        ]
    if method not in _NEAREST:
        return []
    rows, cols = packed.shape
    block = max(1, _NUMBERS // cols)
    for start in range(0, rows, block):
        stop = min(rows, start + block)
        wrong = _not_nearest(packed.rows(start, stop), weight[start:stop].detach().float())
        if bool(wrong.any()):
            row, col = wrong.nonzero()[0].tolist()
            return [f"weight [{start + row}, {col}]: another level is nearer than that of its code"]
    return []


def _not_nearest(packed: PackedWeights, weight: torch.Tensor) -> torch.Tensor:
    """Where the level below or above that of a code is nearer to the weight."""
    here = packed.dequantize("float32")
    error = (here - weight).abs()
    wrong = torch.zeros_like(error, dtype=torch.bool)
    for step in (-1, 1):
        other = _moved(packed, step).dequantize("float32")
        gap = (other - here).abs()
        wrong |= error > (other - weight).abs() + _SLACK * gap
    return wrong


def _moved(packed: PackedWeights, step: int) -> PackedWeights:
    """The same with each code at the next level below or above, where there is one."""
    scheme = packed.scheme
    book = levels_of(packed.rows(0, 1))
    order = sorted(book, key=lambda code: book[code])
    count = 3 if layout_of(scheme) == "base3" else 2**scheme.bits
    table = np.zeros(count, "int16")
    for place, code in enumerate(order):
        table[code % count] = order[min(max(place + step, 0), len(order) - 1)]
    is_signed = min(order) < 0
    codes = native.to_array(packed._stored_codes("int8" if is_signed else "uint8")).astype("int16")
    moved = torch.from_numpy(table[codes % count].astype("int8" if is_signed else "uint8"))
    data = pack_weights(moved, scheme.bits, layout=layout_of(scheme), dim=1)
    return replace(packed, packed_weights=data.to(packed.packed_weights.device))
