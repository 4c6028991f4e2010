"""What tests of packed matrices share: names of schemes, matrices, and the check of all numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from quantization.ops.dtypes import SOURCES
from quantization.schemes.packed_weights import PackedWeights
from tests.packed_oracle import PARTS, array_of, numbers, tolerance

torch = pytest.importorskip("torch")

DTYPES = {name: getattr(torch, name) for name in SOURCES}

#: A scheme of every kind.
ALL = [
    *(
        "w8",
        "w4g64a",
        "w3g7",
        "w5t",
        "w2ta",
        "w3g7af",
        "w4taf",
        "w4g32+dq",
        "w4g64a+dq",
        "w5g9af+dqs",
        "w5g9af+dq",
        "w2g32af+dq",
    ),
    *("nf4", "nf4r", "nf4t", "nf4g7+dq", "fp4", "fp4g16+dq", "mxfp4"),
    *("kmeans4", "kmeans3r", "kmeans2g7", "kmeans1", "kmeans3g16+dq"),
    *("binary", "binaryg7", "binaryt", "binaryg16+dq"),
    *("ternary", "ternaryg7", "ternaryt", "ternaryg16+dq"),
]


def matrix(rng: np.random.Generator, shape: tuple[int, int], dtype: str = "float32") -> Any:
    """Weights of several magnitudes, with a group of zeros where there is room."""
    weight = rng.standard_normal(shape) * 10.0 ** rng.uniform(-3, 1, (shape[0], 1))
    weight[0, : shape[1] // 2] = 0
    return torch.from_numpy(weight).to(DTYPES[dtype])


def same(one: PackedWeights, other: PackedWeights) -> bool:
    """Equal scheme, shape, dtype and tensors, NaN included."""
    if (one.scheme, one.shape, one.dtype) != (other.scheme, other.shape, other.dtype):
        return False
    return all(
        (getattr(one, name) is None) == (getattr(other, name) is None)
        and (
            getattr(one, name) is None
            or np.array_equal(
                array_of(getattr(one, name)),
                array_of(getattr(other, name)),
                equal_nan=array_of(getattr(one, name)).dtype.kind == "f",
            )
        )
        for name in PARTS
    )


def check_decoding(packed: PackedWeights) -> None:
    """`dequantize` gives the oracle's numbers, in every dtype, and sizes are those promised."""
    expected, allowed = numbers(packed), tolerance(packed)
    wide = array_of(packed.dequantize(torch.float64))
    assert packed.dequantize(torch.float64).dtype == torch.float64
    assert (np.abs(wide - expected) <= allowed).all()
    for name, dtype in DTYPES.items():
        given = packed.dequantize(dtype)
        assert given.dtype == dtype and tuple(given.shape) == packed.shape
        limit = SOURCES[name].max
        assert torch.equal(given, torch.from_numpy(wide.clip(-limit, limit)).to(dtype)), name
    assert packed.nbytes == packed.scheme.nbytes(packed.shape, packed.dtype)
