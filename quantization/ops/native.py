"""The one door to the C kernels: torch tensors and ndarrays in, the same kind out.

This module converts, allocates outputs and calls; it decides nothing about quantization. Types
that NumPy lacks travel as their bits (bfloat16 as int16, float8 as uint8). Torch is never imported
here: a torch tensor can only come from a program that has imported it.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from quantization import _kernels
from quantization._kernels import DataError
from quantization.ops import runtime  # noqa: F401  obeys QUANTIZATION_ISA before any kernel runs
from quantization.ops.dtypes import DType, name_of

#: A torch.Tensor or a numpy.ndarray.
Tensor: TypeAlias = Any

__all__ = [
    "DataError",
    "Grid",
    "Rule",
    "Tensor",
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

_BITS = {"bfloat16": "int16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}


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

    def arguments(self, source: DType) -> tuple[Any, ...]:
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


# ---- tensors and arrays ----------------------------------------------------------------------


def is_torch(value: Any) -> bool:
    """Whether ``value`` is a torch tensor."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def is_tensor(value: Any) -> bool:
    """Whether ``value`` is a torch tensor or a plain ndarray."""
    return is_torch(value) or isinstance(value, np.ndarray)


def is_meta(value: Any) -> bool:
    """Whether ``value`` is a torch tensor with a shape but no numbers."""
    return is_torch(value) and value.is_meta


def check_tensor(value: Any, what: str) -> None:
    """Raise TypeError unless ``value`` is a torch tensor with one shape or an ndarray."""
    if not is_tensor(value):
        raise TypeError(
            f"{what} must be a torch.Tensor or numpy.ndarray, not {type(value).__name__}"
        )
    if is_torch(value) and value.is_nested:
        raise TypeError(f"{what} is a nested tensor: pass its parts, from unbind(), one by one")


def to_array(tensor: Tensor, what: str = "tensor") -> np.ndarray:
    """The tensor's numbers as a C-contiguous ndarray in native byte order, copied only if need be.

    Raises:
        TypeError: if ``tensor`` is neither a torch tensor nor an ndarray, or is a masked array.
        ValueError: if it has no numbers (a meta tensor) or is not dense.
    """
    if is_torch(tensor):
        return _torch_to_array(tensor, what)
    if not isinstance(tensor, np.ndarray) or isinstance(tensor, np.ma.MaskedArray):
        raise TypeError(
            f"{what} must be a torch.Tensor or numpy.ndarray, not {type(tensor).__name__}"
        )
    array = np.asarray(tensor)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    bits = _BITS.get(array.dtype.name)
    array = np.array(array, order="C", copy=None)
    return array if bits is None else array.view(bits)


def _torch_to_array(tensor: Tensor, what: str) -> np.ndarray:
    torch = sys.modules["torch"]
    if tensor.is_meta:
        raise ValueError(f"{what} is on the meta device: it has a shape but no numbers")
    if tensor.layout is not torch.strided:
        raise ValueError(f"{what} has layout {tensor.layout}; only dense (strided) tensors will do")
    dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    bits = _BITS.get(name_of(dense.dtype))
    return (dense if bits is None else dense.view(getattr(torch, bits))).numpy()


def as_tensor_like(array: np.ndarray, dtype: DType | str, like: Tensor) -> Tensor:
    """``array`` (bits, where NumPy lacks the type) as a tensor of the kind and device of ``like``.

    Raises:
        TypeError: for an ndarray of a type that NumPy lacks, unless ml_dtypes is installed.
    """
    name = dtype if isinstance(dtype, str) else dtype.storage
    if is_torch(like):
        torch = sys.modules["torch"]
        tensor = torch.from_numpy(array)
        tensor = tensor.view(getattr(torch, name)) if name in _BITS else tensor
        return tensor.to(like.device)
    return array.view(_numpy_dtype(name)) if name in _BITS else array


