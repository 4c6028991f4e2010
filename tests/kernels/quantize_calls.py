"""The quantize calls of the extension on guarded, misaligned memory, by the oracle's names."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from quantization import _kernels
from tests.memory import Guarded, at_offset, at_page_end
from tests.oracle import FORMATS, STORAGE, Spec, nearest, numbers

Block = tuple[int, int]


def number_of(name: str) -> int:
    """The kernels' number of a type or mode."""
    return getattr(_kernels, name.upper())


def arguments(spec: Spec) -> tuple:
    names = (spec.source, spec.code, spec.scale, spec.mode)
    kept = int(spec.keep_non_finite)
    return (*map(number_of, names), float(spec.code_min), float(spec.code_max), kept)


def blocks_of(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    return tuple(-(-n // b) for n, b in zip(shape, block, strict=True))


class Quantized(NamedTuple):
    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray


def placed(values: np.ndarray, offset: int) -> np.ndarray:
    """A copy at an odd address; at a page that faults just behind it where the offset is 0."""
    return at_offset(values, offset) if offset or not values.size else at_page_end(values)


def stored(x: np.ndarray, name: str) -> np.ndarray:
    """float64 numbers as the bits of a source type."""
    return nearest(x, name)


def quantize(source: np.ndarray, block: Block, spec: Spec, offset: int = 0) -> Quantized:
    """quantize, after checking that measure and encode give the same."""
    shape = blocks_of(source.shape, block)
    codes = Guarded(source.shape, STORAGE[spec.code], offset)
    scale, scale2 = Guarded(shape, spec.compute, offset), Guarded(shape, spec.compute, offset)
    zero, zero2 = Guarded(shape, np.int32, offset), Guarded(shape, np.int32, offset)
    given = placed(source, offset)
    grid = (*source.shape, *block)
    _kernels.quantize(codes.array, scale.array, zero.array, given, *grid, *arguments(spec))
    _kernels.measure(scale2.array, zero2.array, given, *grid, *arguments(spec))
    assert same(given, source), "the source was changed"
    for memory in (codes, scale, zero, scale2, zero2):
        memory.check()
    assert same(scale.array, scale2.array)
    assert same(zero.array, zero2.array)
    assert same(codes.array, encode(source, scale.array, zero.array, block, spec, offset))
    return Quantized(codes.array, scale.array, zero.array)


def encode(
    source: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray | None,
    block: Block,
    spec: Spec,
    offset: int = 0,
) -> np.ndarray:
    codes = Guarded(source.shape, STORAGE[spec.code], offset)
    given = placed(source, offset)
    _kernels.encode(codes.array, given, scale, zero, *source.shape, *block, *arguments(spec))
    codes.check()
    return codes.array


def decode(
    codes: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray | None,
    block: Block,
    code: str,
    out: str,
    offset: int = 0,
) -> np.ndarray:
    result = Guarded(codes.shape, STORAGE[out], offset)
    given = placed(codes, offset)
    kinds = (number_of(out), number_of(code))
    _kernels.decode(result.array, given, scale, zero, *codes.shape, *block, *kinds)
    result.check()
    return result.array


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Bit for bit, except that one NaN is as good as another."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype.kind != "f":
        return bool((a == b).all())
    equal = a.reshape(-1).view(f"u{a.itemsize}") == b.reshape(-1).view(f"u{b.itemsize}")
    return bool((equal | (np.isnan(a) & np.isnan(b)).reshape(-1)).all())


def same_numbers(a: np.ndarray, b: np.ndarray, name: str) -> bool:
    """The same for stored numbers of a type that NumPy may lack."""
    if name not in FORMATS:
        return same(a, b)
    nan = np.isnan(numbers(a, name)) & np.isnan(numbers(b, name))
    return bool(((a == b) | nan).all())
