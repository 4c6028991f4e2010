"""Numbers at the edges: ties, zeros, subnormals, overflow, NaN and infinity, threads."""

from __future__ import annotations

import mmap
import sys

import numpy as np
import pytest

from quantization import _kernels
from quantization._kernels import DataError
from tests import oracle
from tests.kernels import quantize_calls as calls
from tests.kernels.quantize_calls import same, same_numbers
from tests.oracle import FLOAT_CODES, FORMATS, SOURCES, Spec
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

ROW = (1, 1 << 20)
MAP_NORESERVE = 0x4000  # not in the mmap module of CPython 3.11
ASYMMETRIC = Spec(mode="asymmetric", code_min=-128)
UNSIGNED = Spec(code="uint8", code_min=0, code_max=255)


def as_source(spec: Spec, source: str) -> Spec:
    return oracle.replace(
        spec, source=source, scale="float64" if source == "float64" else "float32"
    )


def stored_row(values: list[float], source: str) -> np.ndarray:
    return calls.stored(np.array([values]), source)


# ---- the conversions of scalar.h, every pattern ------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_every_pattern_decodes_to_its_number(isa: str, name: str) -> None:
    storage = np.dtype(oracle.STORAGE[name])
    bits = np.arange(256**storage.itemsize, dtype=storage).reshape(1, -1)
    for scale_type, out in ((np.float32, "float32"), (np.float64, "float64")):
        made = calls.decode(bits, np.ones((1, 1), scale_type), None, bits.shape, name, out)
        assert same_numbers(made.astype(np.float64), oracle.numbers(bits, name), "float64")


@pytest.mark.parametrize("name", FORMATS)
def test_every_finite_pattern_survives_encode(isa: str, name: str) -> None:
    storage = np.dtype(oracle.STORAGE[name])
    bits = np.arange(256**storage.itemsize, dtype=storage).reshape(1, -1)
    values = oracle.numbers(bits, name)
    for source, compute in (("float32", np.float32), ("float64", np.float64)):
        spec = as_source(Spec().to_float(name), source)
        made = calls.encode(
            values.astype(compute), np.ones((1, 1), compute), None, bits.shape, spec
        )
        top = oracle.largest(name)
        kept = np.where(np.isnan(values), 0, np.clip(values, -top, top))
        assert (oracle.numbers(made, name) == kept).all()
        assert (made == bits)[np.isfinite(values)].all()


@pytest.mark.parametrize("name", FORMATS)
def test_what_lies_between_two_patterns_goes_to_the_nearer_or_the_even(isa: str, name: str) -> None:
    ladder = oracle._ladder(name)
    middles = ((ladder[:-1] + ladder[1:]) / 2)[:-1]
    if name == "bfloat16":  # the middles of its subnormals are float32 numbers too
        assert (middles.astype(np.float32) == middles).all()
    middles = middles.astype(np.float32)
    below, above = (np.nextafter(middles, np.float32(to)) for to in (0, np.inf))
    code = np.arange(middles.size)
    check_rounding(below, code, name)
    check_rounding(middles, code + code % 2, name)
    check_rounding(above, code + 1, name)


def check_rounding(values: np.ndarray, code: np.ndarray, name: str) -> None:
    """Both as codes under scale 1, and as the output of a decode of float32 codes."""
    storage, one = oracle.STORAGE[name], np.ones((1, 1), np.float32)
    exponent_bits, mantissa_bits = FORMATS[name]
    for sign in (0, 1):
        expected = code + (sign << exponent_bits + mantissa_bits)
        row = (-values if sign else values).reshape(1, -1)
        made = calls.encode(row, one, None, row.shape, Spec().to_float(name))
        assert (made == expected.astype(storage)).all()
        if name in SOURCES:
            decoded = calls.decode(row, one, None, row.shape, "float32", name)
            assert (decoded == expected.astype(storage)).all()


