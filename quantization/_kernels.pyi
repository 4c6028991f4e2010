"""The C kernels, as csrc/binding*.c takes their arguments: by place, for C gives them no names."""

from typing import Any, TypeAlias

import numpy as np

_Array: TypeAlias = np.ndarray[Any, Any]
_Optional: TypeAlias = _Array | None

#: rows, cols, block_rows, block_cols
_Grid: TypeAlias = tuple[int, int, int, int]
#: source_dtype, code_dtype, scale_dtype, mode, code_min, code_max, keep_non_finite
_Rule: TypeAlias = tuple[int, int, int, int, float, float, int]
#: rows, cols, bits, container_bytes, axis, straddle
_Packing: TypeAlias = tuple[int, int, int, int, int, int]
#: tokens, out_features, in_features
_Sizes: TypeAlias = tuple[int, int, int]
#: codes, scales, scale_steps, zero_points, codebook
_Packed: TypeAlias = tuple[_Array, _Array, _Optional, _Optional, _Optional]
#: bits, group, codebook_rows
_Groups: TypeAlias = tuple[int, int, int]
#: of the result, the rows and the scales
_Dtypes: TypeAlias = tuple[int, int, int]
#: the same, and of scale_steps, zero_points and codebook
_PackedDtypes: TypeAlias = tuple[int, int, int, int, int, int]

FLOAT32: int
FLOAT64: int
FLOAT16: int
BFLOAT16: int
FLOAT8_E4M3FN: int
FLOAT8_E5M2: int
INT8: int
UINT8: int
INT16: int
SYMMETRIC: int
ASYMMETRIC: int
FITS_UNSIGNED: int
FITS_SIGNED: int
BINARY: int
FIT_NOTHING: int
FIT_SCALE: int
FIT_ZERO: int
FIT_BOTH: int

class DataError(ValueError): ...

# codes, scale, zero, source
def quantize(*_: *tuple[_Array, _Array, _Optional, _Array, *_Grid, *_Rule]) -> None: ...

# scale, zero, source
def measure(*_: *tuple[_Array, _Optional, _Array, *_Grid, *_Rule]) -> None: ...

# codes, source, scale, zero
def encode(*_: *tuple[_Array, _Array, _Array, _Optional, *_Grid, *_Rule]) -> None: ...

# out, codes, scale, zero; ...; out_dtype, code_dtype
def decode(*_: *tuple[_Array, _Array, _Array, _Optional, *_Grid, int, int]) -> None: ...

# packed, codes; returns FITS_UNSIGNED | FITS_SIGNED, what holds of them
def pack(*_: *tuple[_Array, _Array, *_Packing]) -> int: ...

# codes, packed; ...; is_signed
def unpack(*_: *tuple[_Array, _Array, *_Packing, int]) -> None: ...
def pack_ternary(packed: _Array, codes: _Array, rows: int, cols: int, /) -> None: ...
def unpack_ternary(codes: _Array, packed: _Array, rows: int, cols: int, /) -> None: ...

# levels, values, weights; rows, count, level_count
def fit_levels(*_: *tuple[_Array, _Array, _Optional, int, int, int]) -> None: ...

# codes, x, scales, codebook; rows, cols, group, codebooks, levels
def encode_levels(*_: *tuple[_Array, _Array, _Array, _Array, int, int, int, int, int]) -> None: ...

# scales, zeros, errors, x, importance, levels; rows, cols, group, codebooks, level_count, starts,
# rounds, find; shrink, code_min, code_max, scale_min, zero_min, zero_max, zero_step
def fit_groups(
    *_: *tuple[
        _Array,
        _Optional,
        _Optional,
        _Array,
        _Array,
        _Optional,
        int,
        int,
        int,
        int,
        int,
        int,
        int,
        int,
        float,
        float,
        float,
        float,
        float,
        float,
        float,
    ],
) -> None: ...

# values, slopes, scales, zeros, hessian, steps; rows, cols, group; levels, codebooks, level_count,
# code_min, code_max; scale_dtype, zero_dtype; scale_min, zero_min, zero_max, zero_step; sweeps,
# refits
def descend(*_: Any) -> None: ...

# values, x, factor, places, scales, zeros; rows, cols, groups; the levels as above
def round_in_order(*_: Any) -> None: ...

# y, x, weights, scales, bias; ...; bias_dtype
def linear(
    *_: *tuple[_Array, _Array, _Array, _Array, _Optional, *_Sizes, *_Dtypes, int],
) -> None: ...

# grad_x, grad_y, weights, scales
def linear_backward(*_: *tuple[_Array, _Array, _Array, _Array, *_Sizes, *_Dtypes]) -> None: ...

# y, x, the weight, bias; ...; bias_dtype
def linear_packed(
    *_: *tuple[_Array, _Array, *_Packed, _Optional, *_Sizes, *_Groups, *_PackedDtypes, int],
) -> None: ...

# grad_x, grad_y, the weight
def linear_packed_backward(
    *_: *tuple[_Array, _Array, *_Packed, *_Sizes, *_Groups, *_PackedDtypes],
) -> None: ...

# sizes; x_dtype, bits, group, zeros, has_codebook; see native.choose_linear for what it returns
def choose_linear(
    *_: *tuple[*_Sizes, int, int, int, int, int],
) -> tuple[str, int, int, int, int, bool]: ...
def isas() -> tuple[str, ...]: ...
def active_isa() -> str: ...
def set_isa(name: str, /) -> None: ...
def get_num_threads() -> int: ...
def set_num_threads(threads: int, /) -> None: ...
def raise_heard() -> None: ...
def register_torch(libtorch_cpu: str, /) -> bool: ...