def filled(shape: tuple[int, ...], value: int, dtype: str, like: Tensor) -> Tensor:
    """A tensor of one value, of the kind and device (also meta) of ``like``."""
    if value == 0 and not is_meta(like):  # memory that is not touched before it is read
        return as_tensor_like(np.zeros(shape, _BITS.get(dtype, dtype)), dtype, like)
    if is_torch(like):
        return like.new_full(shape, value, dtype=getattr(sys.modules["torch"], dtype))
    return np.full(shape, value, _numpy_dtype(dtype))


def cast(tensor: Tensor, dtype: str) -> Tensor:
    """The same numbers as type ``dtype``, rounded to nearest even."""
    if is_torch(tensor):
        return tensor.to(getattr(sys.modules["torch"], dtype))
    return tensor.astype(_numpy_dtype(dtype), copy=False)


def _numpy_dtype(name: str) -> Any:
    if name not in _BITS:
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError:
        raise TypeError(
            f"NumPy has no {name}: install ml_dtypes, or pass a torch tensor instead"
        ) from None
    return getattr(ml_dtypes, name)


def _empty(shape: tuple[int, ...], dtype: DType) -> np.ndarray:
    return np.empty(shape, _BITS.get(dtype.storage, dtype.storage))


def _compute_type(source: DType) -> str:
    return "float64" if source.name == "float64" else "float32"


# ---- quantize --------------------------------------------------------------------------------


