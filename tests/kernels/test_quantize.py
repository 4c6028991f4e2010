"""quantize, measure, encode and decode: each slot of each ISA against the oracle, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from tests import oracle
from tests.kernels import quantize_calls as calls
from tests.kernels.quantize_calls import same, same_numbers
from tests.oracle import FLOAT_CODES, INTEGER_CODES, SOURCES, Spec
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

INTEGER_SPECS = [
    Spec(),
    Spec(code_min=-128),
    Spec(code_min=-7, code_max=7),
    Spec(code_min=-2, code_max=1),
    Spec(code_min=-1, code_max=1, mode="binary"),
    Spec(code_min=-1, code_max=1, mode="binary", code="int16"),
    Spec(code_min=-128, mode="asymmetric"),
    Spec(code_min=-8, code_max=7, mode="asymmetric"),
    Spec(code_min=0, code_max=255, mode="asymmetric", code="uint8"),
    Spec(code_min=0, code_max=1, mode="asymmetric", code="uint8"),
    Spec(code_min=3, code_max=90, mode="asymmetric", code="uint8"),
    Spec(code_min=-32767, code_max=32767, code="int16"),
    Spec(code_min=-32768, code_max=32767, mode="asymmetric", code="int16"),
    Spec(scale="float16"),
    Spec(code_min=-128, mode="asymmetric", scale="bfloat16"),
]
SPECS = INTEGER_SPECS + [Spec().to_float(code) for code in FLOAT_CODES]


def name_of(spec: Spec) -> str:
    return f"{spec.code}-{spec.mode}-{spec.code_min:g}..{spec.code_max:g}-{spec.scale}"


def with_source(spec: Spec, source: str) -> Spec:
    scale = "float64" if source == "float64" and spec.scale == "float32" else spec.scale
    return oracle.replace(spec, source=source, scale=scale)


def weights(rng: np.random.Generator, shape: tuple[int, int], source: str) -> np.ndarray:
    """Stored weights: normal, with ties, zeros of both signs and a few very small numbers."""
    x = rng.standard_normal(shape) * rng.choice([1e-3, 1.0, 300.0])
    kind = rng.integers(0, 12, shape)
    x = np.where(kind == 0, 0.0, x)
    x = np.where(kind == 1, -0.0, x)
    x = np.where(kind == 2, np.rint(x * 8) / 16, x)
    x = np.where(kind == 3, x * 1e-7, x)
    return calls.stored(x, source)


def check(source: np.ndarray, block: calls.Block, spec: Spec, offset: int = 0) -> None:
    """Everything about one matrix: scales, zero points, codes and what the codes decode to."""
    x = oracle.numbers(source, spec.source)
    made = calls.quantize(source, block, spec, offset)
    scale, zero = oracle.measure(x, block, spec)
    assert same(made.scale, scale)
    assert same(made.zero, zero)
    scales, zeros = (oracle.spread(each, block, x.shape) for each in (scale, zero))
    codes = oracle.encode(x, scales, zeros, spec)
    assert same_numbers(made.codes, codes, spec.code)
    for out in (spec.source,) if spec.source == "float64" else ("float32", "float16", "bfloat16"):
        decoded = calls.decode(made.codes, made.scale, made.zero, block, spec.code, out, offset)
        expected = oracle.decode(codes, scales, zeros, spec.code, out)
        assert same_numbers(decoded, expected, out)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_every_pair_of_types(isa: str, rng: np.random.Generator, spec: Spec, source: str) -> None:
    spec = with_source(spec, source)
    shapes = [(1, 9), (3, 33), (4, 70)]
    for i, shape in enumerate(shapes):
        blocks = [(1, shape[1]), (shape[0], 1), shape, (1, 32), (2, 7)]
        for block in blocks:
            check(weights(rng, shape, source), block, spec, offset=i)


@pytest.mark.parametrize("source", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("mode", ["symmetric", "asymmetric"])
def test_every_length(isa: str, rng: np.random.Generator, source: str, mode: str) -> None:
    spec = Spec(source=source, mode=mode, code_min=-127 if mode == "symmetric" else -128)
    for length in range(1, 131):
        matrix = weights(rng, (2, length), source)
        check(matrix, (1, length), spec, offset=length % 64)
        check(matrix, (2, 1), spec, offset=(length + 1) % 64)


@pytest.mark.parametrize("group", [1, 2, 3, 7, 8, 16, 31, 32, 33, 64, 100, 128, 129, 1000])
@pytest.mark.parametrize("dim", [0, 1])
def test_groups_with_a_ragged_last_one(
    isa: str, rng: np.random.Generator, group: int, dim: int
) -> None:
    matrix = weights(rng, (130, 5) if dim == 0 else (5, 130), "float32")
    block = (group, 1) if dim == 0 else (1, group)
    check(matrix, block, Spec())
    check(matrix, block, Spec(code="uint8", mode="asymmetric", code_min=0, code_max=15))


@pytest.mark.parametrize("offset", [*range(9), 15, 17, 31, 33, 63])
def test_any_address(isa: str, rng: np.random.Generator, offset: int) -> None:
    for source in SOURCES:
        spec = with_source(Spec(), source)
        check(weights(rng, (3, 70), source), (1, 70), spec, offset)
        check(weights(rng, (3, 70), source), (3, 1), spec, offset)


@pytest.mark.parametrize("block", [(70, 1100), (1, 1100), (70, 1), (1, 32), (16, 1), (3, 700)])
def test_more_blocks_than_a_tile_holds(
    isa: str, rng: np.random.Generator, block: calls.Block
) -> None:
    check(weights(rng, (70, 1100), "float32"), block, Spec())
    check(weights(rng, (70, 1100), "bfloat16"), block, with_source(SPECS[4], "bfloat16"))


def test_a_block_longer_than_a_line(isa: str, rng: np.random.Generator) -> None:
    for shape in [(1, 70001), (3, 40001)]:
        check(weights(rng, shape, "float32"), (1, shape[1]), Spec())
        check(weights(rng, shape, "float32"), shape, Spec(code_min=-128, mode="asymmetric"))


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0)])
@pytest.mark.parametrize("block", [(1, 1), (4, 4), (1, 32)])
def test_no_elements_is_no_work(shape: tuple[int, int], block: calls.Block) -> None:
    made = calls.quantize(np.empty(shape, np.float32), block, Spec())
    assert made.codes.shape == shape
    decoded = calls.decode(made.codes, made.scale, made.zero, block, "int8", "float32")
    assert decoded.shape == shape


@pytest.mark.parametrize("code", INTEGER_CODES)
def test_encode_obeys_given_scales(isa: str, rng: np.random.Generator, code: str) -> None:
    """Also scales that measure would never make: 0, NaN, infinity, negative, tiny and huge."""
    low, high = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-32768, 32767)}[code]
    scale = np.array([[0.0, -0.0, np.nan, np.inf, -0.5, 1e-45, 3e38, 0.25]], np.float32).T
    zero = rng.integers(low, high + 1, scale.shape).astype(np.int32)
    x = rng.standard_normal((8, 50))
    x[:, :6] = [np.nan, np.inf, -np.inf, 0.0, -0.0, 3e38]
    for source in SOURCES:
        spec = Spec(source=source, code=code, mode="asymmetric", code_min=low, code_max=high)
        bits, scales = calls.stored(x, source), scale.astype(spec.compute)
        for zeros in (zero, None):
            made = calls.encode(bits, scales, zeros, (1, 50), spec)
            spread_zeros = np.broadcast_to(zero if zeros is not None else 0, x.shape)
            stored = oracle.numbers(bits, source)
            expected = oracle.encode(
                stored, np.broadcast_to(scales, x.shape), np.asarray(spread_zeros), spec
            )
            assert same(made, expected)


@pytest.mark.parametrize("code", [*INTEGER_CODES, *FLOAT_CODES])
@pytest.mark.parametrize("out", SOURCES)
def test_decode_of_every_code(isa: str, rng: np.random.Generator, code: str, out: str) -> None:
    """All 256 or 65536 codes (random bits for float32) under ordinary and odd scales."""
    storage = np.dtype(oracle.STORAGE[code])
    if code == "float32":
        codes = rng.integers(0, 2**32, (8, 512), np.uint32).view(np.float32)
    else:
        unsigned = np.arange(256**storage.itemsize, dtype=f"u{storage.itemsize}")
        codes = unsigned.view(storage).reshape(-1, 256)
    scale = rng.standard_normal((codes.shape[0], 1))
    scale.flat[:3] = [1.0, 1e-30, 7.0]
    scale = scale.astype(np.float64 if out == "float64" else np.float32)
    zero = rng.integers(-32768, 32768, scale.shape).astype(np.int32)
    for zeros in (np.zeros_like(zero), zero):
        block = (1, codes.shape[1])
        made = calls.decode(codes, scale, zeros, block, code, out)
        each = [np.broadcast_to(a, codes.shape) for a in (scale, zeros)]
        assert same_numbers(made, oracle.decode(codes, *each, code, out), out)
    assert same(
        calls.decode(codes, scale, None, block, code, out),
        calls.decode(codes, scale, np.zeros_like(zero), block, code, out),
    )
