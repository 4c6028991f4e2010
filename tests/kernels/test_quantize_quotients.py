"""Codes where a quotient rounded in another way than by a division would differ: near halves, far
out, under odd scales and zero points; in each of the ways that the kernels walk over blocks."""

from __future__ import annotations

import numpy as np
import pytest

from tests import oracle
from tests.kernels import quantize_calls as calls
from tests.oracle import Spec
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

SIGNED = Spec(mode="asymmetric", code_min=-128)
UNSIGNED = Spec(code="uint8", mode="asymmetric", code_min=0, code_max=255)
NARROW = Spec(mode="asymmetric", code_min=3, code_max=12)
SPECS = [SIGNED, UNSIGNED, NARROW]
WALKS = ["row", "4", "8", "16", "32", "64", "48", "column"]


def divided(x: np.ndarray, scale: np.ndarray, zero: np.ndarray, spec: Spec) -> np.ndarray:
    """The formula of qk_encode in float32."""
    with np.errstate(all="ignore"):
        quotient = x / scale
        code = np.rint(quotient) + zero.astype(np.float32)
    code = np.clip(code, np.float32(spec.code_min), np.float32(spec.code_max))
    return np.where(np.isnan(quotient), 0, code).astype(oracle.STORAGE[spec.code])


def check(x: np.ndarray, scale: np.ndarray, zero: np.ndarray, spec: Spec, walk: str) -> None:
    """Row i of x is to be divided by scale[i], however the blocks lie in memory."""
    rows, cols = x.shape
    expected = divided(x, scale[:, None], zero[:, None], spec)
    if walk == "column":
        made = calls.encode(
            np.ascontiguousarray(x.T), scale[None, :], zero[None, :], (cols, 1), spec, 1
        ).T
    else:
        group = cols if walk == "row" else int(walk)
        blocks = -(-cols // group)
        scales, zeros = np.repeat(scale, blocks), np.repeat(zero, blocks)
        shape = (rows, blocks)
        made = calls.encode(x, scales.reshape(shape), zeros.reshape(shape), (1, group), spec, 1)
    wrong = np.argwhere(made != expected)
    assert not len(wrong), [(x[i, j], scale[i], zero[i], made[i, j]) for i, j in wrong[:3]]


def moved(x: np.ndarray, ulps: int) -> np.ndarray:
    """The float32 so many numbers away from zero."""
    return (x.view(np.int32) + ulps).view(np.float32)


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("spec", SPECS)
def test_neighbours_of_every_half(
    isa: str, rng: np.random.Generator, spec: Spec, walk: str
) -> None:
    mantissas = np.concatenate([1 + rng.random(60), [1, 1 + 2**-23, 2 - 2**-23, 1.5]])
    scale = np.ldexp(mantissas, rng.integers(-40, 40, mantissas.size)).astype(np.float32)
    halves = scale[:, None] * (np.arange(-140, 140, dtype=np.float32) + np.float32(0.5))
    x = np.concatenate([moved(halves, ulps) for ulps in (-2, -1, 0, 1, 2)], axis=1)
    zero = rng.integers(-9, 10, scale.size, dtype=np.int32)
    check(x, scale, zero, spec, walk)


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("spec", SPECS)
def test_far_and_odd_numbers(isa: str, rng: np.random.Generator, spec: Spec, walk: str) -> None:
    tiny = np.float32(1e-40)
    scale = np.array(
        [1, 0.7, 2**-99, 2**-101, 2**99, 2**101, 3e38, tiny, -1, -0.3, 0, np.inf, np.nan],
        np.float32,
    )
    edge = 2**14
    zero = np.array(
        [0, 5, -7, 127, -128, 255, edge, -edge, edge + 1, -edge - 1, 2**24 + 1, 2**31 - 1, -(2**31)]
    )
    quotients = np.ldexp(rng.standard_normal(150) + 0.5, rng.integers(-30, 127, 150))
    x = np.concatenate([quotients, [0.0, -0.0, np.inf, -np.inf, 3e38, -3e38, 1e-45, 2**23.9]])
    x = np.tile(np.concatenate([x, -x]), (scale.size, 1)).astype(np.float32)
    for shift in range(zero.size):
        check(x, scale, np.roll(zero, shift).astype(np.int32), spec, walk)


@pytest.mark.parametrize("walk", ["row", "16", "32", "column"])
def test_one_nan_among_numbers_is_one_zero(isa: str, rng: np.random.Generator, walk: str) -> None:
    scale = np.full(20, 0.01, np.float32)
    x = rng.standard_normal((scale.size, 192), np.float32)
    x[np.arange(scale.size), rng.integers(0, 192, scale.size)] = np.nan
    for spec in SPECS:
        check(x, scale, np.full(scale.size, 7, np.int32), spec, walk)


@pytest.mark.parametrize("source", ["bfloat16", "float16"])
def test_every_half_precision_number(isa: str, rng: np.random.Generator, source: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(1, -1)
    x = oracle.numbers(bits, source).astype(np.float32)
    spec = oracle.replace(SIGNED, source=source)
    for scale in (*np.exp(rng.uniform(-9, 9, 20)).astype(np.float32), np.float32(0.25)):
        scales, zero = np.full((1, 1), scale), np.array([[3]], np.int32)
        made = calls.encode(bits, scales, zero, bits.shape, spec, 1)
        assert (made == divided(x, scales, zero, spec)).all()