# ---- ties, zeros, small and large numbers ------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
def test_halves_go_to_the_even_code(isa: str, source: str) -> None:
    spec = as_source(Spec(), source)
    halves = np.arange(-126.5, 127) / 4
    row = stored_row([*halves, 127 / 4], source)
    made = calls.quantize(row, ROW, spec)
    assert made.scale == 0.25
    assert (made.codes[0, :-1] == np.rint(halves * 4)).all()
    assert (made.codes[0, :-1] % 2 == 0).all()


@pytest.mark.parametrize("spec", [Spec(), ASYMMETRIC, UNSIGNED, Spec().to_float("float8_e4m3fn")])
@pytest.mark.parametrize("source", SOURCES)
def test_zeros_of_both_signs_are_exact(isa: str, spec: Spec, source: str) -> None:
    spec = as_source(spec, source)
    row = stored_row([0.0, -0.0] * 20, source)
    made = calls.quantize(row, ROW, spec)
    assert made.scale == 1
    decoded = calls.decode(made.codes, made.scale, made.zero, ROW, spec.code, source)
    assert (oracle.numbers(decoded, source) == 0).all()
    if spec.mode == "asymmetric":
        assert (made.codes == made.zero).all()


def test_binary_zeros_have_scale_zero_and_codes_plus_one(isa: str) -> None:
    spec = Spec(mode="binary", code_min=-1, code_max=1)
    made = calls.quantize(np.array([[0.0, -0.0, 0.0]], np.float32), ROW, spec)
    assert made.scale == 0
    assert (made.codes == 1).all()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("spec", [Spec(), Spec(code_min=-128), ASYMMETRIC])
def test_no_floor_under_the_scale(isa: str, spec: Spec, source: str) -> None:
    """Every power of two of the type, down to the last subnormal, comes back within half a step."""
    spec = as_source(spec, source)
    low = {"float64": -1074, "float16": -24, "bfloat16": -133}.get(source, -149)
    high = {"float64": 1023, "float16": 15}.get(source, 127)
    powers = np.ldexp(1.0, np.arange(low, high + 1))
    rows = np.stack([powers, -powers, powers / 3, powers * 0], axis=1)
    bits = calls.stored(rows, source)
    x = oracle.numbers(bits, source)
    made = calls.quantize(bits, (1, 4), spec)
    assert (made.scale > 0).all()
    scale, zero = oracle.measure(x, (1, 4), spec)
    assert same(made.scale, scale)
    assert same(made.zero, zero)
    number = (made.codes.astype(np.float64) - made.zero) * made.scale
    slack = 0.5 * (1 + 2**-9)
    assert (np.abs(number - x) <= slack * made.scale.astype(np.float64)).all()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("code", FLOAT_CODES)
def test_float_targets_from_the_smallest_to_the_largest(isa: str, source: str, code: str) -> None:
    spec = as_source(Spec().to_float(code), source)
    top = oracle.largest(source)
    for size in (top, top / 3, 1.0, 1e-3, 2.0**-24, 1e-40 if source != "float16" else 2.0**-20):
        row = stored_row([size, -size / 7, size / 1000, 0.0], source)
        x = oracle.numbers(row, source)
        made = calls.quantize(row, (1, 4), spec)
        scale, zero = oracle.measure(x, (1, 4), spec)
        assert same(made.scale, scale)
        expected = oracle.encode(x, oracle.spread(scale, (1, 4), x.shape), zero, spec)
        assert same_numbers(made.codes, expected, code)
        assert np.isfinite(oracle.numbers(made.codes, code)).all()


