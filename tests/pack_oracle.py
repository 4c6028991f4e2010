"""Packing by np.unpackbits and np.packbits: what every kernel must produce, bit for bit."""

from __future__ import annotations

import numpy as np


def packed_length(length: int, bits: int, container_bytes: int, straddle: bool) -> int:
    width = 8 * container_bytes
    codes_a_container = width / bits if straddle else width // bits
    return int(np.ceil(length / codes_a_container))


def pack(codes: np.ndarray, bits: int, container_bytes: int, axis: int, straddle: bool):
    """The low ``bits`` bits of each code [rows, cols], as unsigned containers."""
    if axis == 0:
        turned = pack(codes.T, bits, container_bytes, 1, straddle)
        return np.ascontiguousarray(turned.T)
    rows, cols = codes.shape
    width = 8 * container_bytes
    containers = packed_length(cols, bits, container_bytes, straddle)
    each = codes.astype(np.uint8).reshape(rows, cols, 1)
    stream = np.unpackbits(each, axis=2, bitorder="little")[:, :, :bits]
    if not straddle:  # every container gets its whole codes, then zeros
        per = width // bits
        stream = _pad(stream, 1, containers * per).reshape(rows, containers, per * bits)
        stream = _pad(stream, 2, width)
    stream = _pad(stream.reshape(rows, int(np.prod(stream.shape[1:]))), 1, containers * width)
    data = np.packbits(stream, axis=1, bitorder="little")
    return np.ascontiguousarray(data).view(f"<u{container_bytes}").reshape(rows, containers)


def unpacked(codes: np.ndarray, bits: int, is_signed: bool) -> np.ndarray:
    """What unpacking gives: the low bits of each code, sign-extended or not."""
    low = codes.astype(np.int64) & ((1 << bits) - 1)
    if not is_signed:
        return low.astype(np.uint8)
    return np.where(low >= 1 << (bits - 1), low - (1 << bits), low).astype(np.int8)


def pack_ternary(codes: np.ndarray) -> np.ndarray:
    rows, cols = codes.shape
    digits = _pad(codes, 1, -(-cols // 5) * 5).reshape(rows, -(-cols // 5), 5).astype(np.int64)
    return (digits @ np.array([1, 3, 9, 27, 81])).astype(np.uint8)


def _pad(array: np.ndarray, axis: int, length: int) -> np.ndarray:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, length - array.shape[axis])
    return np.pad(array, widths)
