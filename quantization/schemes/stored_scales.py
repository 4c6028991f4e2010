"""Scales as a packed matrix stores them: rounded floats, codes under a step, or powers of two."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from quantization.ops import native
from quantization.ops.dtypes import SOURCES, name_of
from quantization.ops.native import Tensor

__all__ = [
    "StoredScales",
    "as_codes",
    "as_exponents",
    "as_exponents_of",
    "as_fixed",
    "as_floats",
    "as_given",
    "check_range",
    "restore",
    "restore_zeros",
    "under_steps",
]

_BIAS = 127  # of an E8M0 exponent
_NAN_EXPONENT = 255
_LARGEST_E2M1 = 2  # exponent of 6.0
_LARGEST_CODE = 255
#: The smallest number above 0 of each type (of float32 for float64: weights are made in float32).
_SMALLEST = {
    "float32": 2.0**-149,
    "float64": 2.0**-149,
    "float16": 2.0**-24,
    "bfloat16": 2.0**-133,
}


class StoredScales(NamedTuple):
    """Scales as stored, the step of each row (or None), and the float32 scales they stand for."""

    scales: Tensor
    steps: Tensor | None
    restored: np.ndarray


def restore(scales: Tensor, steps: Tensor | None = None) -> np.ndarray:
    """The float32 scales that stored ones stand for, ``[rows, groups]``.

    Example:
        >>> restore(np.array([[127, 130, 255]], "uint8"))
        array([[ 1.,  8., nan]], dtype=float32)
        >>> restore(np.array([[2, 0]], "uint8"), np.array([0.5], "float32"))
        array([[1., 0.]], dtype=float32)
    """
    if name_of(scales.dtype) != "uint8":
        with np.errstate(over="ignore"):
            return native.to_array(native.cast(scales, "float32"))
    codes = native.to_array(scales)
    if steps is not None:
        return codes.astype("float32") * native.to_array(native.cast(steps, "float32"))[:, None]
    is_nan = codes == _NAN_EXPONENT
    powers = np.ldexp(np.float32(1), np.where(is_nan, 0, codes.astype("int32") - _BIAS))
    return np.where(is_nan, np.float32(np.nan), powers)


def as_fixed(zeros: np.ndarray, bits: int, like: Tensor) -> tuple[Tensor, np.ndarray]:
    """Zero points of codes of ``bits`` bits in 8 bits of fixed point, and what they stand for.

    ``zero = (i + 128) * 2**(bits - 8)``, i of -128..127: from 0 to nearly ``2**bits``.

    Example:
        >>> as_fixed(np.array([[7.53, -1.0]]), 4, np.zeros(1))
        (array([[  -8, -128]], dtype=int8), array([[7.5, 0. ]], dtype=float32))
    """
    places = np.clip(np.rint(np.nan_to_num(zeros) * 2.0 ** (8 - bits)), 0, 255) - 128
    stored = native.as_tensor_like(places.astype("int8"), "int8", like)
    return stored, restore_zeros(stored, bits)


def restore_zeros(zeros: Tensor, bits: int) -> np.ndarray:
    """The float32 zero points that floats, or fixed point (int8) beside ``bits`` bits, stand for.

    Example:
        >>> restore_zeros(np.array([[0, 127]], "int8"), 2)
        array([[2.      , 3.984375]], dtype=float32)
    """
    floats = native.to_array(native.cast(zeros, "float32"))
    return (
        (floats + 128) * np.float32(2.0 ** (bits - 8)) if name_of(zeros.dtype) == "int8" else floats
    )


def check_range(scales: np.ndarray) -> None:
    """Raise ValueError if a scale is beyond float32, in which packed weights are computed."""
    if (scales > SOURCES["float32"].max).any():
        raise ValueError(
            "a scale is beyond the largest number of float32, in which packed weights are "
            "computed: divide the matrix first"
        )


def as_given(scales: Tensor) -> StoredScales:
    """Scales that are already of their type.

    Raises:
        ValueError: if one is beyond float32.
    """
    restored = restore(scales)
    check_range(restored)
    return StoredScales(scales, None, restored)


def as_floats(scales: np.ndarray, dtype: str, like: Tensor) -> StoredScales:
    """Scales rounded to a float type; one above 0 stays above 0, NaN stays NaN.

    Raises:
        ValueError: if one is beyond the largest number of the type.

    Example:
        >>> as_floats(np.array([[1 / 3, 1e-9]]), "float16", np.zeros(1)).scales
        array([[3.333e-01, 5.960e-08]], dtype=float16)
    """
    raised = np.where(scales > 0, np.maximum(scales, _SMALLEST[dtype]), scales)
    wide = "float64" if dtype == "float64" else "float32"
    with np.errstate(over="ignore"):
        stored = native.cast(native.as_tensor_like(raised.astype(wide), wide, like), dtype)
    restored = restore(stored)
    if np.isinf(restored).any():
        largest = SOURCES[dtype].max
        raise ValueError(
            f"a scale of {np.nanmax(scales):g} is beyond the largest number of its type, {dtype} "
            f"({largest:g}): use a wider scale_dtype"
        )
    return StoredScales(stored, None, restored)


def as_codes(scales: np.ndarray, like: Tensor, dtype: str = "float32") -> StoredScales:
    """Scales as multiples 0..255 of one step a row, the largest scale being about 255 steps.

    The steps are rounded to ``dtype`` first. A scale above 0 has a code of at least 1; a NaN makes
    its whole row NaN.

    Source: double quantization, T. Dettmers et al., "QLoRA" (2023), with a linear grid.

    Example:
        >>> as_codes(np.array([[2.55, 0.001, 0.0, 1.0]]), np.zeros(1)).scales
        array([[255,   1,   0, 100]], dtype=uint8)
    """
    largest = scales.max(axis=1, initial=0).astype("float32")
    steps = np.where(largest > 0, np.maximum(largest / _LARGEST_CODE, _SMALLEST[dtype]), largest)
    return under_steps(scales, steps, like, dtype)


def under_steps(
    scales: np.ndarray, steps: np.ndarray, like: Tensor, dtype: str = "float32"
) -> StoredScales:
    """Scales as multiples 0..255 of the steps of their rows, which are rounded to ``dtype`` first.

    Example:
        >>> under_steps(np.array([[2.0, 1.04]]), np.array([0.1]), np.zeros(1)).scales
        array([[20, 10]], dtype=uint8)
    """
    wide = native.as_tensor_like(steps.astype("float32"), "float32", like)
    stored_steps = _rounded(wide, dtype)
    steps = native.to_array(native.cast(stored_steps, "float32"))
    share = np.divide(scales, steps[:, None], out=np.zeros_like(scales), where=steps[:, None] > 0)
    codes = np.clip(np.rint(share), np.where(scales > 0, 1, 0), _LARGEST_CODE).astype("uint8")
    stored = native.as_tensor_like(codes, "uint8", like)
    return StoredScales(stored, stored_steps, restore(stored, stored_steps))


def _rounded(steps: Tensor, dtype: str) -> Tensor:
    """Steps as that type; without torch and ml_dtypes bfloat16 numbers are kept in float32."""
    try:
        return native.cast(steps, dtype)
    except TypeError:
        bits = native.to_array(steps).view("uint32")
        kept: np.ndarray = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
        return kept.view("float32")


def as_exponents(largest: np.ndarray, like: Tensor) -> StoredScales:
    """E8M0 scales for E2M1 levels: ``2**(floor(log2 of the largest magnitude) - 2)``, in uint8.

    The largest magnitude then lies at 4..8 scales, and what is beyond 6 becomes 6. A block of
    zeros has the scale 1.

    Source: OCP Microscaling formats, version 1.0 (2023), section 6.3.

    Example:
        >>> as_exponents(np.array([[6.0, 4.0, 3.9, 0.0]]), np.zeros(1)).restored
        array([[1. , 1. , 0.5, 1. ]], dtype=float32)
    """
    return as_exponents_of(largest * 2.0**-_LARGEST_E2M1, like)


def as_exponents_of(scales: np.ndarray, like: Tensor) -> StoredScales:
    """E8M0 scales, the powers of two that are not above those given; 1 for 0.

    Example:
        >>> as_exponents_of(np.array([[0.5, 0.9, 0.0]]), np.zeros(1)).restored
        array([[0.5, 0.5, 1. ]], dtype=float32)
    """
    exponents = np.frexp(scales)[1] - 1 + _BIAS  # frexp: 0.5 <= mantissa < 1
    codes = np.where(scales > 0, np.clip(exponents, 0, _NAN_EXPONENT - 1), _BIAS)
    codes = np.where(np.isnan(scales), _NAN_EXPONENT, codes).astype("uint8")
    stored = native.as_tensor_like(codes, "uint8", like)
    return StoredScales(stored, None, restore(stored))
