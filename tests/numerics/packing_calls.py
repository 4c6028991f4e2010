"""What the tests of packing share."""

from __future__ import annotations

import numpy as np


def codes_of(bits: int, shape=(21, 13), signed=False, seed=0) -> np.ndarray:
    low, high = (-(1 << bits - 1), 1 << bits - 1) if signed else (0, 1 << bits)
    dtype = np.int8 if signed else np.uint8
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)
