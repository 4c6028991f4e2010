"""The definitions in NumPy, written apart from the C: what every kernel must answer.

Numbers of types that NumPy lacks are held as bits (uint16, uint8); `numbers` and `nearest` go
between bits and float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache

import numpy as np

SOURCES = ("float32", "float64", "float16", "bfloat16")
FLOAT_CODES = ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
INTEGER_CODES = ("int8", "uint8", "int16")

#: Bits of the exponent and the mantissa.
FORMATS = {
    "float16": (5, 10),
    "bfloat16": (8, 7),
    "float8_e4m3fn": (4, 3),
    "float8_e5m2": (5, 2),
}
STORAGE = {
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.uint16,
    "bfloat16": np.uint16,
    "float8_e4m3fn": np.uint8,
    "float8_e5m2": np.uint8,
    "int8": np.int8,
    "uint8": np.uint8,
    "int16": np.int16,
}


# ---- number types ------------------------------------------------------------------------------


def numbers(bits: np.ndarray, name: str) -> np.ndarray:
    """The numbers that `bits` stand for, as float64."""
    if name not in FORMATS:
        return bits.astype(np.float64)
    exponent_bits, mantissa_bits = FORMATS[name]
    bits = bits.astype(np.int64)
    mantissa = (bits & ((1 << mantissa_bits) - 1)).astype(np.float64)
    exponent = bits >> mantissa_bits & ((1 << exponent_bits) - 1)
    bias = (1 << exponent_bits - 1) - 1
    hidden = np.where(exponent > 0, 2.0**mantissa_bits, 0.0)
    value = np.ldexp(mantissa + hidden, np.maximum(exponent, 1) - bias - mantissa_bits)
    if name == "float8_e4m3fn":
        value = np.where(bits & 0x7F == 0x7F, np.nan, value)
    else:
        top = exponent == (1 << exponent_bits) - 1
        value = np.where(top, np.where(mantissa > 0, np.nan, np.inf), value)
    return np.where(bits >> (exponent_bits + mantissa_bits) & 1, -value, value)


@cache
def largest(name: str) -> float:
    """The largest finite number of a float type."""
    if name in FORMATS:
        return float(_ladder(name)[-2])
    return float(np.finfo(name).max)


@cache
def _ladder(name: str) -> np.ndarray:
    """All numbers >= 0 of the type in the order of their bits, and the one that would follow."""
    exponent_bits, mantissa_bits = FORMATS[name]
    half = numbers(np.arange(1 << exponent_bits + mantissa_bits), name)
    finite = half[: int(np.isfinite(half).sum())]
    return np.append(finite, 2 * finite[-1] - finite[-2])


def nearest(values: np.ndarray, name: str) -> np.ndarray:
    """Bits of the numbers next to `values` (ties to even bits), through float32 as torch does.

    What reaches the step after the largest number becomes the code behind it: infinity, or NaN.
    """
    if name not in FORMATS:
        with np.errstate(all="ignore"):
            return np.asarray(values, np.float64).astype(STORAGE[name])
    with np.errstate(all="ignore"):
        values = np.asarray(values, np.float64).astype(np.float32).astype(np.float64)
    ladder = _ladder(name)
    middles = (ladder[:-1] + ladder[1:]) / 2
    size = np.abs(values)
    code = np.searchsorted(middles, size, side="left")
    on_tie = (code < middles.size) & (middles[np.minimum(code, middles.size - 1)] == size)
    code += on_tie & (code % 2 == 1)
    exponent_bits, mantissa_bits = FORMATS[name]
    nan = (1 << exponent_bits + mantissa_bits) - 1
    code = np.where(np.isnan(values), nan, code)
    sign = np.signbit(values).astype(np.int64) << (exponent_bits + mantissa_bits)
    return (code + sign).astype(STORAGE[name])


# ---- scales ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """qk_spec of csrc/qk.h, in names."""

    source: str = "float32"
    code: str = "int8"
    mode: str = "symmetric"
    code_min: float = -127
    code_max: float = 127
    scale: str = "float32"
    keep_non_finite: bool = False

    @property
    def compute(self) -> type:
        return np.float64 if self.source == "float64" else np.float32

    @property
    def half(self) -> float:
        """How many steps reach from zero to the largest magnitude."""
        return self.code_max if self.code_min == 0 else (self.code_max - self.code_min) / 2

    def to_float(self, code: str) -> Spec:
        """The same with a float target."""
        top = largest(code)
        return replace(self, code=code, mode="symmetric", code_min=-top, code_max=top)


SMALLEST_NORMAL = {
    "float64": 2.0**-1022,
    "float32": 2.0**-126,
    "bfloat16": 2.0**-126,
    "float16": 2.0**-14,
    "float8_e5m2": 2.0**-14,
    "float8_e4m3fn": 2.0**-6,
}


def stored_scale(exact: float, steps: float, reach: float, spec: Spec) -> float:
    """`exact` in the scale's type; one number higher where a subnormal would let codes clip."""
    name = spec.scale
    if name == "float64" and spec.compute is np.float32:
        name = "float32"
    bits = nearest(np.array([exact]), name)
    scale = float(numbers(bits, name)[0])
    if scale < SMALLEST_NORMAL[name] and Fraction(scale) * Fraction(steps) < Fraction(reach):
        if name in FORMATS:
            return float(numbers(bits + bits.dtype.type(1), name)[0])
        return float(np.nextafter(bits[0], bits.dtype.type(1)))
    return scale


