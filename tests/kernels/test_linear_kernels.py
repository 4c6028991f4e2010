"""linear and linear_backward: every ISA, mix of types and awkward shape against the oracle."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from quantization import _kernels
from tests import linear_oracle
from tests.kernels.linear_calls import Layer, backward, bias_of, forward, random_layer, scales_of
from tests.kernels.quantize_calls import same, stored
from tests.oracle import SOURCES, numbers
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

TYPES = list(SOURCES)
EDGES = [(1, 1, 1), (1, 8, 64), (2, 7, 9), (3, 24, 63), (4, 3, 65), (5, 49, 31), (4, 48, 128)]


def sampled_shapes(rng: np.random.Generator, count: int) -> list[tuple[int, int, int]]:
    """Tokens, out_features and in_features: tiles, their neighbours, and anything in 1..130."""
    sizes = [(int(rng.integers(1, 14)), *map(int, rng.integers(1, 131, 2))) for _ in range(count)]
    return EDGES + sizes


def random_rows(rng: np.random.Generator, shape: tuple[int, int], dtype: str) -> np.ndarray:
    return stored(rng.standard_normal(shape) * rng.choice([1e-3, 1.0, 30.0]), dtype)


def check_forward(x: np.ndarray, x_dtype: str, layer: Layer, y_dtype: str, offset: int) -> None:
    y = numbers(forward(x, x_dtype, layer, y_dtype, offset), y_dtype)
    exact, size = linear_oracle.forward(
        numbers(x, x_dtype), layer.weights, scales_of(layer), bias_of(layer)
    )
    summed = linear_oracle.accumulator(x_dtype)
    assert linear_oracle.is_within(y, exact, size, x.shape[1], summed, y_dtype), (x.shape, y_dtype)


def check_backward(g: np.ndarray, g_dtype: str, layer: Layer, x_dtype: str, offset: int) -> None:
    grad_x = numbers(backward(g, g_dtype, layer, x_dtype, offset), x_dtype)
    exact, size = linear_oracle.backward(numbers(g, g_dtype), layer.weights, scales_of(layer))
    summed = linear_oracle.accumulator(g_dtype)
    assert linear_oracle.is_within(grad_x, exact, size, g.shape[1], summed, x_dtype), g.shape


@pytest.mark.parametrize("x_dtype", TYPES)
def test_forward_answers_the_oracle(isa: str, x_dtype: str) -> None:
    rng = np.random.default_rng(0)
    for i, (tokens, out_features, in_features) in enumerate(sampled_shapes(rng, 60)):
        layer = random_layer(
            rng, (out_features, in_features), rng.choice(TYPES), rng.choice([*TYPES, None])
        )
        x = random_rows(rng, (tokens, in_features), x_dtype)
        check_forward(x, x_dtype, layer, rng.choice([x_dtype, *TYPES]), offset=i % 8)


@pytest.mark.parametrize("grad_dtype", TYPES)
def test_backward_answers_the_oracle(isa: str, grad_dtype: str) -> None:
    rng = np.random.default_rng(1)
    for i, (tokens, out_features, in_features) in enumerate(sampled_shapes(rng, 60)):
        layer = random_layer(rng, (out_features, in_features), rng.choice(TYPES))
        grad = random_rows(rng, (tokens, out_features), grad_dtype)
        check_backward(grad, grad_dtype, layer, rng.choice([grad_dtype, *TYPES]), offset=i % 8)


@pytest.mark.parametrize("x_dtype", TYPES)
def test_long_rows_answer_the_oracle(isa: str, x_dtype: str) -> None:
    """Longer than any span or block of the kernels, and no multiple of one."""
    rng = np.random.default_rng(2)
    layer = random_layer(rng, (13, 4999))
    check_forward(random_rows(rng, (5, 4999), x_dtype), x_dtype, layer, x_dtype, offset=3)
    layer = random_layer(rng, (2111, 13))
    check_backward(random_rows(rng, (5, 2111), x_dtype), x_dtype, layer, x_dtype, offset=3)


@pytest.mark.parametrize("shape", [(0, 5, 7), (3, 0, 7), (3, 5, 0), (0, 0, 0)])
@pytest.mark.parametrize("x_dtype", TYPES)
def test_empty_sides(isa: str, x_dtype: str, shape: tuple[int, int, int]) -> None:
    tokens, out_features, in_features = shape
    rng = np.random.default_rng(3)
    layer = random_layer(rng, (out_features, in_features))
    x = random_rows(rng, (tokens, in_features), x_dtype)
    y = forward(x, x_dtype, layer, "float32")
    assert y.shape == (tokens, out_features)
    if in_features == 0:
        assert same(y, np.tile(layer.bias, (tokens, 1)))
    grad = random_rows(rng, (tokens, out_features), x_dtype)
    grad_x = backward(grad, x_dtype, layer, "float32")
    assert grad_x.shape == (tokens, in_features)
    if out_features == 0:
        assert not grad_x.any()


@pytest.mark.parametrize("dtype", TYPES)
def test_a_row_has_the_same_bits_in_any_batch(isa: str, dtype: str) -> None:
    rng = np.random.default_rng(4)
    for out_features, in_features in [(37, 100), (50, 2500), (5, 77)]:
        layer = random_layer(rng, (out_features, in_features))
        x = random_rows(rng, (23, in_features), dtype)
        whole = forward(x, dtype, layer, dtype)
        grad = random_rows(rng, (23, out_features), dtype)
        whole_grad = backward(grad, dtype, layer, dtype)
        for tokens in (1, 2, 3, 4, 5, 7):
            for first in (0, 11, 23 - tokens):
                rows = slice(first, first + tokens)
                assert same(forward(x[rows], dtype, layer, dtype), whole[rows])
                assert same(backward(grad[rows], dtype, layer, dtype), whole_grad[rows])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_large_batch_has_the_bits_of_single_rows(isa: str, dtype: str) -> None:
    """Beyond the tokens from which weights are packed, and beyond one chunk."""
    rng = np.random.default_rng(9)
    layer = random_layer(rng, (53, 150))
    x = random_rows(rng, (290, 150), dtype)
    for tokens in (18, 19, 20, 41, 263, 290):
        whole = forward(x[:tokens], dtype, layer, dtype)
        for row in (0, 7, tokens // 2, tokens - 1):
            assert same(forward(x[row : row + 1], dtype, layer, dtype), whole[row : row + 1])


@pytest.fixture
def restore_isa() -> Iterator[None]:
    active = _kernels.active_isa()
    yield
    _kernels.set_isa(active)


@pytest.mark.parametrize("smallest", [1.0, 2.0**-119, 2.0**-126, 2.0**-133, 0.0])
def test_bfloat16_dot_products_give_the_bits_of_multiply_adds(
    restore_isa: None, smallest: float
) -> None:
    """The instruction flushes subnormal numbers: activations that small must take another road."""
    if "avx512bf16" not in _kernels.isas():
        pytest.skip("this CPU has no avx512bf16")
    rng = np.random.default_rng(10)
    for tokens, out_features, in_features in [(1, 9, 64), (5, 49, 203), (40, 50, 300)]:
        layer = random_layer(rng, (out_features, in_features))
        layer.weights[0, :5] = (-128, 127, 0, -1, 1)
        numbers = rng.standard_normal((tokens, in_features)) * max(smallest, 2.0**-133)
        numbers[rng.random(numbers.shape) < 0.1] = smallest
        x = stored(numbers, "bfloat16")
        answers = []
        for isa in ("avx512", "avx512bf16"):
            _kernels.set_isa(isa)
            answers.append(forward(x, "bfloat16", layer, "float32"))
        assert same(*answers)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_feature_has_the_same_bits_in_any_layer(isa: str, dtype: str) -> None:
    rng = np.random.default_rng(5)
    layer = random_layer(rng, (61, 90))
    x = random_rows(rng, (6, 90), dtype)
    whole = forward(x, dtype, layer, dtype)
    for first, last in [(0, 1), (3, 8), (10, 61), (60, 61)]:
        part = Layer(
            layer.weights[first:last],
            layer.scales[first:last],
            layer.scales_dtype,
            layer.bias[first:last],
            layer.bias_dtype,
        )
        assert same(forward(x, dtype, part, dtype), np.ascontiguousarray(whole[:, first:last]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_the_number_of_threads_changes_no_bit(isa: str, dtype: str) -> None:
    rng = np.random.default_rng(6)
    layer = random_layer(rng, (523, 401))
    x, grad = random_rows(rng, (19, 401), dtype), random_rows(rng, (19, 523), dtype)
    answers = []
    try:
        for threads in (1, 2, 7):
            _kernels.set_num_threads(threads)
            answers.append((forward(x, dtype, layer, dtype), backward(grad, dtype, layer, dtype)))
    finally:
        _kernels.set_num_threads(0)
    for answer in answers[1:]:
        assert same(answer[0], answers[0][0])
        assert same(answer[1], answers[0][1])


@pytest.mark.parametrize("code", [127, -127, -128])
def test_extreme_codes_are_exact(isa: str, code: int) -> None:
    """Sums of small integers have one answer, whatever the order."""
    for in_features in (1, 17, 130):
        weights = np.full((9, in_features), code, np.int8)
        layer = Layer(weights, np.ones(9, np.float32), "float32", None, "float32")
        x = np.resize(np.array([1, -3, 7, 127], np.float32), (5, in_features))
        expected = x.astype(np.float64) @ weights.T.astype(np.float64)
        assert same(forward(x, "float32", layer, "float32"), expected.astype(np.float32))
        grad = np.resize(np.array([1, -3, 7], np.float32), (5, 9))
        expected = grad.astype(np.float64) @ weights.astype(np.float64)
        assert same(backward(grad, "float32", layer, "float32"), expected.astype(np.float32))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_activations_stay_in_their_row(isa: str, dtype: str, bad: float) -> None:
    rng = np.random.default_rng(7)
    for in_features in (3, 8, 21, 67):
        layer = random_layer(rng, (29, in_features))
        clean = rng.standard_normal((6, in_features))
        spoiled = clean.copy()
        spoiled[2, in_features - 1] = bad
        x = stored(spoiled, dtype)
        y = numbers(forward(x, dtype, layer, dtype), dtype)
        others = [0, 1, 3, 4, 5]
        expected = numbers(forward(stored(clean, dtype), dtype, layer, dtype), dtype)
        assert np.array_equal(y[others], expected[others])
        with np.errstate(invalid="ignore"):
            spread = bad * layer.weights[:, -1].astype(np.float64)
        assert np.array_equal(np.isnan(y[2]), np.isnan(spread))
        assert np.array_equal(y[2], spread, equal_nan=True)


def test_results_do_not_depend_on_what_was_in_the_output(isa: str) -> None:
    rng = np.random.default_rng(8)
    layer = random_layer(rng, (31, 45))
    x = random_rows(rng, (3, 45), "float32")
    nan_bits = forward(x, "float32", layer, "float32", fill=0xFF)
    assert same(nan_bits, forward(x, "float32", layer, "float32", fill=0))


@pytest.mark.parametrize("shared", ["x", "weights", "scales", "bias"])
def test_an_output_over_an_input_is_refused(shared: str) -> None:
    memory = np.zeros(64, np.float32)
    given = {
        "x": np.ones((2, 4), np.float32),
        "weights": np.ones((4, 4), np.int8),
        "scales": np.ones(4, np.float32),
        "bias": np.ones(4, np.float32),
    }
    y = memory[:8].reshape(2, 4)
    size = given[shared].nbytes
    given[shared] = memory.view(np.uint8)[4 : 4 + size].view(given[shared].dtype)
    given[shared] = given[shared].reshape((4, 4) if shared == "weights" else (-1,))
    before = memory.copy()
    kind = _kernels.FLOAT32
    with pytest.raises(ValueError, match="shares memory"):
        _kernels.linear(y, *given.values(), 2, 4, 4, kind, kind, kind, kind)
    assert same(memory, before)


@pytest.mark.parametrize("place", range(4))
def test_types_that_are_no_floats_are_refused(place: int) -> None:
    kinds = [_kernels.FLOAT32] * 4
    kinds[place] = _kernels.INT8
    arrays = [np.ones((1, 4), np.float32), np.ones((1, 4), np.float32), np.ones(4, np.float32)]
    arrays.append(np.ones(4, np.float32))
    arrays[place] = arrays[place].astype(np.int8)
    y, x, scales, bias = arrays
    with pytest.raises(TypeError, match="dtype"):
        _kernels.linear(y, x, np.ones((4, 4), np.int8), scales, bias, 1, 4, 4, *kinds)


def test_sizes_that_no_memory_holds_are_refused() -> None:
    empty = np.zeros(0, np.float32)
    kind = _kernels.FLOAT32
    codes = np.zeros(0, np.int8)
    with pytest.raises(ValueError):
        _kernels.linear(
            empty, empty, codes, empty, None, 1 << 62, 1 << 62, 0, kind, kind, kind, kind
        )
