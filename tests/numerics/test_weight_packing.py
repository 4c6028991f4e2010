"""pack_weights and unpack_weights: kinds, dtypes, layouts, leftovers."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from quantization.numerics import packing
from quantization.ops import dtypes
from quantization.weight_pack import (
    Packing,
    bit_shifts,
    get_dtype_size_in_bits,
    get_max_bits_needed,
    pack_weights,
    unpack_weights,
)
from tests import pack_oracle
from tests.numerics.packing_calls import codes_of
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

CONTAINERS = packing.CONTAINERS
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "packed.json").read_text())


# ---- the layouts -----------------------------------------------------------------------------


def test_default_layout_is_four_rows_in_one_byte_first_row_lowest() -> None:
    codes = codes_of(2, (8, 3))
    packed = pack_weights(codes, 2)
    first, second, third, fourth = codes[0:4]
    assert packed.dtype == np.uint8 and packed.shape == (2, 3)
    np.testing.assert_array_equal(packed[0], first + 4 * second + 16 * third + 64 * fourth)
    np.testing.assert_array_equal(unpack_weights(packed, 2), codes)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("layout", ["aligned", "dense"])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("signed", [False, True])
def test_bytes_are_the_oracles_and_the_way_back_is_exact(container, layout, dim, signed) -> None:
    for bits in range(1, 9):
        codes = codes_of(bits, signed=signed)
        packed, info = pack_weights(
            codes, bits, container, layout=layout, dim=dim, return_info=True
        )
        size = np.dtype(container).itemsize
        expected = pack_oracle.pack(codes, bits, size, dim, layout == "dense")
        np.testing.assert_array_equal(packed, expected.view(container))
        assert packed.dtype == container
        assert info == Packing(bits, layout, dim, container, (21, 13), signed)
        assert info.packed_shape == packed.shape
        back = unpack_weights(packed, info)
        assert back.dtype == codes.dtype
        np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("container", ["uint8", "int8"])
def test_base3_is_five_codes_a_byte(dim, signed, container) -> None:
    codes = np.random.default_rng(0).integers(-1 if signed else 0, 2 if signed else 3, (17, 23))
    packed, info = pack_weights(codes, 2, container, layout="base3", dim=dim, return_info=True)
    turned = codes if dim else codes.T
    expected = pack_oracle.pack_ternary(turned % 3)
    np.testing.assert_array_equal(packed, (expected if dim else expected.T).view(container))
    back = unpack_weights(packed, info)
    assert back.dtype == (np.int8 if signed else np.uint8)
    np.testing.assert_array_equal(back, codes)
    plain = unpack_weights(packed, 2, layout="base3", dim=dim, dtype=back.dtype)
    np.testing.assert_array_equal(plain[: codes.shape[0], : codes.shape[1]], codes)
    assert not plain[codes.shape[0] :].any() and not plain[:, codes.shape[1] :].any()


def test_golden_bytes_never_change() -> None:
    for case in GOLDEN:
        shape, layout = tuple(case["shape"]), case["layout"]
        codes = np.frombuffer(bytes.fromhex(case["codes"]), np.int8).reshape(shape)
        dtype = np.dtype(case["dtype"]).newbyteorder("<")
        packed = np.frombuffer(bytes.fromhex(case["packed"]), dtype)
        packed = packed.reshape(case["packed_shape"])
        if case["maker"] == "compressed-tensors":  # stores codes from 0
            codes = (codes.astype(np.int16) + (1 << case["bits"] - 1)).astype(np.uint8)
        got, info = pack_weights(
            codes, case["bits"], case["dtype"], layout=layout, dim=case["dim"], return_info=True
        )
        np.testing.assert_array_equal(got, packed, err_msg=str(case))
        np.testing.assert_array_equal(unpack_weights(packed, info), codes, err_msg=str(case))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("bits", range(1, 9))
def test_dense_int32_is_compressed_tensors_pack_quantized(bits, dim) -> None:
    torch = pytest.importorskip("torch")
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    for shape in ((5, 64), (33, 7), (31, 129), (1, 1)):
        codes = torch.from_numpy(codes_of(bits, shape, signed=True))
        theirs = helpers.pack_to_int32(codes, bits, dim)
        shifted = codes.to(torch.int16) + (1 << bits - 1)
        ours, info = pack_weights(
            shifted, bits, torch.int32, layout="dense", dim=dim, return_info=True
        )
        assert torch.equal(ours, theirs)
        back = unpack_weights(theirs, info, dtype=torch.int16) - (1 << bits - 1)
        assert torch.equal(back.to(torch.int8), codes)


# ---- what goes in and comes out --------------------------------------------------------------


@pytest.mark.parametrize("container", CONTAINERS)
def test_torch_tensors_come_back_as_torch_tensors(container) -> None:
    torch = pytest.importorskip("torch")
    codes = torch.from_numpy(codes_of(3))
    packed, info = pack_weights(codes, 3, getattr(torch, container), return_info=True)
    assert isinstance(packed, torch.Tensor) and packed.dtype == getattr(torch, container)
    expected = pack_weights(codes.numpy(), 3, container)
    np.testing.assert_array_equal(packed.numpy(), expected)
    assert torch.equal(unpack_weights(packed, info), codes)
    assert torch.equal(pack_weights(codes.T.contiguous().T, 3, container), packed)
    assert torch.equal(pack_weights(torch.nn.Parameter(codes, False), 3, container), packed)
    column = codes[:, :1].expand(-1, 13)
    assert torch.equal(unpack_weights(pack_weights(column, 3, container), info), column)
    assert unpack_weights(packed, info, dtype=torch.int64).dtype == torch.int64


@pytest.mark.parametrize("dtype", packing.INTEGERS)
def test_codes_of_every_integer_dtype(dtype) -> None:
    bits = 1 if dtype == "bool" else 3
    codes = codes_of(bits).astype(dtype)
    packed, info = pack_weights(codes, bits, layout="dense", return_info=True)
    np.testing.assert_array_equal(packed, pack_oracle.pack(codes_of(bits), bits, 1, 0, True))
    np.testing.assert_array_equal(unpack_weights(packed, info), codes)
    np.testing.assert_array_equal(unpack_weights(packed, info, dtype=dtype), codes)
    if (torch := sys.modules.get("torch")) is not None:
        again = pack_weights(torch.from_numpy(codes), bits, layout="dense")
        np.testing.assert_array_equal(again.numpy(), packed)


@pytest.mark.parametrize("dtype", packing.INTEGERS[1:])
def test_unpack_to_every_integer_dtype(dtype) -> None:
    codes = codes_of(4, signed=True)
    packed, info = pack_weights(codes, 4, return_info=True)
    back = unpack_weights(packed, info, dtype=dtype)
    assert back.dtype == dtype
    np.testing.assert_array_equal(back, codes.astype(dtype))
    plain = unpack_weights(packed, 4, dtype=dtype)[:21]
    expected = codes.astype(dtype) if dtype.startswith("int") else (codes & 15).astype(dtype)
    np.testing.assert_array_equal(plain, expected)


def test_wide_unpacking_of_unsigned_codes_keeps_their_values() -> None:
    packed, info = pack_weights(np.full((4, 2), 15), 4, return_info=True)
    assert not info.is_signed
    np.testing.assert_array_equal(unpack_weights(packed, info, dtype="int64"), 15)


@pytest.mark.parametrize(
    "make",
    [
        lambda a: np.asfortranarray(a),
        lambda a: np.repeat(np.repeat(a, 2, 0), 3, 1)[::2, ::3],
        lambda a: a[::-1, ::-1].copy()[::-1, ::-1],
        lambda a: a.astype(">u4"),
        lambda a: a.astype(">i2"),
        lambda a: np.frombuffer(b"x" + a.tobytes(), np.uint8)[1:].reshape(a.shape),
    ],
    ids=["fortran", "strided", "negative", "big-endian", "big-endian int", "read-only misaligned"],
)
def test_any_memory_layout(make) -> None:
    codes = codes_of(3)
    given_codes = make(codes)
    packed, info = pack_weights(given_codes, 3, "uint16", dim=1, return_info=True)
    np.testing.assert_array_equal(packed, pack_weights(codes, 3, "uint16", dim=1))
    np.testing.assert_array_equal(given_codes, codes)
    for again in (np.asfortranarray(packed), packed.astype(">u2"), packed[::-1][::-1].copy()):
        again.flags.writeable = False
        np.testing.assert_array_equal(unpack_weights(again, info), codes)


@pytest.mark.parametrize("layout", ["aligned", "dense", "base3"])
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (1, 1)])
@pytest.mark.parametrize("dim", [0, 1])
def test_empty_and_tiny(layout, shape, dim) -> None:
    codes = np.zeros(shape, np.uint8)
    packed, info = pack_weights(codes, 2, layout=layout, dim=dim, return_info=True)
    assert packed.shape == info.packed_shape
    assert unpack_weights(packed, info).shape == shape
    assert unpack_weights(packed, 2, layout=layout, dim=dim, size=shape[dim]).shape == shape


def test_negative_dim_is_counted_from_the_end() -> None:
    codes = codes_of(4, (4, 6))
    np.testing.assert_array_equal(pack_weights(codes, 4, dim=-1), pack_weights(codes, 4, dim=1))
    assert pack_weights(codes, 4, dim=-2, return_info=True)[1].dim == 0


def test_size_gives_the_length_and_its_absence_the_capacity() -> None:
    codes = codes_of(3, (10, 4))
    packed = pack_weights(codes, 3, layout="dense")
    assert packed.shape == (4, 4)
    np.testing.assert_array_equal(unpack_weights(packed, 3, layout="dense", size=10), codes)
    assert unpack_weights(packed, 3, layout="dense").shape == (10, 4)
    assert unpack_weights(pack_weights(codes, 2 + 1), 3).shape == (10, 4)
    assert unpack_weights(pack_weights(codes[:9], 3), 3).shape == (10, 4)


def test_compress_finds_the_narrowest_width() -> None:
    codes = np.array([[0, 5], [2, 1]])
    packed, info = pack_weights(codes, 8, compress=True, return_info=True)
    assert info.bits == 3
    np.testing.assert_array_equal(unpack_weights(packed, info), codes)
    codes = np.array([[-3, 1], [2, 1]], np.int8)
    packed, info = pack_weights(codes, 8, compress=True, return_info=True, dim=1)
    assert info.bits == 3 and info.is_signed
    np.testing.assert_array_equal(unpack_weights(packed, info), codes)
    assert pack_weights(np.zeros((4, 4), int), 8, compress=True, return_info=True)[1].bits == 1
    with pytest.raises(ValueError, match="no narrower width in layout 'base3'"):
        pack_weights(codes % 3, 2, layout="base3", compress=True)


def test_info_is_an_immutable_value() -> None:
    _, info = pack_weights(codes_of(2), 2, return_info=True)
    assert info == dataclasses.replace(info) and hash(info) == hash(dataclasses.replace(info))
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.bits = 4
    assert Packing(2, "aligned", -2, "uint8", [3, 4], False).shape == (3, 4)
    same = Packing(np.int64(2), "aligned", -2, np.uint8, [3, 4], np.False_)
    assert repr(same) == repr(Packing(2, "aligned", 0, "uint8", (3, 4), False))
    with pytest.raises(ValueError, match="shape must be"):
        Packing(2, "aligned", 0, "uint8", (3,), False)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 8),
    st.tuples(st.integers(0, 70), st.integers(0, 70)),
    st.sampled_from(CONTAINERS),
    st.sampled_from(["aligned", "dense"]),
    st.integers(0, 1),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_round_trips(bits, shape, container, layout, dim, signed, seed) -> None:
    codes = codes_of(bits, shape, signed, seed)
    packed, info = pack_weights(codes, bits, container, layout=layout, dim=dim, return_info=True)
    np.testing.assert_array_equal(unpack_weights(packed, info), codes)
    dtype = codes.dtype
    size = None if shape[dim] == 0 else shape[dim]
    plain = unpack_weights(packed, bits, dtype=dtype, layout=layout, dim=dim, size=size)
    np.testing.assert_array_equal(plain, codes)
    widths = pack_weights(codes, bits, compress=True, return_info=True)
    assert widths[1].bits == get_max_bits_needed(codes) <= bits


# ---- widths ----------------------------------------------------------------------------------


def test_bit_shifts() -> None:
    assert bit_shifts(1) == (0, 1, 2, 3, 4, 5, 6, 7)
    assert bit_shifts(3) == (0, 3)
    assert bit_shifts(8) == (0,)
    assert bit_shifts(7, np.int32) == (0, 7, 14, 21)
    with pytest.raises(ValueError, match="pack_bits must be"):
        bit_shifts(9)


def test_get_dtype_size_in_bits() -> None:
    for name, dtype in (dtypes.SOURCES | dtypes.TARGETS).items():
        assert get_dtype_size_in_bits(name) == get_dtype_size_in_bits(dtype) == dtype.bits
    assert get_dtype_size_in_bits(bool) == 8
    assert get_dtype_size_in_bits(np.int64) == get_dtype_size_in_bits(np.dtype(">u8")) == 64
    torch = pytest.importorskip("torch")
    for dtype in (torch.uint8, torch.bfloat16, torch.float8_e5m2, torch.int64, torch.complex64):
        assert get_dtype_size_in_bits(dtype) == dtype.itemsize * 8
    assert get_dtype_size_in_bits(torch.uint4) == 4


@pytest.mark.parametrize(
    ("low", "high", "bits"),
    [
        *((0, 0, 1), (0, 1, 1), (0, 2, 2), (0, 255, 8), (0, 256, 9), (-1, -1, 1), (-1, 0, 1)),
        *((-1, 1, 2), (-2, 1, 2), (-2, 2, 3), (-128, 127, 8), (-129, 0, 9), (-5, -3, 4)),
        (-(2**63), 2**63 - 1, 64),
    ],
)
def test_get_max_bits_needed(low, high, bits) -> None:
    assert get_max_bits_needed(np.array([[[low, high]]])) == bits


def test_get_max_bits_needed_of_odd_inputs() -> None:
    assert get_max_bits_needed(np.zeros((0, 3), np.uint8)) == 1
    assert get_max_bits_needed(np.array(True)) == 1
    assert get_max_bits_needed(np.array([2**64 - 1], np.uint64)) == 64
    with pytest.raises(TypeError, match="dtype of tensor is float64"):
        get_max_bits_needed(np.zeros(3))
    torch = pytest.importorskip("torch")
    assert get_max_bits_needed(torch.tensor([-9, 3])) == 5


def test_packing_works_without_torch() -> None:
    program = """
import sys
sys.modules["torch"] = None  # an import of torch fails
import numpy as np
from quantization import pack_weights, unpack_weights
codes = np.arange(8).reshape(8, 1) % 4
assert (unpack_weights(pack_weights(codes, 2), 2) == codes).all()
"""
    subprocess.run([sys.executable, "-c", program], check=True)
