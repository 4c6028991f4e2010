"""The native functions look at what an array holds, not at the bytes of an item alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from quantization import _kernels
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

F32, I8 = _kernels.FLOAT32, _kernels.INT8
SPEC = (F32, I8, F32, _kernels.SYMMETRIC, -127.0, 127.0, 0)


def floats(*shape: int) -> Any:
    return np.ones(shape, np.float32)


def codes(*shape: int) -> Any:
    return np.ones(shape, np.int8)


CALLS: dict[str, tuple[Any, list[Any], tuple[Any, ...]]] = {
    "quantize": (_kernels.quantize, [codes(4, 6), floats(4, 1), None, floats(4, 6)],
                 (4, 6, 1, 6, *SPEC)),
    "measure": (_kernels.measure, [floats(4, 1), None, floats(4, 6)], (4, 6, 1, 6, *SPEC)),
    "encode": (_kernels.encode, [codes(4, 6), floats(4, 6), floats(4, 1), None],
               (4, 6, 1, 6, *SPEC)),
    "decode": (_kernels.decode, [floats(4, 6), codes(4, 6), floats(4, 1), None],
               (4, 6, 1, 6, F32, I8)),
    "pack": (_kernels.pack, [np.ones((4, 1), np.int64), codes(4, 8)], (4, 8, 4, 8, 1, 1)),
    "unpack": (_kernels.unpack, [codes(4, 8), np.ones((4, 1), np.int64)], (4, 8, 4, 8, 1, 1, 0)),
    "pack_ternary": (_kernels.pack_ternary, [codes(4, 1), codes(4, 5)], (4, 5)),
    "fit_levels": (_kernels.fit_levels, [np.ones((1, 2)), np.ones((1, 4)), None], (1, 4, 2)),
    "encode_levels": (_kernels.encode_levels, [codes(2, 4), floats(2, 4), floats(2, 1),
                                               floats(1, 2)], (2, 4, 4, 1, 2)),
    "linear": (_kernels.linear, [floats(2, 3), floats(2, 4), codes(3, 4), floats(3), floats(3)],
               (2, 3, 4, F32, F32, F32, F32)),
}  # fmt: skip


def same_bytes(array: Any) -> list[Any]:
    """Arrays of the same bytes an item that hold something else."""
    size, kind = array.dtype.itemsize, array.dtype.kind
    others = [np.dtype(f"V{size}"), np.dtype(f"S{size}")]
    others += [np.dtype(object), np.dtype("M8[s]"), np.dtype("m8[s]")] if size == 8 else []
    others += [np.dtype("c8")] if size == 8 else [np.dtype(bool)] if size == 1 else []
    others += [np.dtype(f"i{size}")] if kind == "f" else []
    others += [np.dtype(f"f{size}")] if kind in "iu" and size > 2 else []
    return [np.zeros(array.shape, dtype) for dtype in others]


@pytest.mark.parametrize("name", list(CALLS))
def test_other_kinds_of_the_same_size_are_refused(name: str) -> None:
    function, arrays, numbers = CALLS[name]
    function(*arrays, *numbers)
    for i, array in enumerate(arrays):
        for other in same_bytes(array) if array is not None else ():
            given = [*arrays[:i], other, *arrays[i + 1 :]]
            with pytest.raises(TypeError, match="must be of NumPy's kind"):
                function(*given, *numbers)


def test_objects_in_the_place_of_numbers() -> None:
    x = np.array([[object()] * 4] * 2, dtype=object)
    f64 = _kernels.FLOAT64
    with pytest.raises(TypeError, match=r"x must be of NumPy's kind f \(floats\), not O"):
        _kernels.linear(
            np.ones((2, 3)), x, codes(3, 4), floats(3), None, 2, 3, 4, f64, f64, F32, F32
        )
