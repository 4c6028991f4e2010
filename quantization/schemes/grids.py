"""From a matrix to codes, grid by grid: measure scales, store them, code against what is stored.

Each grid is one function of a :class:`Matrix`. Scales come in the shape of its blocks, ``[rows or
1, groups or 1]``; all arithmetic on weights is float32, sums are float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from quantization.numerics.granularity import Granularity, PerDimension
from quantization.numerics.linear_quantization import quantize_linear
from quantization.numerics.parameters import Mode
from quantization.numerics.rules import data_error, rule_for
from quantization.ops import native
from quantization.ops.dtypes import SOURCES, DType, target_of
from quantization.ops.native import DataError, Grid, Rule, Tensor
from quantization.schemes.codebooks import E2M1, FP4, NF4, fit_codebook, fit_ternary
from quantization.schemes.scheme import Scheme
from quantization.schemes.stored_scales import (
    StoredScales,
    as_codes,
    as_exponents,
    as_fixed,
    as_floats,
    as_given,
    check_range,
)

__all__ = ["WEIGHED", "Coded", "Matrix", "encode_matrix", "integer_codes", "level_codes"]

#: Grids that weigh errors by importance.
WEIGHED = ("kmeans", "binary", "ternary")

_TABLES = {"nf4": NF4, "fp4": FP4, "mxfp4": E2M1}
_AT_ONCE = 1 << 20  # weights whose temporaries are in memory together
_SMALLEST = 2.0**-149  # float32 above 0


class Coded(NamedTuple):
    """Codes (uint8, or int8 where they are signed), their scales, and what else decodes them."""

    codes: Tensor
    scales: StoredScales
    zero_points: Tensor | None = None  # uint8 or floats, in the shape of the scales
    codebook: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix and how it is to be coded; of at least one weight for all but its shape."""

    weight: Tensor
    source: DType
    scheme: Scheme
    importance: np.ndarray | None  # float64 [cols]
    nonfinite: str
    name: str

    @cached_property
    def x(self) -> np.ndarray:
        """The weights as float32; 0 where they are not finite and to be marked."""
        x = native.to_array(native.cast(self.weight, "float32"), self.name)
        return np.nan_to_num(x, posinf=0, neginf=0) if self.nonfinite == "mark" else x

    @property
    def is_blank(self) -> bool:
        """Whether it has no numbers: it is empty, or on meta."""
        return native.is_meta(self.weight) or 0 in self.weight.shape

    @property
    def grid(self) -> Grid:
        """The blocks that share a scale."""
        return self.scheme.granularity.grid(tuple(self.weight.shape))

    @property
    def group(self) -> int:
        """Weights of a row that share a scale."""
        return self.scheme.group(self.weight.shape[1])

    @property
    def is_one_block(self) -> bool:
        """Whether all weights share one scale."""
        return self.scheme.granularity is Granularity.PerTensor

    def measure(self, rule: Rule) -> np.ndarray:
        """Scales of the blocks under a rule, as float64; NaN where a block is not finite."""
        try:
            scale, _ = native.measure(self.weight, self.source, self.grid, rule)
        except DataError as error:
            raise data_error(error, self.weight, rule.target, self.name) from None
        return native.to_array(scale).astype("float64")

    def rule(self, target: str, mode: int, largest: float) -> Rule:
        """A symmetric or binary rule over -largest..largest, its scales as they are measured."""
        exact = SOURCES["float64" if self.source.name == "float64" else "float32"]
        return Rule(target_of(target), mode, -largest, largest, exact, self.nonfinite == "mark")

    def mean_magnitudes(self) -> np.ndarray:
        """Of each block; 0 for a block of zeros and no other."""
        return self.measure(self.rule("int1", native.BINARY, 1))

    def largest_magnitudes(self) -> np.ndarray:
        """Of each block, 0 for a block of zeros."""
        largest = self.measure(self.rule("float32", native.SYMMETRIC, 1))
        check_range(largest)
        return np.where(self.mean_magnitudes() == 0, 0, largest)

    def store(self, scales: np.ndarray) -> StoredScales:
        """Scales as the scheme stores them."""
        if self.scheme.double_quant:
            return as_codes(scales, self.weight, self.scheme.steps_dtype)
        return as_floats(scales, self.scheme.scale_dtype or self.source.name, self.weight)

    def store_zeros(self, zeros: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Zero points as the scheme stores them (codes not packed yet), and as float32."""
        if self.scheme.has_integer_zeros:
            codes = np.clip(np.rint(np.nan_to_num(zeros)), 0, (1 << self.scheme.bits) - 1)
            whole = native.as_tensor_like(codes.astype("uint8"), "uint8", self.weight)
            return whole, codes.astype("float32")
        if self.scheme.zero_point == "fixed":
            return as_fixed(zeros, self.scheme.bits, self.weight)
        return self.as_layer(zeros)

    def as_layer(self, numbers: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Numbers rounded to the type of the weights: as a tensor to store, and as float32."""
        wide = native.as_tensor_like(numbers.astype("float32"), "float32", self.weight)
        stored = native.cast(wide, self.source.name)
        return stored, native.to_array(native.cast(stored, "float32"))

    def chunks(self) -> Iterator[slice]:
        """Some whole rows at a time; all at once where they share one scale."""
        rows, cols = self.weight.shape
        step = rows if self.is_one_block else max(_AT_ONCE // cols, 1)
        for start in range(0, rows, step):
            yield slice(start, start + step)

    def blocks(self, rows: slice) -> np.ndarray:
        """Weights of a chunk by block, ``[..., blocks, length]``; zeros fill up a last block."""
        part = self.x[rows]
        return part.reshape(1, 1, -1) if self.is_one_block else _cut(part, self.group)

    def per_weight(self, values: np.ndarray, rows: slice) -> np.ndarray:
        """One value for each weight of a chunk, or what broadcasts to it, from one a block."""
        if values.shape[1] == 1:
            return values if self.is_one_block else values[rows]
        return np.repeat(values[rows], self.group, axis=1)[:, : self.weight.shape[1]]


def encode_matrix(matrix: Matrix) -> Coded:
    """The codes of a matrix under its scheme.

    Raises:
        ValueError: for a NaN or infinity that is not to be marked, or a scale beyond its type.
    """
    return _ENCODERS[matrix.scheme.grid](matrix)


# ---- integers ----------------------------------------------------------------------------------


def _integers(matrix: Matrix) -> Coded:
    scheme = matrix.scheme
    if not scheme.double_quant and scheme.zero_point == "integer":
        return _plain_integers(matrix)
    scales = matrix.measure(_integer_rule(matrix))
    check_range(scales)
    if scheme.double_quant:  # a block of zeros would have the scale 1, far above the others
        scales = np.where(matrix.mean_magnitudes() == 0, 0, scales)
    stored = matrix.store(scales)
    if scheme.mode is Mode.Symmetric:
        return Coded(integer_codes(matrix, stored.restored, None), stored)
    zero_points, zeros = matrix.store_zeros(_exact_zero_points(matrix, stored.restored))
    return Coded(integer_codes(matrix, stored.restored, zeros), stored, zero_points)


def _integer_rule(matrix: Matrix) -> Rule:
    scheme = matrix.scheme
    code = f"{'int' if scheme.mode is Mode.Symmetric else 'uint'}{scheme.bits}"
    scale_dtype = "float32" if scheme.double_quant else scheme.scale_dtype or matrix.source
    narrow = _is_narrow(scheme)
    return rule_for(matrix.source, code, scheme.mode, narrow, scale_dtype, matrix.nonfinite)


def _is_narrow(scheme: Scheme) -> bool | None:
    """Symmetric codes use the full range of their width, but for 8 bits, as in the int8 layer."""
    return scheme.bits == 8 if scheme.mode is Mode.Symmetric else None


def _plain_integers(matrix: Matrix) -> Coded:
    """What quantize_linear makes, in one pass over the weights."""
    scheme, blocks = matrix.scheme, matrix.grid.blocks
    codes, params = quantize_linear(
        matrix.weight,
        f"{'int' if scheme.mode is Mode.Symmetric else 'uint'}{scheme.bits}",
        scheme.granularity,
        scheme.mode,
        narrow_range=_is_narrow(scheme),
        scale_dtype=scheme.scale_dtype or matrix.source,
        nonfinite=matrix.nonfinite,
        name=matrix.name,
    )
    stored = as_given(params.scale.reshape(blocks))
    if scheme.mode is Mode.Symmetric:
        return Coded(codes, stored)
    return Coded(codes, stored, native.cast(params.zero_point.reshape(blocks), "uint8"))


def integer_codes(matrix: Matrix, scales: np.ndarray, zeros: np.ndarray | None) -> Tensor:
    """The nearest codes of the grid ``integer`` under scales and zero points, float32 by block.

    ``rint(x / scale) + zero``; with zero points between codes ``rint(x / scale + zero)``.
    """
    like = matrix.weight
    if matrix.scheme.mode is Mode.Symmetric or matrix.scheme.has_integer_zeros:
        zero = (
            None if zeros is None else native.as_tensor_like(zeros.astype("uint8"), "uint8", like)
        )
        given = native.as_tensor_like(scales, "float32", like)
        rule = _integer_rule(matrix)
        return native.encode(like, given, zero, matrix.source, matrix.grid, rule)
    assert zeros is not None
    scales = np.where(scales > 0, scales, np.float32(1))  # 0 and NaN
    codes = np.empty(matrix.x.shape, "uint8")
    top = (1 << matrix.scheme.bits) - 1
    for rows in matrix.chunks():
        place = matrix.x[rows] / matrix.per_weight(scales, rows)
        place += matrix.per_weight(zeros, rows)
        codes[rows] = np.rint(place, out=place).clip(0, top, out=place)
    return native.as_tensor_like(codes, "uint8", like)


def _exact_zero_points(matrix: Matrix, scales: np.ndarray) -> np.ndarray:
    """``-low / scale``, before any rounding, with ``low`` the least weight of a block, or 0."""
    low = np.empty(scales.shape, "float32")
    for rows in matrix.chunks():
        low[rows] = np.minimum(matrix.blocks(rows).min(axis=-1), 0)
    quotients: np.ndarray = np.divide(-low, scales, out=np.zeros_like(low), where=scales > 0)
    return quotients


# ---- tables and fitted levels ------------------------------------------------------------------


def _table(matrix: Matrix) -> Coded:
    largest = matrix.largest_magnitudes()
    is_mx = matrix.scheme.grid == "mxfp4"
    levels = np.array([matrix.scheme.levels or _TABLES[matrix.scheme.grid]])
    if is_mx:
        return _nearest(matrix, as_exponents(largest, matrix.weight), levels)
    return _nearest(matrix, matrix.store(largest / np.abs(levels).max()), levels)


def _nearest(matrix: Matrix, stored: StoredScales, levels: np.ndarray) -> Coded:
    """The codes of the nearest levels, which are first rounded to the type of the weights."""
    codebook, rounded = matrix.as_layer(levels)
    return Coded(level_codes(matrix, stored.restored, rounded), stored, codebook=codebook)


def level_codes(matrix: Matrix, scales: np.ndarray, levels: np.ndarray) -> Tensor:
    """The codes of the nearest levels, float32 ``[1 or rows, levels]``, under scales by block."""
    if matrix.is_one_block:
        scales = np.repeat(scales, matrix.x.shape[0], axis=0)
    codes = native.encode_levels(matrix.x, scales, levels, matrix.group)
    return native.as_tensor_like(codes, "uint8", matrix.weight)


def _kmeans(matrix: Matrix) -> Coded:
    """Levels are fitted to ``x / scale``, in -1..1; the error of a level counts times its scale."""
    stored, bits = matrix.store(matrix.largest_magnitudes()), matrix.scheme.bits
    scales = np.where(stored.restored > 0, stored.restored, np.float32(np.inf))  # x / inf = 0
    shares = (matrix.x[rows] / matrix.per_weight(scales, rows) for rows in matrix.chunks())
    if isinstance(matrix.scheme.granularity, PerDimension):
        fitted = [fit_codebook(some, bits, matrix.importance) for some in shares]
        return _nearest(matrix, stored, np.concatenate(fitted))
    weights = matrix.importance
    if not matrix.is_one_block:
        weights = _error_weights(matrix, stored.restored)
    elif weights is not None:
        weights = np.tile(weights, matrix.x.shape[0])
    levels = fit_codebook(np.concatenate(list(shares)).reshape(1, -1), bits, weights)
    return _nearest(matrix, stored, levels)


def _error_weights(matrix: Matrix, scales: np.ndarray) -> np.ndarray:
    """Square of each weight's scale (in units of the largest), times its importance."""
    known = np.where(scales > 0, scales, 0)
    squares = np.square(known / max(float(known.max()), _SMALLEST))
    weights = np.empty(matrix.x.shape, "float32")
    for rows in matrix.chunks():
        weights[rows] = matrix.per_weight(squares, rows)
    if matrix.importance is not None and matrix.importance.any():
        weights *= (matrix.importance / matrix.importance.max()).astype("float32")
    return weights.reshape(-1)


# ---- one scale and signs -----------------------------------------------------------------------


def _binary(matrix: Matrix) -> Coded:
    scales = matrix.mean_magnitudes()
    check_range(scales)
    if matrix.importance is not None:
        weights = _block_weights(matrix)
        for rows in matrix.chunks():
            moment = (np.abs(matrix.blocks(rows)) * weights).sum(axis=-1)
            mean = moment / weights.sum(axis=-1)
            scales[rows] = np.where(np.isnan(scales[rows]), np.nan, mean)
    codes = (matrix.x >= 0).view("uint8")
    codebook, _ = matrix.as_layer(np.array([[-1.0, 1.0]]))
    return Coded(
        native.as_tensor_like(codes, "uint8", matrix.weight),
        matrix.store(scales),
        codebook=codebook,
    )


def _ternary(matrix: Matrix) -> Coded:
    marked = np.isnan(matrix.largest_magnitudes())
    weights = None if matrix.importance is None else _block_weights(matrix)
    scales = np.empty(marked.shape)
    for rows in matrix.chunks():
        scales[rows] = fit_ternary(np.abs(matrix.blocks(rows)), weights)
    stored = matrix.store(np.where(marked, np.nan, scales))
    codes = np.empty(matrix.x.shape, "int8")
    for rows in matrix.chunks():
        part, half = matrix.x[rows], matrix.per_weight(stored.restored, rows) / 2
        codes[rows] = (part > half).view("int8") - (part < -half).view("int8")
    return Coded(native.as_tensor_like(codes, "int8", matrix.weight), stored)


def _block_weights(matrix: Matrix) -> np.ndarray:
    """Importance by block, ``[blocks, length]``; where a block has none, all its weights count."""
    importance: np.ndarray = np.asarray(matrix.importance)
    if matrix.is_one_block:
        importance = np.tile(importance, matrix.x.shape[0])
        return (importance if importance.any() else np.ones_like(importance))[None]
    given = _cut(importance[None], matrix.group)[0]
    equal = _cut(np.ones_like(importance)[None], matrix.group)[0]
    weights: np.ndarray = np.where(given.any(axis=-1, keepdims=True), given, equal)
    return weights


def _cut(matrix: np.ndarray, group: int) -> np.ndarray:
    """Rows in groups, ``[rows, groups, group]``; zeros fill up the last one."""
    rows, cols = matrix.shape
    groups = -(-cols // group)
    if groups * group != cols:
        matrix = np.pad(matrix, ((0, 0), (0, groups * group - cols)))
    return matrix.reshape(rows, groups, group)


_ENCODERS = {
    "integer": _integers,
    "nf4": _table,
    "fp4": _table,
    "mxfp4": _table,
    "table": _table,
    "kmeans": _kmeans,
    "binary": _binary,
    "ternary": _ternary,
}
