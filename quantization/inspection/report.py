"""A quantized model as it is: each layer's scheme, bytes, errors and codes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from quantization.console.columns import Column, size
from quantization.console.progress import Progress, shown
from quantization.console.table import Table
from quantization.inspection.codes import counts_by_level
from quantization.inspection.looked import Looked, Model, layers_of, matching, reference_weights
from quantization.layers.arena import pages_of, read_maps
from quantization.models.decisions import form_of
from quantization.ops.runtime import active_isa
from quantization.schemes.packed_weights import PackedWeights

__all__ = ["Errors", "LayerReport", "errors_of", "report"]

#: Stretches of memory, as :func:`quantization.layers.arena.read_maps` tells them.
Maps = list[tuple[int, int, str]]

_NUMBERS = 1 << 22  # that are decoded at a time

_COLUMNS = (
    Column("layer", "name"),
    Column("scheme"),
    Column("method", help="by which its codes were found; empty where nobody knows"),
    Column("shape", "number", "out x in", extra=True),
    Column("bits_per_weight", "number", "bits", ".2f", "a weight, scales and all included"),
    Column("nbytes", "bytes", "bytes", help="of codes, scales and all, and the bias"),
    Column("sqnr", "bar", "SQNR dB", ".1f", "signal to quantization noise of the weight"),
    Column("largest_error", "number", "largest", ".2g", "largest error of a weight"),
    Column("mean_error", "number", "mean", ".2g", "mean size of the errors"),
    Column("saturated", "share", "ends", ".1%", "codes at the lowest or highest level"),
    Column("used", "text", extra=True, help="levels that some weight has, of how many there are"),
    Column("codes", "histogram", help="how often each level is used, the lowest first"),
    Column("pages", "text", help="what kind of memory its codes lie in", extra=True),
    Column("kernel", extra=True, help="instruction set of this CPU that multiplies by it"),
)


@dataclass(frozen=True)
class LayerReport:
    """What is known of a layer.

    Example:
        >>> from quantization import PackedLinearLayer
        >>> row = report(PackedLinearLayer(64, 8, scheme="w4g32"))[0]
        >>> row.shape, row.levels, sum(row.codes)
        ((8, 64), 16, 512)

    Attributes:
        layer: its dotted name.
        aliases: further names of the same codes.
        scheme: its scheme, or ``"w8a16"``.
        method: how its codes were found; empty where nobody knows.
        shape: ``(out_features, in_features)``.
        bits_per_weight: scales and all included.
        nbytes: of all its tensors.
        sqnr: in decibels, largest_error, mean_error: against the reference; None without one.
        saturated: share of codes at the lowest or highest level.
        levels: how many levels its grid has; with rows of different levels, each row's.
        codes: how often each is used, the lowest first.
        pages: what kind of memory its codes lie in: ``"huge"``, ``"small"``, ``"file"``; empty
            where the system does not tell.
        kernel: the instruction set that multiplies by it.
    """

    layer: str
    aliases: tuple[str, ...]
    scheme: str
    method: str
    shape: tuple[int, int]
    bits_per_weight: float
    nbytes: int
    sqnr: float | None
    largest_error: float | None
    mean_error: float | None
    saturated: float | None
    codes: tuple[int, ...] | None
    pages: str
    kernel: str

    @property
    def levels(self) -> int:
        """How many levels there are."""
        return len(self.codes or ())

    @property
    def used(self) -> str | None:
        """Levels in use, of how many."""
        if self.codes is None:
            return None
        return f"{sum(map(bool, self.codes))}/{self.levels}"


def report(
    model: Model, reference: Model | None = None, *, progress: Progress | bool | None = None
) -> Table[LayerReport]:
    """What a quantized model is, layer by layer.

    Args:
        model: a module, or a folder of ``save_quantized``.
        reference: the model in float, or its folder: errors are then known.
        progress: True for a bar, or a function that is called with (done, total) layers.

    Returns:
        A table of a row for each quantized layer (:class:`LayerReport`); layers of one set of codes
        have one row.

    Raises:
        TypeError: if ``model`` or ``reference`` is no model.
        ValueError: if the reference lacks a layer, or has one of another shape.
        FileNotFoundError, CheckpointError: for a folder that is none.

    Example:
        >>> import copy
        >>> from quantization import quantize_model
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        >>> reference = copy.deepcopy(model)
        >>> _ = quantize_model(model, {"0": "w4g32:lsq", "1": "w8"})
        >>> found = report(model, reference)
        >>> found["0"].scheme, found["0"].method, found["0"].levels, found["0"].sqnr > 18
        ('w4g32', 'lsq', 16, True)
        >>> [row.layer for row in found.sort("sqnr", reverse=True)]
        ['1', '0']
    """
    layers = layers_of(model)
    weights = None if reference is None else reference_weights(reference)
    pairs = [(layer, None if weights is None else (layer, weights)) for layer in layers]
    maps = read_maps()
    with shown(progress, "looking", pairs) as told:
        rows = tuple(
            _row(layer, None if pair is None else matching(*pair), maps) for layer, pair in told
        )
    total = sum(row.nbytes for row in rows)
    notes = [f"{len(rows)} quantized layers of {size(total)}"]
    if rows and reference is None:
        notes.append("SQNR and errors: give the float model as reference")
    return Table(_COLUMNS, rows, "", tuple(notes))


def _row(layer: Looked, weight: torch.Tensor | None, maps: Maps) -> LayerReport:
    module = layer.module
    packed = module.packed()
    is_known = not packed.packed_weights.is_meta and 0 not in packed.shape
    errors = errors_of(packed, weight) if weight is not None and is_known else Errors()
    counts = tuple(counts_by_level(packed)) if is_known else None
    ends = None if counts is None else (counts[0] + counts[-1]) / math.prod(packed.shape)
    return LayerReport(
        layer=layer.name or "(the model)",
        aliases=layer.aliases,
        scheme=str(form_of(module)),
        method=module.method,
        shape=packed.shape,
        bits_per_weight=module.bits_per_weight,
        nbytes=module.footprint,
        sqnr=errors.sqnr,
        largest_error=errors.largest,
        mean_error=errors.mean,
        saturated=ends,
        codes=counts,
        pages=pages_of(packed.packed_weights, maps),
        kernel=active_isa(),
    )


@dataclass(frozen=True)
class Errors:
    """How far a packed matrix is from a float one; None where that is not known.

    Attributes:
        sqnr: signal to noise in decibels.
        largest: of the errors, without sign.
        mean: of the errors, without sign.
        place: (row, column) of the largest.
    """

    sqnr: float | None = None
    largest: float | None = None
    mean: float | None = None
    place: tuple[int, int] | None = None


def errors_of(packed: PackedWeights, weight: torch.Tensor) -> Errors:
    """Errors of all weights, block by block of rows.

    Example:
        >>> from quantization import pack_matrix
        >>> found = errors_of(pack_matrix(torch.eye(8), "w8"), torch.eye(8))
        >>> found.largest < 0.005, found.place
        (True, (0, 0))
    """
    rows, cols = packed.shape
    signal = noise = size_of_errors = 0.0
    largest, place = -1.0, (0, 0)
    block = max(1, _NUMBERS // cols)
    for start in range(0, rows, block):
        stop = min(rows, start + block)
        decoded: Any = packed.rows(start, stop).dequantize("float32")
        exact = weight[start:stop].detach().to(decoded.device).float()
        signal += float(torch.linalg.vector_norm(exact, dtype=torch.float64)) ** 2
        errors = decoded.sub_(exact).abs_()
        noise += float(torch.linalg.vector_norm(errors, dtype=torch.float64)) ** 2
        size_of_errors += float(errors.sum(dtype=torch.float64))
        worst = float(errors.max())
        if worst > largest or math.isnan(worst):
            at = int(errors.argmax())
            largest, place = worst, (start + at // cols, at % cols)
    ratio = None
    if signal and not math.isnan(signal + noise):
        ratio = 10 * math.log10(signal / noise) if noise else math.inf
    return Errors(ratio, largest, size_of_errors / (rows * cols), place)
