"""The one door to the C kernels: torch tensors and ndarrays in, the same kind out.

This module allocates outputs and calls; it decides nothing about quantization. What it takes and
gives is told in :mod:`quantization.ops.tensors`, whose names are here too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from quantization import _kernels
from quantization._kernels import DataError
from quantization.ops import runtime  # noqa: F401  obeys QUANTIZATION_ISA before any kernel runs
from quantization.ops.dtypes import DType, name_of
from quantization.ops.tensors import (
    BITS,
    Array,
    SameKindT,
    Tensor,
    TensorT,
    as_tensor_like,
    cast,
    check_tensor,
    filled,
    is_meta,
    is_tensor,
    is_torch,
    to_array,
)

__all__ = [
    "Array",
    "DataError",
    "Grid",
    "Rule",
    "SameKindT",
    "Tensor",
    "TensorT",
    "as_tensor_like",
    "cast",
    "check_tensor",
    "choose_linear",
    "decode",
    "encode",
    "encode_levels",
    "filled",
    "fit_levels",
    "is_meta",
    "is_tensor",
    "is_torch",
    "linear",
    "measure",
    "pack",
    "pack_ternary",
    "quantize",
    "to_array",
    "unpack",
    "unpack_ternary",
]

SYMMETRIC, ASYMMETRIC, BINARY = _kernels.SYMMETRIC, _kernels.ASYMMETRIC, _kernels.BINARY


class Grid(NamedTuple):
    """A tensor seen as a matrix, cut into blocks (a last block may be smaller)."""

    rows: int
    cols: int
    block_rows: int
    block_cols: int

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks down and across: the shape of the scales."""
        return -(-self.rows // self.block_rows), -(-self.cols // self.block_cols)


class Rule(NamedTuple):
    """How numbers become codes: qk_spec in csrc/qk.h."""

    target: DType
    mode: int
    code_min: float
    code_max: float
    scale: DType
    keep_non_finite: bool = False

    def arguments(self, source: DType) -> tuple[int, int, int, int, float, float, int]:
        """The kernels' arguments for a source of that type."""
        return (
            _kernel_number(source),
            _kernel_number(self.target.storage),
            _kernel_number(self.scale),
            self.mode,
            float(self.code_min),
            float(self.code_max),
            int(self.keep_non_finite),
        )


def _empty(shape: tuple[int, ...], dtype: DType) -> Array:
    return np.empty(shape, BITS.get(dtype.storage, dtype.storage))


def _compute_type(source: DType) -> str:
    return "float64" if source.name == "float64" else "float32"


# ---- quantize --------------------------------------------------------------------------------


def quantize(
    source: TensorT, dtype: DType, grid: Grid, rule: Rule
) -> tuple[TensorT, TensorT, TensorT | None]:
    """Codes in the shape of ``source``, scales and zero points (or None) of shape ``grid.blocks``.

    Raises:
        DataError: with args (message, flat index) for a NaN, an infinity or a misplaced negative.
    """
    array = to_array(source)
    codes = _empty(array.shape, rule.target)
    scale, zero = _empty_grid(grid, dtype, rule.mode)
    numbers = (*grid, *rule.arguments(dtype))
    _kernels.quantize(codes, scale, zero, array, *numbers)
    scales, zeros = _grid_like(scale, zero, source)
    return as_tensor_like(codes, rule.target, source), scales, zeros


def measure(
    source: TensorT, dtype: DType, grid: Grid, rule: Rule
) -> tuple[TensorT, TensorT | None]:
    """Scales and zero points (or None) that :func:`quantize` would use."""
    array = to_array(source)
    scale, zero = _empty_grid(grid, dtype, rule.mode)
    numbers = (*grid, *rule.arguments(dtype))
    _kernels.measure(scale, zero, array, *numbers)
    return _grid_like(scale, zero, source)


def encode(
    source: TensorT, scale: Tensor, zero: Tensor | None, dtype: DType, grid: Grid, rule: Rule
) -> TensorT:
    """Codes of ``source`` under given scales and zero points, which hold one number a block."""
    array = to_array(source)
    codes = _empty(array.shape, rule.target)
    scales, zeros = _grid_arrays(scale, zero, dtype)
    numbers = (*grid, *rule.arguments(dtype))
    _kernels.encode(codes, array, scales, zeros, *numbers)
    return as_tensor_like(codes, rule.target, source)


def decode(
    codes: TensorT, scale: Tensor, zero: Tensor | None, code: DType, out: DType, grid: Grid
) -> TensorT:
    """``(codes - zero) * scale`` as type ``out``, in the shape of ``codes``."""
    array = to_array(codes, "codes")
    result = _empty(array.shape, out)
    scales, zeros = _grid_arrays(scale, zero, out)
    _kernels.decode(
        result, array, scales, zeros, *grid, _kernel_number(out), _kernel_number(code.storage)
    )
    return as_tensor_like(result, out, codes)


def _empty_grid(grid: Grid, source: DType, mode: int) -> tuple[Array, Array | None]:
    zero = np.empty(grid.blocks, "int32") if mode == ASYMMETRIC else None
    return np.empty(grid.blocks, _compute_type(source)), zero


def _grid_arrays(scale: Tensor, zero: Tensor | None, dtype: DType) -> tuple[Array, Array | None]:
    scales = to_array(cast(scale, _compute_type(dtype)), "scale")
    if zero is None:
        return scales, None
    return scales, to_array(zero, "zero_point").astype("int32", copy=False)


def _grid_like(scale: Array, zero: Array | None, like: TensorT) -> tuple[TensorT, TensorT | None]:
    zero_points = None if zero is None else as_tensor_like(zero, "int32", like)
    return as_tensor_like(scale, scale.dtype.name, like), zero_points


# ---- pack ------------------------------------------------------------------------------------


class Packed(NamedTuple):
    """Containers, and whether ``bits`` bits hold the codes as they are, or in two's complement."""

    containers: Array
    fits_unsigned: bool
    fits_signed: bool


def pack(codes: Array, bits: int, container: str, axis: int, straddle: bool) -> Packed:
    """Codes (uint8 or int8, [rows, cols]) packed along ``axis`` into containers of that dtype."""
    (rows, cols), size = codes.shape, np.dtype(container).itemsize
    shape = [rows, cols]
    shape[axis] = packed_length(shape[axis], bits, size, straddle)
    packed = np.empty(shape, container)
    fits = _kernels.pack(packed, codes, rows, cols, bits, size, axis, int(straddle))
    unsigned, signed = bool(fits & _kernels.FITS_UNSIGNED), bool(fits & _kernels.FITS_SIGNED)
    return Packed(packed, unsigned, signed)


def unpack(
    packed: Array, length: int, bits: int, axis: int, straddle: bool, is_signed: bool
) -> Array:
    """The codes that :func:`pack` packed, ``length`` of them along ``axis``; uint8 or int8."""
    shape = list(packed.shape)
    shape[axis] = length
    codes = np.empty(shape, "int8" if is_signed else "uint8")
    (rows, cols), size = shape, packed.dtype.itemsize
    _kernels.unpack(codes, packed, rows, cols, bits, size, axis, int(straddle), int(is_signed))
    return codes


def packed_length(length: int, bits: int, container_bytes: int, straddle: bool) -> int:
    """Containers that a stream of ``length`` codes fills."""
    width = 8 * container_bytes
    return -(-length * bits // width) if straddle else -(-length // (width // bits))


def pack_ternary(codes: Array) -> Array:
    """Codes 0, 1, 2 (uint8, [rows, cols]), five to a byte: uint8 [rows, ceil(cols / 5)]."""
    rows, cols = codes.shape
    packed = np.empty((rows, -(-cols // 5)), "uint8")
    _kernels.pack_ternary(packed, codes, rows, cols)
    return packed


def unpack_ternary(packed: Array, cols: int) -> Array:
    """The codes that :func:`pack_ternary` packed: uint8 [rows, cols]."""
    codes = np.empty((packed.shape[0], cols), "uint8")
    _kernels.unpack_ternary(codes, packed, packed.shape[0], cols)
    return codes


# ---- codebooks -------------------------------------------------------------------------------


def fit_levels(values: Array, weights: Array | None, count: int) -> Array:
    """``count`` ascending levels of least squared error for each row of sorted float64 values."""
    rows, numbers = values.shape
    levels = np.empty((rows, count))
    _kernels.fit_levels(levels, values, weights, rows, numbers, count)
    return levels


def encode_levels(x: Array, scales: Array, codebook: Array, group: int) -> Array:
    """Codes of the nearest levels: uint8 in the shape of ``x``; all three are float32 matrices."""
    (rows, cols), (codebooks, levels) = x.shape, codebook.shape
    codes = np.empty(x.shape, "uint8")
    _kernels.encode_levels(codes, x, scales, codebook, rows, cols, group, codebooks, levels)
    return codes


# ---- fit -------------------------------------------------------------------------------------


class Fit(NamedTuple):
    """What :func:`fit_groups` looks for; ``qk_fit`` in csrc/qk.h says what each number is."""

    find: int  # NOTHING, SCALE, ZERO or BOTH
    codes: tuple[float, float]  # the smallest and the largest code, or level
    starts: int = 0
    rounds: int = 0
    shrink: float = 0.0
    least_scale: float = 2.0**-126  # or -inf: scales may have a sign
    zeros: tuple[float, float] = (-np.inf, np.inf)
    zero_step: float = 0.0  # 0: zeros are any numbers
    levels: Array | None = None  # float32 [codebooks, levels], ascending


NOTHING, SCALE = _kernels.FIT_NOTHING, _kernels.FIT_SCALE
ZERO, BOTH = _kernels.FIT_ZERO, _kernels.FIT_BOTH


class Fitted(NamedTuple):
    """Of each group: scale, zero point (None: 0) and weighted squared error, float32."""

    scales: Array
    zeros: Array | None
    errors: Array


def fit_groups(
    x: Array, importance: Array, group: int, scales: Array, zeros: Array | None, fit: Fit
) -> Fitted:
    """Scales and zeros of less error than those given, or these; all float32, ``x`` a matrix."""
    (rows, cols), levels = x.shape, fit.levels
    made = Fitted(scales.copy(), None if zeros is None else zeros.copy(), np.empty_like(scales))
    codebooks, count = (1, 0) if levels is None else levels.shape
    _kernels.fit_groups(
        *made, x, importance, levels, rows, cols, group, codebooks, count, fit.starts, fit.rounds,
        fit.find, fit.shrink, *fit.codes, fit.least_scale, *fit.zeros, fit.zero_step,
    )  # fmt: skip
    return made


class Levels(NamedTuple):
    """What weights are before scale and zero: whole numbers of a range, or levels of a table."""

    bounds: tuple[float, float]
    table: Array | None = None  # float32 [1 or rows, levels], ascending

    def numbers(self) -> tuple[Any, ...]:
        """As the kernels take them."""
        shape = (1, 0) if self.table is None else self.table.shape
        return self.table, *shape, *self.bounds


def round_in_order(
    x: Array, factor: Array, places: Array, scales: Array, zeros: Array | None, levels: Levels
) -> Array:
    """Levels of columns rounded one after the other; ``qk_round_in_order``. ``x`` is used up."""
    values = np.empty_like(x)
    (rows, cols), groups = x.shape, scales.shape[1]
    given = values, x, factor, places, scales, zeros
    _kernels.round_in_order(*given, rows, cols, groups, *levels.numbers())
    return values


def descend(
    values: Array,
    slopes: Array,
    scales: Array,
    zeros: Array | None,
    hessian: Array,
    steps: Array | None,
    group: int,
    levels: Levels,
    fit: Fit,
    dtypes: tuple[str, str],
    sweeps: int,
    refits: bool,
) -> None:
    """Coordinate descent over levels, scales and zeros, in place; ``qk_descend``.

    ``fit`` says which scales and zeros there are, ``dtypes`` which types they are rounded to.
    """
    kinds = (_kernel_number(dtype) for dtype in dtypes)
    _kernels.descend(
        values, slopes, scales, zeros, hessian, steps, *values.shape, group, *levels.numbers(),
        *kinds, fit.least_scale, *fit.zeros, fit.zero_step, sweeps, int(refits),
    )  # fmt: skip


# ---- linear ----------------------------------------------------------------------------------


def linear(x: Array, weights: Array, scales: Array, bias: Array | None = None) -> Array:
    """``x @ (weights * scales[:, None]).T + bias`` in one native call; shapes are the caller's.

    Of arrays alone: tensors have :func:`quantization.ops.torch_ops.linear`.
    """
    dtype = name_of(x.dtype)
    activations, codes = to_array(x), to_array(weights)
    out_features, in_features = codes.shape
    y = np.empty((*x.shape[:-1], out_features), activations.dtype)
    _kernels.linear(
        y,
        activations,
        codes,
        to_array(scales),
        None if bias is None else to_array(bias),
        int(np.prod(x.shape[:-1], dtype=np.int64)),
        out_features,
        in_features,
        _kernel_number(dtype),
        _kernel_number(dtype),
        _kernel_number(scales.dtype),
        _kernel_number(scales.dtype if bias is None else bias.dtype),
    )
    return as_tensor_like(y, dtype, x)


def choose_linear(
    tokens: int,
    out_features: int,
    in_features: int,
    dtype: DType,
    packed: tuple[int, int, int, int] = (8, 0, 0, 0),
) -> tuple[str, int, int, int, int, bool]:
    """How such a call would run: isa, tile tokens and features, chunk, threads, packed or not.

    ``packed``: bits, group, zeros (0: none, 1: packed, 2: floats) and whether there is a codebook;
    a group of 0: int8 rows.
    """
    number = _kernel_number(dtype)
    return _kernels.choose_linear(tokens, out_features, in_features, number, *packed)


def _kernel_number(dtype: Any) -> int:
    number: int = getattr(_kernels, name_of(dtype).upper())
    return number
