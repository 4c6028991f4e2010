"""linear_packed and its gradient: every ISA, width, kind of zero and value, and awkward shape,
against weights that NumPy reads bit by bit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from quantization import _kernels
from tests import linear_oracle
from tests.kernels.quantize_calls import number_of, placed, same, stored
from tests.memory import Guarded
from tests.oracle import SOURCES, STORAGE, numbers
from tests.packed_oracle import ternary_digits, unpacked
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

TYPES = list(SOURCES)
WIDTHS = list(range(9))  # 0: five ternary codes a byte
ZEROS = ("none", "packed", "float", "fixed")
GROUPS = (1, 3, 4, 5, 8, 12, 16, 32, 33, 48, 64, 96, 128, 256)


def row_bytes(count: int, bits: int) -> int:
    return -(-count // 5) if bits == 0 else -(-count * bits // 8)


@dataclass
class Weights:
    """Packed weights as the kernels take them, and the numbers they stand for."""

    bits: int
    group: int
    cols: int
    codes: np.ndarray
    scales: np.ndarray
    scales_dtype: str
    steps: np.ndarray | None
    steps_dtype: str
    zeros: np.ndarray | None
    zeros_dtype: str
    codebook: np.ndarray | None

    @property
    def exact(self) -> np.ndarray:
        """float64 [out, in]."""
        place = np.arange(self.cols) // self.group
        codes = (
            ternary_digits(self.codes, self.cols)
            if self.bits == 0
            else unpacked(self.codes, self.bits, self.cols)
        ).astype(np.int64)
        return (self._values(codes) - self._zeros()[:, place]) * self._scales()[:, place]

    def _values(self, codes: np.ndarray) -> np.ndarray:
        if self.codebook is not None:
            rows = np.arange(len(codes))[:, None] if len(self.codebook) > 1 else 0
            return self.codebook.astype(np.float64)[rows, codes]
        if self.bits == 0:
            return np.where(codes == 2, -1.0, codes)
        is_negative = (self.zeros is None) & (codes >= 1 << (self.bits - 1))
        return (codes - (is_negative << self.bits)).astype(np.float64)

    def _scales(self) -> np.ndarray:
        if self.scales_dtype != "uint8":
            return numbers(self.scales, self.scales_dtype)
        if self.steps is not None:
            return self.scales.astype(np.float64) * numbers(self.steps, self.steps_dtype)[:, None]
        return 2.0 ** (self.scales.astype(np.float64) - 127)

    def _zeros(self) -> np.ndarray:
        if self.zeros is None:
            return np.zeros(self.scales.shape)
        if self.zeros_dtype == "int8":
            return (self.zeros.astype(np.float64) + 128) / 2.0 ** (8 - self.bits)
        if self.zeros_dtype != "uint8":  # kernels read them as float32
            return numbers(self.zeros, self.zeros_dtype).astype(np.float32).astype(np.float64)
        return unpacked(self.zeros, self.bits, self.scales.shape[1]).astype(np.float64)


def random_weights(
    rng: np.random.Generator, rows: int, cols: int, bits: int, group: int, zeros: str, books: int
) -> Weights:
    groups = -(-cols // group)
    codes = rng.integers(0, 243 if bits == 0 else 256, (rows, row_bytes(cols, bits)), np.uint8)
    scales_dtype = str(rng.choice([*TYPES, "uint8", "uint8"]))
    steps, steps_dtype = None, "float32"
    if scales_dtype == "uint8":
        scales = rng.integers(118, 128, (rows, groups), np.uint8)
        if rng.integers(2):
            steps_dtype = str(rng.choice(TYPES))
            steps = stored(rng.uniform(0.001, 0.01, rows), steps_dtype)
    else:
        scales = stored(rng.uniform(0.001, 0.02, (rows, groups)), scales_dtype)
    zero_points, zeros_dtype = None, "float32"
    if bits and zeros == "packed":
        zero_points = rng.integers(0, 256, (rows, row_bytes(groups, bits)), np.uint8)
        zeros_dtype = "uint8"
    elif bits and zeros == "fixed":
        zero_points, zeros_dtype = rng.integers(-128, 128, (rows, groups), np.int8), "int8"
    elif bits and zeros == "float":
        zeros_dtype = str(rng.choice(TYPES))
        zero_points = stored(rng.uniform(0, 2**bits, (rows, groups)), zeros_dtype)
    codebook = None
    if bits and books:
        shape = (1 if books == 1 else rows, 2**bits)
        codebook = rng.standard_normal(shape).astype(np.float32)
    return Weights(
        bits,
        group,
        cols,
        codes,
        scales,
        scales_dtype,
        steps,
        steps_dtype,
        zero_points,
        zeros_dtype,
        codebook,
    )


def arguments(weights: Weights, offset: int) -> list[np.ndarray | None]:
    parts = (weights.codes, weights.scales, weights.steps, weights.zeros, weights.codebook)
    return [None if part is None else placed(part, offset) for part in parts]


def type_number(name: str) -> int:
    return getattr(_kernels, name.upper()) if name in ("uint8", "int8") else number_of(name)


def dtypes(weights: Weights) -> list[int]:
    kinds = weights.scales_dtype, weights.steps_dtype, weights.zeros_dtype
    return [*map(type_number, kinds), _kernels.FLOAT32]


def sizes(weights: Weights, tokens: int) -> list[int]:
    book = 1 if weights.codebook is None else len(weights.codebook)
    return [tokens, len(weights.codes), weights.cols, weights.bits, weights.group, book]


def forward(
    x: np.ndarray, x_dtype: str, weights: Weights, bias: np.ndarray | None, y_dtype: str, offset=1
) -> np.ndarray:
    y = Guarded((len(x), len(weights.codes)), STORAGE[y_dtype], offset)
    _kernels.linear_packed(
        y.array,
        placed(x, offset),
        *arguments(weights, offset),
        bias,
        *sizes(weights, len(x)),
        number_of(y_dtype),
        number_of(x_dtype),
        *dtypes(weights),
        _kernels.FLOAT32,
    )
    y.check()
    return y.array


def backward(
    grad: np.ndarray, grad_dtype: str, weights: Weights, x_dtype: str, offset=1
) -> np.ndarray:
    grad_x = Guarded((len(grad), weights.cols), STORAGE[x_dtype], offset)
    _kernels.linear_packed_backward(
        grad_x.array,
        placed(grad, offset),
        *arguments(weights, offset),
        *sizes(weights, len(grad)),
        number_of(x_dtype),
        number_of(grad_dtype),
        *dtypes(weights),
    )
    grad_x.check()
    return grad_x.array


def is_within(have, exact, size, terms, summed_from: str, stored_as: str) -> bool:
    """Sums within their bound, and weights that were rounded: in float32, or to bfloat16."""
    rounded = 3 * linear_oracle.UNIT["float32"]
    rounded += linear_oracle.UNIT["bfloat16"] * (summed_from == "bfloat16")
    if summed_from != "float64":
        terms += int(np.ceil(rounded / linear_oracle.UNIT["float32"]))
        return linear_oracle.is_within(have, exact, size, terms, "float32", stored_as)
    terms += int(np.ceil(rounded / linear_oracle.UNIT["float64"]))
    return linear_oracle.is_within(have, exact, size, terms, "float64", stored_as)


def random_rows(rng: np.random.Generator, shape: tuple[int, int], dtype: str) -> np.ndarray:
    return stored(rng.standard_normal(shape) * rng.choice([1e-3, 1.0, 30.0]), dtype)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("x_dtype", TYPES)
def test_forward_answers_the_oracle(isa: str, x_dtype: str, bits: int) -> None:
    rng = np.random.default_rng(100 * bits + TYPES.index(x_dtype))
    for case in range(36):
        tokens, rows, cols = (int(rng.integers(1, high)) for high in (14, 60, 131))
        group = int(rng.choice([*GROUPS, cols]))
        weights = random_weights(rng, rows, cols, bits, group, ZEROS[case % 3], case // 3 % 3)
        bias = rng.standard_normal(rows).astype(np.float32) if case % 2 else None
        x = random_rows(rng, (tokens, cols), x_dtype)
        y_dtype = str(rng.choice([x_dtype, *TYPES]))
        y = numbers(forward(x, x_dtype, weights, bias, y_dtype, case % 8), y_dtype)
        exact, size = linear_oracle.forward(numbers(x, x_dtype), weights.exact, np.ones(rows), bias)
        assert is_within(y, exact, size, cols, x_dtype, y_dtype), (tokens, rows, cols, weights)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("grad_dtype", TYPES)
def test_backward_answers_the_oracle(isa: str, grad_dtype: str, bits: int) -> None:
    rng = np.random.default_rng(100 * bits + TYPES.index(grad_dtype) + 1)
    for case in range(18):
        tokens, rows, cols = (int(rng.integers(1, high)) for high in (14, 80, 260))
        group = int(rng.choice([*GROUPS, cols]))
        weights = random_weights(rng, rows, cols, bits, group, ZEROS[case % 3], case // 3 % 3)
        grad = random_rows(rng, (tokens, rows), grad_dtype)
        x_dtype = str(rng.choice([grad_dtype, *TYPES]))
        grad_x = numbers(backward(grad, grad_dtype, weights, x_dtype, case % 8), x_dtype)
        exact, size = linear_oracle.backward(
            numbers(grad, grad_dtype), weights.exact, np.ones(rows)
        )
        summed = "float32" if grad_dtype == "bfloat16" else grad_dtype
        assert is_within(grad_x, exact, size, rows, summed, x_dtype), (tokens, rows, cols, weights)


@pytest.mark.parametrize("bits", [0, 3, 4, 8])
@pytest.mark.parametrize("tokens", [1, 5, 40, 300])
def test_long_rows_and_many_tokens(isa: str, bits: int, tokens: int) -> None:
    rng = np.random.default_rng(bits)
    weights = random_weights(rng, 53, 1111, bits, 64, "none", 0)
    x = rng.standard_normal((tokens, 1111)).astype(np.float32)
    y = forward(x, "float32", weights, None, "float32")
    exact, size = linear_oracle.forward(x, weights.exact, np.ones(53), None)
    assert is_within(y, exact, size, 1111, "float32", "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_threads_do_not_change_a_bit(isa: str, dtype: str) -> None:
    rng = np.random.default_rng(7)
    weights = random_weights(rng, 700, 256, 4, 64, "packed", 0)
    x = random_rows(rng, (9, 256), dtype)
    before = _kernels.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8):
            _kernels.set_num_threads(threads)
            results.append(forward(x, dtype, weights, None, dtype))
    finally:
        _kernels.set_num_threads(0 if before < 2 else before)
    assert all(same(result, results[0]) for result in results)


@pytest.mark.parametrize(("tokens", "rows", "cols"), [(0, 5, 7), (3, 0, 7), (3, 5, 0), (0, 0, 0)])
def test_empty_sides(isa: str, tokens: int, rows: int, cols: int) -> None:
    rng = np.random.default_rng(3)
    weights = random_weights(rng, rows, cols, 4, 4, "none", 0)
    bias = rng.standard_normal(rows).astype(np.float32)
    x = random_rows(rng, (tokens, cols), "float32")
    y = forward(x, "float32", weights, bias, "float32")
    assert y.shape == (tokens, rows)
    if cols == 0:
        assert same(y, np.tile(bias, (tokens, 1)))


def test_a_nan_scale_marks_its_row_only(isa: str) -> None:
    rng = np.random.default_rng(5)
    weights = random_weights(rng, 9, 100, 4, 32, "none", 0)
    weights.scales = np.full((9, 4), 120, np.uint8)
    weights.scales_dtype, weights.steps = "uint8", None
    weights.scales[4, 3] = 255
    y = forward(
        rng.standard_normal((6, 100)).astype(np.float32), "float32", weights, None, "float32"
    )
    assert np.isnan(y[:, 4]).all()
    assert not np.isnan(np.delete(y, 4, 1)).any()


def test_impossible_arguments_are_refused() -> None:
    rng = np.random.default_rng(6)
    weights = random_weights(rng, 3, 10, 4, 5, "none", 0)
    x = rng.standard_normal((2, 10)).astype(np.float32)
    weights.bits = 9
    with pytest.raises(ValueError, match="bits"):
        forward(x, "float32", weights, None, "float32")
    weights.bits, weights.group = 4, 0
    with pytest.raises(ValueError):
        forward(x, "float32", weights, None, "float32")
    weights.group, weights.codes = 5, weights.codes[:, :4]
    with pytest.raises(ValueError, match="codes"):
        forward(x, "float32", weights, None, "float32")
