"""fit_levels and encode_levels: the best of all clusterings, the nearest of all levels."""

from __future__ import annotations

import numpy as np
import pytest

from quantization import _kernels
from tests import codebook_oracle as oracle
from tests.memory import Guarded, at_offset, at_page_end
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

# ---- fit ---------------------------------------------------------------------------------------


def fit(values: np.ndarray, count: int, weights: np.ndarray | None = None) -> np.ndarray:
    """Levels of rows of sorted values, written among guard bytes at an odd address."""
    levels = Guarded((values.shape[0], count), np.float64)
    given = None if weights is None else at_offset(weights, 3)
    _kernels.fit_levels(levels.array, at_offset(values, 5), given, *values.shape, count)
    levels.check()
    return levels.array.copy()


def numbers(rng: np.random.Generator, kind: str, shape: tuple[int, int]) -> np.ndarray:
    if kind == "few":
        return np.sort(rng.integers(-3, 4, shape), axis=1).astype(np.float64)
    if kind == "heavy":
        return np.sort(rng.standard_t(1, shape), axis=1)
    if kind == "far":
        return np.sort(rng.standard_normal(shape), axis=1) + 1e4
    return np.sort(rng.standard_normal(shape), axis=1)


@pytest.mark.parametrize("kind", ["normal", "few", "heavy", "far"])
@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
def test_levels_are_the_best_of_all(kind: str, weighted: bool, rng: np.random.Generator) -> None:
    for size in (1, 2, 3, 5, 8, 11):
        values = numbers(rng, kind, (4, size))
        weights = rng.exponential(size=values.shape) ** 2 * rng.integers(0, 4, values.shape)
        for count in (1, 2, 3, 4, 8):
            levels = fit(values, count, weights if weighted else None)
            assert (np.diff(levels, axis=1) >= 0).all()
            for x, w, row in zip(values, weights, levels, strict=True):
                w = w if weighted and w.any() else np.ones(size)
                best = oracle.least_error(x, count, w)
                slack = 1e-12 * (w * (x - np.average(x, weights=w)) ** 2).sum() + 1e-20
                assert oracle.squared_error(x, row, w) <= best + slack


@pytest.mark.parametrize("count", [2, 7, 16, 64, 256])
def test_levels_of_many_values(count: int, rng: np.random.Generator) -> None:
    values, weights = numbers(rng, "normal", (2, 300)), rng.exponential(size=(2, 300))
    for x, w, row in zip(values, weights, fit(values, count, weights), strict=True):
        best, total = oracle.least_error_of_many(x, count, w), (w * x**2).sum()
        assert oracle.squared_error(x, row, w) == pytest.approx(best, rel=1e-9, abs=1e-12 * total)


def test_levels_that_are_not_needed_repeat_the_largest_value() -> None:
    values = np.array([[1.0, 2.0, 4.0], [3.0, 3.0, 3.0]])
    assert np.array_equal(fit(values, 5), [[1, 2, 4, 4, 4], [3, 3, 3, 3, 3]])
    weights = np.array([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    assert np.array_equal(fit(values, 2, weights), [[1, 4], [3, 3]])
    assert np.array_equal(fit(np.empty((2, 0)), 2), np.zeros((2, 2)))
    assert fit(np.empty((0, 4)), 2).shape == (0, 2)


def test_a_value_without_weight_moves_no_level(rng: np.random.Generator) -> None:
    values, weights = numbers(rng, "normal", (1, 40)), rng.exponential(size=(1, 40))
    weights[:, ::3] = 0
    kept = weights[0] > 0
    expected = fit(values[:, kept], 4, weights[:, kept])
    assert np.allclose(fit(values, 4, weights), expected, rtol=1e-12)
    weights[:] = 0
    assert np.array_equal(fit(values, 4, weights), fit(values, 4))


def test_threads_change_nothing(rng: np.random.Generator, restore_threads: None) -> None:
    values = numbers(rng, "heavy", (37, 500))
    _kernels.set_num_threads(1)
    expected = fit(values, 16)
    for threads in (2, 7):
        _kernels.set_num_threads(threads)
        assert np.array_equal(fit(values, 16), expected)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"count": 0, "levels": (2, 0)}, ValueError, "a code range"),
        ({"count": 257, "levels": (2, 257)}, ValueError, "a code range"),
        ({"levels": (2, 5)}, ValueError, "levels must hold 8 elements of 8 bytes, not 10 of 8"),
        ({"values": np.ones((2, 6), "float32")}, ValueError, "values must hold 12 elements of 8"),
        ({"weights": np.ones((1, 6))}, ValueError, "weights must hold 12 elements of 8 bytes, not"),
    ],
)
def test_bad_arguments_of_fit(changes: dict, error: type, text: str) -> None:
    call = {"values": np.ones((2, 6)), "weights": None, "count": 4, "levels": (2, 4)} | changes
    levels = Guarded(call["levels"], np.float64)
    with pytest.raises(error, match=text):
        _kernels.fit_levels(levels.array, call["values"], call["weights"], 2, 6, call["count"])
    levels.check()
    assert levels.untouched()


def test_fit_refuses_to_write_over_its_input() -> None:
    memory = np.ones(20)
    with pytest.raises(ValueError, match="an output shares memory with an input"):
        _kernels.fit_levels(memory[8:16], memory[:12], None, 2, 6, 4)


