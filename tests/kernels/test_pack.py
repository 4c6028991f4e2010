"""Packing kernels: every layout, width, container and length on every instruction set."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from quantization import _kernels
from tests import pack_oracle
from tests.memory import Guarded, at_page_end
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

WIDTHS = range(1, 9)
CONTAINERS = (1, 2, 4, 8)
LENGTHS = [*range(131), 257, 1031]
LAYOUTS = [*itertools.product((0, 1), (False, True))]  # axis, straddle


def random_codes(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Bytes with garbage above every width: only the low bits may count."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def same(got: np.ndarray, want: np.ndarray) -> None:
    if not np.array_equal(got, want):  # np.testing is slow when all is well
        np.testing.assert_array_equal(got, want)


def check_both_ways(codes, bits, container, axis, straddle, offset=1) -> None:
    expected = pack_oracle.pack(codes, bits, container, axis, straddle)
    layout = (*codes.shape, bits, container, axis, int(straddle))
    packed = Guarded(expected.shape, f"u{container}", offset)
    _kernels.pack(packed.array, codes, *layout)
    same(packed.array, expected)
    packed.check()
    is_signed = (codes.size + straddle + bits) % 2
    back = Guarded(codes.shape, np.uint8, offset)
    _kernels.unpack(back.array, packed.array, *layout, is_signed)
    same(back.array, pack_oracle.unpacked(codes, bits, bool(is_signed)).view(np.uint8))
    back.check()


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_length_along_rows(isa, bits, container) -> None:
    for length in LENGTHS:
        for straddle in (False, True):
            check_both_ways(random_codes((2, length), length), bits, container, 1, straddle)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_length_down_columns(isa, bits, container) -> None:
    for length in LENGTHS:
        for straddle in (False, True):
            check_both_ways(random_codes((length, 3), length), bits, container, 0, straddle)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_number_of_columns(isa, bits, container) -> None:
    for cols in LENGTHS:
        for straddle in (False, True):
            check_both_ways(random_codes((19, cols), cols), bits, container, 0, straddle)


@pytest.mark.parametrize("offset", [0, 1, 3, 7, 13])
def test_any_address(isa, offset) -> None:
    source = random_codes((40, 77))
    codes = source.reshape(-1)[offset : offset + 37 * 75].reshape(37, 75)
    for bits, container, (axis, straddle) in itertools.product(WIDTHS, CONTAINERS, LAYOUTS):
        check_both_ways(codes, bits, container, axis, straddle, offset)


@pytest.mark.parametrize("bits", WIDTHS)
def test_nothing_is_read_past_the_inputs(isa, bits) -> None:
    for length, container, (axis, straddle) in itertools.product(
        (1, 7, 8, 9, 31, 63, 65, 100, 130), CONTAINERS, LAYOUTS
    ):
        shape = (length, 5) if axis == 0 else (2, length)
        codes = at_page_end(random_codes(shape, length))
        expected = pack_oracle.pack(codes, bits, container, axis, straddle)
        layout = (*shape, bits, container, axis, int(straddle))
        packed, back = np.empty_like(expected), np.empty(shape, np.uint8)
        _kernels.pack(packed, codes, *layout)
        np.testing.assert_array_equal(packed, expected)
        _kernels.unpack(back, at_page_end(packed), *layout, 0)
        np.testing.assert_array_equal(back, pack_oracle.unpacked(codes, bits, False))


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_thread_counts_give_the_same_bytes(isa, threads) -> None:
    shapes = [(701, 301), (1, 200_001), (60_003, 3), (3, 80_003)]
    try:
        _kernels.set_num_threads(threads)
        for shape, (axis, straddle), bits in itertools.product(shapes, LAYOUTS, (3, 4)):
            expected = pack_oracle.pack(random_codes(shape), bits, 2, axis, straddle)
            packed, back = Guarded(expected.shape, np.uint16), Guarded(shape, np.uint8)
            layout = (*shape, bits, 2, axis, int(straddle))
            _kernels.pack(packed.array, random_codes(shape), *layout)
            np.testing.assert_array_equal(packed.array, expected)
            _kernels.unpack(back.array, packed.array, *layout, 0)
            np.testing.assert_array_equal(back.array, random_codes(shape) & ((1 << bits) - 1))
            packed.check()
            back.check()
        check_ternary(np.random.default_rng(0).integers(0, 3, (701, 301), dtype=np.uint8))
    finally:
        _kernels.set_num_threads(0)


def check_ternary(codes: np.ndarray) -> None:
    expected = pack_oracle.pack_ternary(codes)
    packed = Guarded(expected.shape, np.uint8)
    _kernels.pack_ternary(packed.array, codes, *codes.shape)
    np.testing.assert_array_equal(packed.array, expected)
    packed.check()
    back = Guarded(codes.shape, np.uint8)
    _kernels.unpack_ternary(back.array, packed.array, *codes.shape)
    np.testing.assert_array_equal(back.array, codes)
    back.check()


def test_ternary_of_every_length(isa) -> None:
    for length in LENGTHS:
        codes = np.random.default_rng(length).integers(0, 3, (3, length), dtype=np.uint8)
        check_ternary(codes)
        check_ternary(at_page_end(codes) if codes.size else codes)


def test_ternary_has_every_byte(isa) -> None:
    """All 243 groups of five digits, each to its own byte."""
    codes = np.array([*itertools.product(range(3), repeat=5)], np.uint8)[:, ::-1].copy()
    check_ternary(codes)
    packed = np.empty((243, 1), np.uint8)
    _kernels.pack_ternary(packed, codes, 243, 5)
    np.testing.assert_array_equal(packed[:, 0], np.arange(243))


@pytest.mark.parametrize(
    ("bits", "container", "axis", "reason"),
    [
        (0, 1, 0, r"bits must be 1\.\.8"),
        (9, 2, 0, r"bits must be 1\.\.8"),
        (4, 3, 0, r"bits must be 1\.\.8"),
        (4, 16, 1, r"bits must be 1\.\.8"),
        (4, 1, 2, "axis that is out of range"),
    ],
)
def test_layouts_that_do_not_exist_are_refused(bits, container, axis, reason) -> None:
    codes, packed = np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.uint8)
    with pytest.raises(ValueError, match=reason):
        _kernels.pack(packed, codes, 4, 4, bits, container, axis, 0)
    with pytest.raises(ValueError, match=reason):
        _kernels.unpack(codes, packed, 4, 4, bits, container, axis, 0, 0)


def test_overlap_is_refused_before_anything_is_written() -> None:
    memory = np.arange(64, dtype=np.uint8)
    codes, packed = memory.reshape(8, 8), memory[48:].reshape(2, 8)
    digits, fives = memory[52:61], memory[60:62].reshape(1, 2)
    for call in (
        lambda: _kernels.pack(packed, codes, 8, 8, 2, 1, 0, 0),
        lambda: _kernels.unpack(codes, packed, 8, 8, 2, 1, 0, 0, 0),
        lambda: _kernels.pack_ternary(fives, digits, 1, 9),
        lambda: _kernels.unpack_ternary(digits, fives, 1, 9),
    ):
        with pytest.raises(ValueError, match="shares memory"):
            call()
    np.testing.assert_array_equal(memory, np.arange(64))


def test_sizes_beyond_memory_are_refused() -> None:
    one = np.zeros((1, 1), np.uint8)
    for rows, cols in ((1 << 62, 8), (1 << 33, 1 << 33), (-1, 1)):
        with pytest.raises((ValueError, OverflowError)):
            _kernels.pack(one, one, rows, cols, 4, 1, 0, 0)


@pytest.mark.parametrize("bits", WIDTHS)
def test_what_the_codes_fit(isa, bits, rng) -> None:
    """One code that does not fit is seen wherever it lies, on every path."""
    half, both = 1 << (bits - 1), _kernels.FITS_UNSIGNED | _kernels.FITS_SIGNED
    for (axis, straddle), container in itertools.product(LAYOUTS, CONTAINERS):
        for shape in ((3, 5), (70, 3), (2, 999), (41, 200)):
            packed = np.empty_like(
                pack_oracle.pack(np.zeros(shape, np.uint8), bits, container, axis, straddle)
            )
            layout = (*shape, bits, container, axis, int(straddle))

            def fits(codes, packed=packed, layout=layout):
                return _kernels.pack(packed, codes.astype(np.int64).astype(np.uint8), *layout)

            assert fits(rng.integers(0, half, shape)) == both
            codes = rng.integers(-half, half, shape)
            codes[0, 0] = half - 1
            at = tuple(rng.integers(0, n) for n in shape)
            codes[at] = -1
            assert fits(codes) == (both if bits == 8 else _kernels.FITS_SIGNED)
            codes = rng.integers(0, 2 * half, shape)
            codes[at] = half
            assert fits(codes) == (both if bits == 8 else _kernels.FITS_UNSIGNED)
            if bits < 8:
                codes = rng.integers(0, half, shape)
                codes[at] = 2 * half
                assert fits(codes) == 0
