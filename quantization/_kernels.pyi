from typing import Any

import numpy as np

_Array = np.ndarray[Any, Any]

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

class DataError(ValueError): ...

def quantize(
    codes: _Array,
    scale: _Array,
    zero: _Array | None,
    source: _Array,
    rows: int,
    cols: int,
    block_rows: int,
    block_cols: int,
    source_dtype: int,
    code_dtype: int,
    scale_dtype: int,
    mode: int,
    code_min: float,
    code_max: float,
    keep_non_finite: int,
    /,
) -> None: ...
def measure(
    scale: _Array,
    zero: _Array | None,
    source: _Array,
    rows: int,
    cols: int,
    block_rows: int,
    block_cols: int,
    source_dtype: int,
    code_dtype: int,
    scale_dtype: int,
    mode: int,
    code_min: float,
    code_max: float,
    keep_non_finite: int,
    /,
) -> None: ...
def encode(
    codes: _Array,
    source: _Array,
    scale: _Array,
    zero: _Array | None,
    rows: int,
    cols: int,
    block_rows: int,
    block_cols: int,
    source_dtype: int,
    code_dtype: int,
    scale_dtype: int,
    mode: int,
    code_min: float,
    code_max: float,
    keep_non_finite: int,
    /,
) -> None: ...
def decode(
    out: _Array,
    codes: _Array,
    scale: _Array,
    zero: _Array | None,
    rows: int,
    cols: int,
    block_rows: int,
    block_cols: int,
    out_dtype: int,
    code_dtype: int,
    /,
) -> None: ...
def pack(
    packed: _Array,
    codes: _Array,
    rows: int,
    cols: int,
    bits: int,
    container_bytes: int,
    axis: int,
    straddle: int,
    /,
) -> int: ...
def unpack(
    codes: _Array,
    packed: _Array,
    rows: int,
    cols: int,
    bits: int,
    container_bytes: int,
    axis: int,
    straddle: int,
    is_signed: int,
    /,
) -> None: ...
def pack_ternary(packed: _Array, codes: _Array, rows: int, cols: int, /) -> None: ...
def unpack_ternary(codes: _Array, packed: _Array, rows: int, cols: int, /) -> None: ...
def fit_levels(
    levels: _Array,
    values: _Array,
    weights: _Array | None,
    rows: int,
    count: int,
    level_count: int,
    /,
) -> None: ...
def encode_levels(
    codes: _Array,
    x: _Array,
    scales: _Array,
    codebook: _Array,
    rows: int,
    cols: int,
    group: int,
    codebooks: int,
    levels: int,
    /,
) -> None: ...
def linear(
    y: _Array,
    x: _Array,
    weights: _Array,
    scales: _Array,
    bias: _Array | None,
    tokens: int,
    out_features: int,
    in_features: int,
    y_dtype: int,
    x_dtype: int,
    scales_dtype: int,
    bias_dtype: int,
    /,
) -> None: ...
def linear_backward(
    grad_x: _Array,
    grad_y: _Array,
    weights: _Array,
    scales: _Array,
    tokens: int,
    out_features: int,
    in_features: int,
    grad_x_dtype: int,
    grad_y_dtype: int,
    scales_dtype: int,
    /,
) -> None: ...
def linear_packed(
    y: _Array,
    x: _Array,
    codes: _Array,
    scales: _Array,
    scale_steps: _Array | None,
    zeros: _Array | None,
    codebook: _Array | None,
    bias: _Array | None,
    tokens: int,
    out_features: int,
    in_features: int,
    bits: int,
    group: int,
    codebook_rows: int,
    y_dtype: int,
    x_dtype: int,
    scales_dtype: int,
    zeros_dtype: int,
    codebook_dtype: int,
    bias_dtype: int,
    /,
) -> None: ...
def linear_packed_backward(
    grad_x: _Array,
    grad_y: _Array,
    codes: _Array,
    scales: _Array,
    scale_steps: _Array | None,
    zeros: _Array | None,
    codebook: _Array | None,
    tokens: int,
    out_features: int,
    in_features: int,
    bits: int,
    group: int,
    codebook_rows: int,
    grad_x_dtype: int,
    grad_y_dtype: int,
    scales_dtype: int,
    zeros_dtype: int,
    codebook_dtype: int,
    /,
) -> None: ...
def choose_linear(
    tokens: int,
    out_features: int,
    in_features: int,
    x_dtype: int,
    bits: int,
    group: int,
    zeros: int,
    has_codebook: int,
    /,
) -> tuple[str, int, int, int, int, bool]: ...
def isas() -> tuple[str, ...]: ...
def active_isa() -> str: ...
def set_isa(name: str, /) -> None: ...
def get_num_threads() -> int: ...
def set_num_threads(threads: int, /) -> None: ...
def register_torch(libtorch_cpu: str, /) -> bool: ...