@pytest.mark.parametrize("source", SOURCES)
def test_a_range_wider_than_the_type(isa: str, source: str) -> None:
    """max - min overflows, the scale does not; one bit cannot hold it and says so."""
    spec, top = as_source(ASYMMETRIC, source), oracle.largest(source)
    row = stored_row([top, -top, top / 3, 0.0], source)
    made = calls.quantize(row, ROW, spec)
    scale, zero = oracle.measure(oracle.numbers(row, source), ROW, spec)
    assert np.isfinite(made.scale).all()
    assert same(made.scale, scale)
    assert same(made.zero, zero)
    assert (np.abs(made.codes[0, :2] - [127.0, -128.0]) <= 1).all()
    if source != "float16":
        one_bit = as_source(Spec(code="uint8", mode="asymmetric", code_min=0, code_max=1), source)
        with pytest.raises(ValueError, match="wider type for the scales"):
            calls.quantize(row, ROW, one_bit)


def test_a_scale_too_large_for_its_type_is_refused(isa: str) -> None:
    row = np.array([[1e7, 1.0]], np.float32)
    with pytest.raises(ValueError, match="wider type for the scales"):
        calls.quantize(row, ROW, Spec(scale="float16"))
    assert calls.quantize(row, ROW, Spec(scale="bfloat16")).scale == 78848


@pytest.mark.parametrize("scale", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_a_subnormal_scale_is_moved_up_rather_than_clip(isa: str, scale: str) -> None:
    """A block that is not all zero never gets scale 0, and its largest number never clips."""
    smallest = oracle.SMALLEST_NORMAL[scale]
    for size in (*np.geomspace(smallest * 127 / 1e6, smallest * 120, 200), 1e-30):
        row = np.array([[size, -size / 2]], np.float32)
        made = calls.quantize(row, ROW, Spec(scale=scale))
        assert same(made.scale, oracle.measure(row.astype(np.float64), ROW, Spec(scale=scale))[0])
        assert float(made.scale[0, 0]) * 127 >= float(row[0, 0])


def test_a_sum_that_overflows_does_not_spoil_the_mean(isa: str) -> None:
    row = np.full((1, 9), oracle.largest("float64"))
    spec = as_source(Spec(mode="binary", code_min=-1, code_max=1), "float64")
    assert calls.quantize(row, ROW, spec).scale == oracle.largest("float64")


# ---- NaN, infinity, negative numbers -----------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("block", [(1, 40), (6, 1), (6, 40), (1, 8), (4, 1)])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_first_non_finite_number_is_named(
    isa: str, rng: np.random.Generator, source: str, block: calls.Block, bad: float
) -> None:
    for mode, low in (("symmetric", -127), ("asymmetric", -128), ("binary", -1)):
        spec = as_source(Spec(mode=mode, code_min=low, code_max=1 if low == -1 else 127), source)
        x = rng.standard_normal((6, 40))
        places = np.sort(rng.choice(x.size, 3, replace=False))
        x.flat[places] = bad
        with pytest.raises(DataError, match="NaN or an infinity") as caught:
            calls.quantize(calls.stored(x, source), block, spec)
        assert caught.value.args[1] == places[0]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("position", range(0, 40, 3))
def test_a_kept_block_is_marked_and_the_others_are_not(
    isa: str, rng: np.random.Generator, source: str, position: int
) -> None:
    x = rng.standard_normal((3, 40))
    x[1, position] = [np.nan, np.inf, -np.inf][position % 3]
    for base in (Spec(), ASYMMETRIC, Spec().to_float("float8_e5m2"), Spec(scale="float16")):
        spec = oracle.replace(as_source(base, source), keep_non_finite=True)
        bits = calls.stored(x, source)
        made = calls.quantize(bits, (1, 40), spec)
        clean = calls.quantize(bits[[0, 2]], (1, 40), spec)
        assert same(made.scale[[0, 2]], clean.scale)
        assert same(made.codes[[0, 2]], clean.codes)
        assert np.isnan(made.scale[1, 0])
        assert made.zero[1, 0] == 0
        assert (made.codes[1] == 0).all()
        decoded = calls.decode(made.codes, made.scale, made.zero, (1, 40), spec.code, source)
        assert np.isnan(oracle.numbers(decoded[1], source)).all()
        assert np.isfinite(oracle.numbers(decoded[[0, 2]], source)).all()