def scale_and_zero(block: np.ndarray, spec: Spec) -> tuple[float, int]:
    """The scale and zero point of one block of float64 numbers."""
    compute = spec.compute
    if not np.isfinite(block).all():
        return float("nan"), 0
    x = block.astype(compute)
    absmax = np.abs(x).max()
    if spec.mode == "binary":
        mean = compute(np.cumsum(np.abs(block))[-1] / block.size)  # in index order
        return (stored_scale(mean, 1, 0, spec) if absmax else 0.0), 0
    if spec.mode == "symmetric":
        exact = absmax / compute(spec.half)
        return (stored_scale(exact, spec.half, float(absmax), spec) if absmax else 1.0), 0
    low, high = min(x.min(), compute(0)), max(x.max(), compute(0))
    steps = compute(spec.code_max - spec.code_min)
    with np.errstate(over="ignore"):
        span = high - low
    if span == 0:
        scale = 1.0
    elif np.isinf(span):
        scale = stored_scale(high / steps - low / steps, 1, 0, spec)
    else:
        scale = stored_scale(span / steps, float(steps), float(span), spec)
    zero = np.rint(compute(spec.code_min) - low / compute(scale))
    return scale, int(np.clip(zero, spec.code_min, spec.code_max))


def measure(x: np.ndarray, block: tuple[int, int], spec: Spec) -> tuple[np.ndarray, np.ndarray]:
    """Scales (compute type) and zero points (int32) of the blocks of a float64 matrix."""
    shape = tuple(-(-n // b) for n, b in zip(x.shape, block, strict=True))
    scale, zero = np.empty(shape, spec.compute), np.empty(shape, np.int32)
    for i, j in np.ndindex(shape):
        rows, cols = (slice(k * b, (k + 1) * b) for k, b in zip((i, j), block, strict=True))
        scale[i, j], zero[i, j] = scale_and_zero(x[rows, cols], spec)
    return scale, zero


# ---- codes -------------------------------------------------------------------------------------


def spread(per_block: np.ndarray, block: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
    """One value for each element, from one for each block."""
    rows, cols = (np.arange(n) // b for n, b in zip(shape, block, strict=True))
    return per_block[np.ix_(rows, cols)]


def encode(x: np.ndarray, scale: np.ndarray, zero: np.ndarray, spec: Spec) -> np.ndarray:
    """Codes (as stored) of float64 numbers under a scale and zero point for each element."""
    compute = spec.compute
    with np.errstate(all="ignore"):
        if spec.mode == "binary":
            code = np.where(x >= 0, 1.0, -1.0)
            return np.where(np.isnan(x) | np.isnan(scale), 0, code).astype(STORAGE[spec.code])
        code = x.astype(compute) / scale.astype(compute)
        if spec.code in INTEGER_CODES:
            code = np.rint(code) + zero.astype(compute)
        code = np.clip(code, compute(spec.code_min), compute(spec.code_max))
        code = np.where(np.isnan(code), compute(0), code)
    return nearest(code, spec.code)


def decode(
    codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, code: str, out: str
) -> np.ndarray:
    """Numbers (as stored) of codes under a scale and zero point for each element."""
    compute = np.float64 if out == "float64" else np.float32
    with np.errstate(all="ignore"):
        value = numbers(codes, code).astype(compute) - zero.astype(compute)
        return nearest(value * scale.astype(compute), out)
