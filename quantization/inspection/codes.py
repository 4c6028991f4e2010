"""How often each code stands in a packed matrix."""

from __future__ import annotations

from typing import Any

import numpy as np

from quantization.inspection.explain import levels_of
from quantization.ops import native
from quantization.schemes.packed_weights import PackedWeights, layout_of

__all__ = ["code_counts", "counts_by_level"]

_NUMBERS = 1 << 22  # that are unpacked at a time


def code_counts(packed: PackedWeights) -> np.ndarray:
    """How often each stored code 0..2**bits - 1 occurs, int64; of ternary codes 0..2.

    Codes that bytes hold whole are counted by bytes, which reads a quarter or an eighth as much.

    Example:
        >>> from quantization import pack_matrix
        >>> code_counts(pack_matrix(np.array([[-1, 0, 1, 1]], "float32"), "w2"))
        array([1, 2, 1, 0])
    """
    scheme, (rows, cols) = packed.scheme, packed.shape
    is_ternary = layout_of(scheme) == "base3"
    count = 3 if is_ternary else 2**scheme.bits
    if not rows * cols:
        return np.zeros(count, "int64")
    each = 5 if is_ternary else 8 // scheme.bits if 8 % scheme.bits == 0 else 0
    if each:
        stored: Any = native.to_array(packed.packed_weights)
        found = _of_bytes(np.bincount(stored.reshape(-1), minlength=256), count, each)
        found[0] -= rows * (each * stored.shape[1] - cols)  # what fills the last byte of a row
        return found
    found = np.zeros(count, "int64")
    block = max(1, _NUMBERS // cols)
    for start in range(0, rows, block):
        part = packed.rows(start, min(rows, start + block))
        found += np.bincount(
            native.to_array(part._stored_codes("uint8")).reshape(-1), minlength=count
        )
    return found


def _of_bytes(bytes_found: np.ndarray, base: int, each: int) -> np.ndarray:
    found, rest = np.zeros(base, "int64"), np.arange(256)
    for _ in range(each):
        np.add.at(found, rest % base, bytes_found)
        rest = rest // base
    return found


def counts_by_level(packed: PackedWeights) -> list[int]:
    """The counts in the order of what the codes stand for, the lowest level first.

    Example:
        >>> from quantization import pack_matrix
        >>> counts_by_level(pack_matrix(np.array([[-1, 0, 1, 1]], "float32"), "w2"))
        [1, 0, 1, 2]
    """
    counts = code_counts(packed)
    if not packed.shape[0]:
        return [int(count) for count in counts]
    levels = levels_of(packed.rows(0, 1))
    order = sorted(levels, key=lambda code: levels[code])
    return [int(counts[code % len(counts)]) for code in order]
