"""What holds for every matrix, grid and spec, sought by hypothesis."""

from __future__ import annotations

import numpy as np
import pytest

from quantization import _kernels
from tests import oracle
from tests.kernels import quantize_calls as calls
from tests.kernels.quantize_calls import same, same_numbers
from tests.oracle import SOURCES, Spec
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

FIXED = hypothesis.settings(max_examples=150, deadline=None, derandomize=True)


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    source = draw(st.sampled_from(SOURCES))
    scale = "float64" if source == "float64" else "float32"
    scale = draw(st.sampled_from([scale, "float32", "bfloat16"]))
    bits = draw(st.integers(2, 8))
    half = 2 ** (bits - 1)
    return draw(
        st.sampled_from(
            [
                Spec(source, "int8", "symmetric", 1 - half, half - 1, scale),
                Spec(source, "int8", "symmetric", -half, half - 1, scale),
                Spec(source, "int8", "asymmetric", -half, half - 1, scale),
                Spec(source, "uint8", "asymmetric", 0, 2 * half - 1, scale),
                Spec(source, "int8", "binary", -1, 1, scale),
            ]
        )
    )


@st.composite
def grids(draw: st.DrawFn) -> tuple[tuple[int, int], calls.Block]:
    shape = (draw(st.integers(1, 40)), draw(st.integers(1, 140)))
    rows, cols = draw(st.integers(1, 45)), draw(st.integers(1, 150))
    blocks = [(1, cols), (rows, 1), (1, shape[1]), (shape[0], 1), shape, (rows, cols)]
    return shape, draw(st.sampled_from(blocks))


def matrix(seed: int, shape: tuple[int, int], spread: float, source: str) -> np.ndarray:
    """Numbers of very different sizes, within what the type holds."""
    rng = np.random.default_rng(seed)
    with np.errstate(over="ignore"):
        x = rng.standard_normal(shape) * np.exp(rng.standard_normal(shape) * spread)
    top = min(oracle.largest(source) / 4, 1e37)
    return calls.stored(np.clip(x * rng.choice([0, 1], shape, p=[0.1, 0.9]), -top, top), source)


@FIXED
@hypothesis.given(st.integers(0, 2**32), grids(), specs(), st.sampled_from([0.0, 3.0, 30.0]))
def test_codes_come_back_within_half_a_step(
    seed: int, grid: tuple[tuple[int, int], calls.Block], spec: Spec, spread: float
) -> None:
    shape, block = grid
    bits = matrix(seed, shape, spread, spec.source)
    x = oracle.numbers(bits, spec.source)
    made = calls.quantize(bits, block, spec, offset=seed % 64)
    assert made.codes.min() >= spec.code_min
    assert made.codes.max() <= spec.code_max
    scale = oracle.spread(made.scale, block, shape).astype(np.float64)
    if spec.mode == "binary":
        assert (made.codes == np.where(x >= 0, 1, -1)).all()
        return
    assert (scale > 0).all()
    zero = oracle.spread(made.zero, block, shape).astype(np.float64)
    number = (made.codes - zero) * scale
    # Half a step; and where the ends are rounded inwards (the scale to its type, the zero point to
    # a whole number), half a step and the roundings more.
    slack = 0.5 + 256 * (2**-8 if spec.scale == "bfloat16" else 2**-22)
    slack += 0.5 if spec.mode == "asymmetric" else 0
    assert (np.abs(number - x) <= slack * scale).all()


@FIXED
@hypothesis.given(st.integers(0, 2**32), grids(), specs(), st.integers(1, 5))
def test_all_instruction_sets_and_thread_counts_agree(
    seed: int, grid: tuple[tuple[int, int], calls.Block], spec: Spec, threads: int
) -> None:
    shape, block = grid
    bits = matrix(seed, shape, 3.0, spec.source)
    before, results = _kernels.active_isa(), []
    try:
        for i, isa in enumerate(_kernels.isas()):
            _kernels.set_isa(isa)
            _kernels.set_num_threads(threads if i else 1)
            made = calls.quantize(bits, block, spec, offset=(seed + i) % 64)
            args = (made.codes, made.scale, made.zero, block, spec.code, spec.source)
            results.append((*made, calls.decode(*args)))
    finally:
        _kernels.set_isa(before)
        _kernels.set_num_threads(0)
    for other in results[1:]:
        assert all(same(a, b) for a, b in zip(results[0][:3], other[:3], strict=True))
        assert same_numbers(results[0][3], other[3], spec.source)


@FIXED
@hypothesis.given(st.integers(0, 2**32), grids(), specs())
def test_negated_weights_have_negated_codes(
    seed: int, grid: tuple[tuple[int, int], calls.Block], spec: Spec
) -> None:
    shape, block = grid
    spec = oracle.replace(spec, mode="symmetric", code="int8", code_min=-127, code_max=127)
    x = oracle.numbers(matrix(seed, shape, 1.0, spec.source), spec.source)
    up = calls.quantize(calls.stored(x, spec.source), block, spec)
    down = calls.quantize(calls.stored(-x, spec.source), block, spec)
    assert same(up.scale, down.scale)
    assert (up.codes == -down.codes).all()
