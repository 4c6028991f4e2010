"""Number types: every way to name one leads to the same value, and the ranges are torch's."""

from __future__ import annotations

import doctest
import subprocess
import sys

import numpy as np
import pytest

from quantization.ops import dtypes
from quantization.ops.dtypes import SOURCES, TARGETS, DType, dtype_of, name_of, source_of, target_of
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

ALL = SOURCES | TARGETS


def test_the_types_are_all_there() -> None:
    assert list(SOURCES) == ["float32", "float64", "float16", "bfloat16"]
    signed, unsigned = [f"int{bits}" for bits in range(1, 9)], [f"uint{b}" for b in range(1, 9)]
    floats = ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
    assert list(TARGETS) == [*signed, "int16", *unsigned, *floats]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 16])
def test_signed_integers_are_twos_complement(bits: int) -> None:
    dtype = target_of(f"int{bits}")
    assert (dtype.bits, dtype.min, dtype.max) == (bits, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert dtype.storage == ("int16" if bits == 16 else "int8")
    assert dtype.is_signed and not dtype.is_floating_point
    assert dtype.itemsize == np.dtype(dtype.storage).itemsize


@pytest.mark.parametrize("bits", range(1, 9))
def test_unsigned_integers(bits: int) -> None:
    dtype = target_of(f"uint{bits}")
    assert (dtype.min, dtype.max, dtype.storage, dtype.itemsize) == (0, 2**bits - 1, "uint8", 1)
    assert not dtype.is_signed


def test_one_signed_bit_is_binary() -> None:
    dtype = target_of("int1")
    assert (dtype.bits, dtype.min, dtype.max, dtype.storage) == (1, -1, 1, "int8")


def test_float_types_agree_with_torch() -> None:
    torch = pytest.importorskip("torch")
    for name, dtype in ALL.items():
        if dtype.is_floating_point:
            info = torch.finfo(getattr(torch, name))
            assert (dtype.bits, dtype.min, dtype.max) == (info.bits, info.min, info.max)
            assert dtype.itemsize == getattr(torch, name).itemsize
            assert dtype.storage == name and dtype.is_signed


def test_every_way_to_name_a_type() -> None:
    assert name_of("int4") == name_of(target_of("int4")) == "int4"
    assert name_of(np.float32) == name_of("f4") == name_of(np.dtype(">f4")) == "float32"
    assert name_of(float) == "float64" and name_of(int) == "int64"
    assert str(target_of("uint3")) == "uint3"


def test_torch_types() -> None:
    torch = pytest.importorskip("torch")
    for name in ALL:
        if hasattr(torch, name):
            assert dtype_of(getattr(torch, name)) is dtype_of(f"torch.{name}") is ALL[name]
    assert {name for name in ALL if not hasattr(torch, name)} <= {"uint8"}


def test_ml_dtypes_types() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "int4", "uint4"):
        assert name_of(getattr(ml_dtypes, name)) == name


@pytest.mark.parametrize("wrong", [None, "", "int77", 3, [], (np.float32,), object()])
def test_what_names_no_type(wrong: object) -> None:
    with pytest.raises(TypeError, match=r"is not a dtype; give a torch dtype, a NumPy dtype or a"):
        name_of(wrong)


@pytest.mark.parametrize("wrong", [np.zeros(3), np.zeros(0), "i4,,", {"a": 1}])
def test_what_numpy_trips_over_names_no_type_either(wrong: object) -> None:
    with pytest.raises(TypeError, match=r"is not a dtype; give a torch dtype"):
        name_of(wrong)


def test_a_tensor_names_no_type_and_is_not_printed_in_full() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"is not a dtype") as caught:
        name_of(torch.zeros(100, 100))
    assert len(str(caught.value)) < 160


def test_index_of_takes_integers_alone() -> None:
    assert dtypes.index_of(np.uint8(7), "size") == 7
    for wrong in (7.0, "7", None, True, np.True_, np.float32(7)):
        with pytest.raises(TypeError, match=r"^size must be an integer, not "):
            dtypes.index_of(wrong, "size")


def test_refusals_list_what_is_allowed() -> None:
    with pytest.raises(TypeError, match=r"cannot quantize to int64; allowed are int1, int2, int3"):
        target_of(np.int64)
    text = "^w has dtype int8; allowed are float32, float64, float16, bfloat16: convert it first$"
    with pytest.raises(TypeError, match=text):
        source_of("int8", "w")
    with pytest.raises(TypeError, match=r"no number type here is complex64; allowed are float32"):
        dtype_of("complex64")


def test_a_type_is_a_value() -> None:
    assert len({target_of("int8"), target_of(np.int8), dtype_of("int8")}) == 1
    with pytest.raises(AttributeError):
        target_of("int8").bits = 9  # type: ignore[misc]
    assert isinstance(target_of("int8"), DType)


def test_torch_is_not_imported() -> None:
    code = "import sys, quantization.ops.dtypes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_examples() -> None:
    assert doctest.testmod(dtypes).failed == 0