def quantize(
    source: Tensor, dtype: DType, grid: Grid, rule: Rule
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes in the shape of ``source``, scales and zero points (or None) of shape ``grid.blocks``.

    Raises:
        DataError: with args (message, flat index) for a NaN, an infinity or a misplaced negative.
    """
    array = to_array(source)
    codes = _empty(array.shape, rule.target)
    scale, zero = _empty_grid(grid, dtype, rule.mode)
    _kernels.quantize(codes, scale, zero, array, *grid, *rule.arguments(dtype))
    return as_tensor_like(codes, rule.target, source), *_grid_like(scale, zero, source)


def measure(source: Tensor, dtype: DType, grid: Grid, rule: Rule) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points (or None) that :func:`quantize` would use."""
    array = to_array(source)
    scale, zero = _empty_grid(grid, dtype, rule.mode)
    _kernels.measure(scale, zero, array, *grid, *rule.arguments(dtype))
    return _grid_like(scale, zero, source)


def encode(
    source: Tensor, scale: Tensor, zero: Tensor | None, dtype: DType, grid: Grid, rule: Rule
) -> Tensor:
    """Codes of ``source`` under given scales and zero points, which hold one number a block."""
    array = to_array(source)
    codes = _empty(array.shape, rule.target)
    scale = to_array(cast(scale, _compute_type(dtype)), "scale")
    zero = None if zero is None else to_array(zero, "zero_point").astype("int32", copy=False)
    _kernels.encode(codes, array, scale, zero, *grid, *rule.arguments(dtype))
    return as_tensor_like(codes, rule.target, source)


def decode(
    codes: Tensor, scale: Tensor, zero: Tensor | None, code: DType, out: DType, grid: Grid
) -> Tensor:
    """``(codes - zero) * scale`` as type ``out``, in the shape of ``codes``."""
    array = to_array(codes, "codes")
    result = _empty(array.shape, out)
    scale = to_array(cast(scale, _compute_type(out)), "scale")
    zero = None if zero is None else to_array(zero, "zero_point").astype("int32", copy=False)
    _kernels.decode(
        result, array, scale, zero, *grid, _kernel_number(out), _kernel_number(code.storage)
    )
    return as_tensor_like(result, out, codes)


def _empty_grid(grid: Grid, source: DType, mode: int) -> tuple[np.ndarray, np.ndarray | None]:
    zero = np.empty(grid.blocks, "int32") if mode == ASYMMETRIC else None
    return np.empty(grid.blocks, _compute_type(source)), zero


def _grid_like(
    scale: np.ndarray, zero: np.ndarray | None, like: Tensor
) -> tuple[Tensor, Tensor | None]:
    zero = zero if zero is None else as_tensor_like(zero, "int32", like)
    return as_tensor_like(scale, scale.dtype.name, like), zero


# ---- pack ------------------------------------------------------------------------------------


class Packed(NamedTuple):
    """Containers, and whether ``bits`` bits hold the codes as they are, or in two's complement."""

    containers: np.ndarray
    fits_unsigned: bool
    fits_signed: bool


def pack(codes: np.ndarray, bits: int, container: str, axis: int, straddle: bool) -> Packed:
    """Codes (uint8 or int8, [rows, cols]) packed along ``axis`` into containers of that dtype."""
    length, size = codes.shape[axis], np.dtype(container).itemsize
    shape = list(codes.shape)
    shape[axis] = packed_length(length, bits, size, straddle)
    packed = np.empty(shape, container)
    fits = _kernels.pack(packed, codes, *codes.shape, bits, size, axis, int(straddle))
    unsigned, signed = bool(fits & _kernels.FITS_UNSIGNED), bool(fits & _kernels.FITS_SIGNED)
    return Packed(packed, unsigned, signed)


def unpack(
    packed: np.ndarray, length: int, bits: int, axis: int, straddle: bool, is_signed: bool
) -> np.ndarray:
    """The codes that :func:`pack` packed, ``length`` of them along ``axis``; uint8 or int8."""
    shape = list(packed.shape)
    shape[axis] = length
    codes = np.empty(shape, "int8" if is_signed else "uint8")
    size = packed.dtype.itemsize
    _kernels.unpack(codes, packed, *shape, bits, size, axis, int(straddle), int(is_signed))
    return codes


def packed_length(length: int, bits: int, container_bytes: int, straddle: bool) -> int:
    """Containers that a stream of ``length`` codes fills."""
    width = 8 * container_bytes
    return -(-length * bits // width) if straddle else -(-length // (width // bits))


def pack_ternary(codes: np.ndarray) -> np.ndarray:
    """Codes 0, 1, 2 (uint8, [rows, cols]), five to a byte: uint8 [rows, ceil(cols / 5)]."""
    rows, cols = codes.shape
    packed = np.empty((rows, -(-cols // 5)), "uint8")
    _kernels.pack_ternary(packed, codes, rows, cols)
    return packed


def unpack_ternary(packed: np.ndarray, cols: int) -> np.ndarray:
    """The codes that :func:`pack_ternary` packed: uint8 [rows, cols]."""
    codes = np.empty((packed.shape[0], cols), "uint8")
    _kernels.unpack_ternary(codes, packed, packed.shape[0], cols)
    return codes


# ---- codebooks -------------------------------------------------------------------------------


def fit_levels(values: np.ndarray, weights: np.ndarray | None, count: int) -> np.ndarray:
    """``count`` ascending levels of least squared error for each row of sorted float64 values."""
    levels = np.empty((values.shape[0], count))
    _kernels.fit_levels(levels, values, weights, *values.shape, count)
    return levels


def encode_levels(
    x: np.ndarray, scales: np.ndarray, codebook: np.ndarray, group: int
) -> np.ndarray:
    """Codes of the nearest levels: uint8 in the shape of ``x``; all three are float32 matrices."""
    codes = np.empty(x.shape, "uint8")
    _kernels.encode_levels(codes, x, scales, codebook, *x.shape, group, *codebook.shape)
    return codes


# ---- linear ----------------------------------------------------------------------------------


def linear(x: Tensor, weights: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ (weights * scales[:, None]).T + bias`` in one native call; shapes are the caller's."""
    dtype = name_of(x.dtype)
    arrays = [to_array(value) for value in (x, weights, scales)]
    out_features, in_features = arrays[1].shape
    y = np.empty((*x.shape[:-1], out_features), arrays[0].dtype)
    tokens = int(np.prod(x.shape[:-1], dtype=np.int64))
    kernel = _kernel_number
    _kernels.linear(
        y,
        *arrays,
        None if bias is None else to_array(bias),
        tokens,
        out_features,
        in_features,
        kernel(dtype),
        kernel(dtype),
        kernel(scales.dtype),
        kernel(scales.dtype if bias is None else bias.dtype),
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
    return getattr(_kernels, name_of(dtype).upper())