@pytest.mark.parametrize("source", SOURCES)
def test_codes_without_a_sign_refuse_negative_numbers(isa: str, source: str) -> None:
    spec = as_source(UNSIGNED, source)
    row = stored_row([0.5, -0.0, 1.0] * 30, source)
    made = calls.quantize(row, ROW, spec)
    assert made.codes.max() == 255
    row[0, 57] = row[0, 80] = stored_row([-1e-3], source)[0, 0]
    with pytest.raises(DataError, match="without a sign") as caught:
        calls.quantize(row, ROW, spec)
    assert caught.value.args[1] == 57


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_kept_block_of_codes_without_a_sign_is_marked_too(
    isa: str, source: str, bad: float
) -> None:
    spec = oracle.replace(as_source(UNSIGNED, source), keep_non_finite=True)
    rows = stored_row([1.0, bad, 2.0] * 9 + [4.0] * 27, source).reshape(2, 27)
    made = calls.quantize(rows, (1, 27), spec)
    assert np.isnan(made.scale[0, 0]) and (made.codes[0] == 0).all()
    assert (made.codes[1] == 255).all()
    rows[1, 5] = stored_row([-0.5], source)[0, 0]
    with pytest.raises(DataError, match="without a sign") as caught:
        calls.quantize(rows, (1, 27), spec)
    assert caught.value.args[1] == 27 + 5


# ---- threads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [(400, 700), (1, 700), (400, 1), (1, 32), (50, 1), (7, 300)])
@pytest.mark.parametrize("spec", [Spec(), ASYMMETRIC, Spec(mode="binary", code_min=-1, code_max=1)])
@pytest.mark.usefixtures("restore_threads")
def test_any_number_of_threads_gives_the_same_bits(
    isa: str, rng: np.random.Generator, spec: Spec, block: calls.Block
) -> None:
    matrix = rng.standard_normal((400, 700), np.float32)
    results = []
    for threads in (1, 2, 7):
        _kernels.set_num_threads(threads)
        made = calls.quantize(matrix, block, spec)
        decoded = calls.decode(made.codes, made.scale, made.zero, block, spec.code, "float16")
        results.append((*made, decoded))
    for other in results[1:]:
        assert all(same(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.usefixtures("restore_threads")
def test_threads_find_the_first_culprit(isa: str, rng: np.random.Generator) -> None:
    matrix = rng.standard_normal((400, 700), np.float32)
    matrix[399, 699] = matrix[211, 5] = np.nan
    for threads in (1, 2, 7):
        _kernels.set_num_threads(threads)
        for block in [(400, 700), (1, 700), (400, 1), (1, 32)]:
            with pytest.raises(DataError) as caught:
                calls.quantize(matrix, block, Spec())
            assert caught.value.args[1] == 211 * 700 + 5


# ---- more elements than 32 bits count ----------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="maps memory that is never filled")
def test_more_than_two_to_the_31_elements() -> None:
    """Zeros that the kernel maps but never stores; only the last row holds something."""
    rows, cols = (1 << 15) + 3, 1 << 16
    area = mmap.mmap(-1, rows * cols * 2, flags=mmap.MAP_PRIVATE | MAP_NORESERVE)
    bits = np.frombuffer(area, np.uint16).reshape(rows, cols)
    bits[-1, -1] = calls.stored(np.array([-254.0]), "float16")[0]
    scale = np.zeros((rows, 1), np.float32)
    spec = calls.arguments(as_source(Spec(), "float16"))
    _kernels.measure(scale, None, bits, rows, cols, 1, cols, *spec)
    assert (scale[:-1] == 1).all()
    assert scale[-1, 0] == 2
    whole = scale[:1].copy()
    _kernels.measure(whole, None, bits, rows, cols, rows, cols, *spec)
    assert whole[0, 0] == 2