# ---- encode ------------------------------------------------------------------------------------


def encode(x: np.ndarray, scales: np.ndarray, codebook: np.ndarray, group: int) -> np.ndarray:
    """Codes, written among guard bytes; the inputs end where memory ends."""
    codes = Guarded(x.shape, np.uint8)
    given = (at_page_end(each.astype(np.float32)) for each in (x, scales, codebook))
    _kernels.encode_levels(codes.array, *given, *x.shape, group, *codebook.shape)
    codes.check()
    return codes.array.copy()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8, 15, 16, 17, 100, 256])
@pytest.mark.parametrize("per_row", [False, True], ids=["shared", "per_row"])
def test_codes_are_the_nearest(count: int, per_row: bool, rng: np.random.Generator) -> None:
    for cols, group in ((1, 1), (9, 4), (33, 33), (64, 7)):
        scales = rng.exponential(size=(3, -(-cols // group))).astype(np.float32)
        codebook = rng.standard_normal((3 if per_row else 1, count)).astype(np.float32)
        x = (rng.standard_normal((3, cols)) * 2).astype(np.float32)
        codes = encode(x, scales, codebook, group)
        for row, col in np.ndindex(x.shape):
            levels = codebook[row if per_row else 0]
            expected = oracle.nearest_code(
                float(x[row, col]), float(scales[row, col // group]), levels
            )
            assert codes[row, col] == expected, (row, col)


@pytest.mark.parametrize("scale", [1.0, 3.0, 2.0**-149, 2.0**-130, 1.9999999, 2.0**100])
def test_ties_go_to_the_lower_code(scale: float) -> None:
    """Levels in an order of no sense, some twice, and numbers exactly between them."""
    levels = np.array([0, 4, -6, 2, 4, -2, 0, 16, -6, 1], np.float32)
    middles = [(one + other) / 2 for one in levels for other in levels]
    x = np.unique(np.float32(scale) * np.array([*levels, *middles], np.float32)).astype(np.float32)
    x = np.concatenate([x, np.nextafter(x, np.float32(-np.inf)), np.nextafter(x, np.float32(9e37))])
    codes = encode(x[None], np.array([[scale]]), levels[None], x.size)
    expected = [oracle.nearest_code(float(each), float(np.float32(scale)), levels) for each in x]
    assert codes[0].tolist() == expected


def test_what_no_level_is_near_to() -> None:
    levels = np.array([[3.0, -1.0, 2.0]])
    x = np.array([[np.nan, np.inf, -np.inf, 5.0]])
    assert encode(x, np.ones((1, 1)), levels, 4).tolist() == [[1, 0, 1, 0]]
    for scale in (np.nan, 0.0, -1.0):
        assert encode(x, np.full((1, 1), scale), levels, 4).tolist() == [[0, 0, 0, 0]]


def test_no_rows_and_no_columns() -> None:
    for shape in ((0, 5), (3, 0), (0, 0)):
        scales = np.ones((shape[0], -(-shape[1] // 2)))
        assert encode(np.ones(shape), scales, np.ones((1, 4)), 2).shape == shape


def test_codes_do_not_depend_on_threads(rng: np.random.Generator, restore_threads: None) -> None:
    x = rng.standard_normal((100, 1500))
    scales, codebook = rng.exponential(size=(100, 24)), rng.standard_normal((1, 16))
    _kernels.set_num_threads(1)
    expected = encode(x, scales, codebook, 64)
    for threads in (2, 7):
        _kernels.set_num_threads(threads)
        assert np.array_equal(encode(x, scales, codebook, 64), expected)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"group": 0, "scales": (2, 0)}, "a shape, block or axis that is out of range"),
        ({"codebook": (3, 4)}, "a shape, block or axis that is out of range"),
        ({"codebook": (1, 0)}, "a code range"),
        ({"codebook": (1, 257)}, "a code range"),
        ({"scales": (2, 2)}, "scales must hold 6 elements of 4 bytes, not 4 of 4"),
        ({"x": (2, 5)}, "x must hold 12 elements of 4 bytes, not 10 of 4"),
    ],
)
def test_bad_arguments_of_encode(changes: dict, text: str) -> None:
    call = {"x": (2, 6), "scales": (2, 3), "codebook": (1, 4), "group": 2} | changes
    x, scales, codebook = (np.ones(call[key], "float32") for key in ("x", "scales", "codebook"))
    codes = Guarded((2, 6), np.uint8)
    with pytest.raises(ValueError, match=text):
        _kernels.encode_levels(
            codes.array, x, scales, codebook, 2, 6, call["group"], *codebook.shape
        )
    codes.check()
    assert codes.untouched()


def test_encode_refuses_to_write_over_its_input() -> None:
    memory = np.ones(40, "f4")
    x, scales, book = memory[:12], memory[12:14], memory[14:18]
    for start in (0, 47, 55, 71):  # the last byte of the codes, or the first, in one of them
        codes = memory.view(np.uint8)[start : start + 12]
        with pytest.raises(ValueError, match="an output shares memory with an input"):
            _kernels.encode_levels(codes, x, scales, book, 2, 6, 6, 1, 4)
    _kernels.encode_levels(memory.view(np.uint8)[72:84], x, scales, book, 2, 6, 6, 1, 4)
