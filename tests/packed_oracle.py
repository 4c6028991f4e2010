"""What packed tensors say, read bit by bit in NumPy: the numbers of a packed matrix in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

#: Parts of a packed matrix that are tensors.
PARTS = ("packed_weights", "scales", "scale_steps", "zero_points", "codebook", "input_scale")


def array_of(tensor: Any) -> np.ndarray:
    """A tensor of either kind; floats as float64, which loses nothing."""
    if hasattr(tensor, "detach"):
        tensor = tensor.double() if tensor.is_floating_point() else tensor
        return tensor.numpy()
    return tensor if tensor.dtype == np.uint8 else tensor.astype(np.float64)


def unpacked(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first `count` codes of each row, unsigned."""
    rows = data.shape[0]
    stream = np.unpackbits(data, axis=1, bitorder="little")[:, : count * bits]
    weights = 1 << np.arange(bits)
    return (stream.reshape(rows, count, bits) * weights).sum(-1)


def ternary_digits(data: np.ndarray, count: int) -> np.ndarray:
    """The first `count` base-3 digits of each row."""
    digits = data[:, :, None].astype(np.int64) // 3 ** np.arange(5) % 3
    return digits.reshape(data.shape[0], -1)[:, :count]


def read(packed: Any) -> SimpleNamespace:
    """Codes, and for each weight its level, scale and zero point, all float64 `[out, in]`."""
    scheme, cols = packed.scheme, packed.shape[1]
    parts = {
        name: None if getattr(packed, name) is None else array_of(getattr(packed, name))
        for name in PARTS
    }
    place = np.arange(cols) // scheme.group(cols)
    if scheme.grid == "ternary":
        codes = ternary_digits(parts["packed_weights"], cols)
        level = np.where(codes == 2, -1.0, codes)
    else:
        codes = unpacked(parts["packed_weights"], scheme.bits, cols)
        level = _levels(codes, scheme.bits, parts)
    scale = _scales(parts)[:, place]
    zero = np.zeros_like(scale)
    if parts["zero_points"] is not None:
        zeros = parts["zero_points"]
        if zeros.dtype == np.uint8:
            zeros = unpacked(zeros, scheme.bits, scheme.groups(cols))
        elif zeros.dtype == np.int8:
            zeros = (zeros.astype(np.float64) + 128) / 2.0 ** (8 - scheme.bits)
        zero = zeros[:, place].astype(np.float64)
    return SimpleNamespace(codes=codes, level=level, scale=scale, zero=zero)


def _levels(codes: np.ndarray, bits: int, parts: dict[str, Any]) -> np.ndarray:
    if parts["codebook"] is not None:
        book = np.broadcast_to(parts["codebook"], (codes.shape[0], 2**bits))
        return np.take_along_axis(book, codes, axis=1)
    if parts["zero_points"] is not None:
        return codes.astype(np.float64)
    return np.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes).astype(np.float64)


def _scales(parts: dict[str, Any]) -> np.ndarray:
    scales = parts["scales"]
    if parts["scale_steps"] is not None:
        return scales * parts["scale_steps"][:, None]
    if scales.dtype == np.uint8:
        return np.where(scales == 255, np.nan, 2.0 ** (scales.astype(np.float64) - 127))
    return scales


def numbers(packed: Any) -> np.ndarray:
    """`(level - zero) * scale`, times the column's multiplier, in float64, column by column."""
    parts = read(packed)
    return _columns(packed, (parts.level - parts.zero) * parts.scale)


def tolerance(packed: Any) -> np.ndarray:
    """How far the same in float32 may lie: two roundings, one of the scale, one of a subnormal."""
    parts = read(packed)
    size = (np.abs(parts.level) + np.abs(parts.zero)) * np.abs(parts.scale)
    return np.abs(_columns(packed, 5 * 2.0**-24 * size + 2.0**-149))


def _columns(packed: Any, stored: np.ndarray) -> np.ndarray:
    """Numbers of stored columns, multiplied, each where its column is."""
    if packed.input_scale is not None:
        stored = stored * array_of(packed.input_scale)
    if packed.input_order is None:
        return stored
    found = np.full_like(stored, np.nan)
    for k, column in enumerate(packed.input_order):
        found[:, int(column)] = stored[:, k]
    return found
