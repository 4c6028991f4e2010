"""fit_groups: never worse than given, as good as a float64 search, equal bits everywhere."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from quantization import _kernels
from quantization.ops import native
from quantization.ops.native import BOTH, NOTHING, SCALE, ZERO, Fit, Levels
from tests.memory import Guarded, at_offset, at_page_end
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

UNSIGNED = (0.0, 15.0)
LATTICE: dict[str, Any] = {"zeros": UNSIGNED, "zero_step": 1.0}
SIGNED: dict[str, Any] = {"least_scale": -np.inf}


def groups_of(x: np.ndarray, group: int) -> list[tuple[tuple[int, int], np.ndarray, slice]]:
    """Place, numbers and columns of each group."""
    cols = [slice(at, at + group) for at in range(0, x.shape[1], group)]
    places = itertools.product(range(x.shape[0]), enumerate(cols))
    return [((row, i), x[row, part].astype(np.float64), part) for row, (i, part) in places]


def error_of(x: np.ndarray, h: np.ndarray, scale: float, zero: float, fit: Fit) -> float:
    """The weighted squared error of the nearest levels, in float64."""
    place = x / scale + zero
    if fit.levels is None:
        level = np.rint(place).clip(*fit.codes)
    else:
        levels = fit.levels[0].astype(np.float64)
        level = levels[np.abs(place[:, None] - levels).argmin(axis=1)]
    return float((h * np.square(x - (level - zero) * scale)).sum())


def start_of(x: np.ndarray, group: int, fit: Fit) -> tuple[np.ndarray, np.ndarray | None]:
    """Scales and zeros that meet the range of each group."""
    shape = x.shape[0], -(-x.shape[1] // group)
    scales, zeros = np.empty(shape, "float32"), np.zeros(shape, "float32")
    for place, numbers, _ in groups_of(x, group):
        low, high = min(numbers.min(), 0), max(numbers.max(), 0)
        if fit.codes[0] < 0:
            most = fit.codes[1] if fit.levels is None else float(np.abs(fit.levels).max())
            scales[place] = max(-low, high, 1e-6) / most
        else:
            scales[place] = max(high - low, 1e-6) / (fit.codes[1] - fit.codes[0])
            zeros[place] = np.rint(-low / scales[place])
    return scales, zeros if fit.codes[0] >= 0 else None


NF = np.linspace(-1, 1, 16, dtype="float32")[None] ** 3
KINDS = {
    "both": Fit(BOTH, UNSIGNED, 6, 4, 0.07),
    "whole zeros": Fit(BOTH, UNSIGNED, 6, 4, 0.07, **LATTICE),
    "fixed zeros": Fit(BOTH, (0.0, 3.0), 6, 4, 0.07, zeros=(0.0, 4 - 1 / 64), zero_step=1 / 64),
    "scale": Fit(SCALE, (-8.0, 7.0), 6, 4, 0.07),
    "signed scale": Fit(SCALE, (-8.0, 7.0), 6, 4, 0.07, **SIGNED),
    "levels": Fit(SCALE, (-1.0, 1.0), 6, 4, 0.07, levels=NF),
    "zero": Fit(ZERO, UNSIGNED, 0, 4),
    "nothing": Fit(NOTHING, UNSIGNED),
}


@pytest.mark.parametrize("kind", KINDS)
def test_never_worse_than_given_and_errors_are_true(kind: str, rng: np.random.Generator) -> None:
    fit = KINDS[kind]
    for shape, group in (((5, 70), 32), ((17, 48), 16), ((3, 9), 9), ((33, 40), 1)):
        x = rng.standard_t(4, shape).astype("float32")
        h = rng.exponential(size=shape[1]).astype("float32")
        scales, zeros = start_of(x, group, fit)
        made = native.fit_groups(x, h, group, scales, zeros, fit)
        for place, numbers, part in groups_of(x, group):
            zero = 0.0 if zeros is None else float(zeros[place])
            before = error_of(numbers, h[part], float(scales[place]), zero, fit)
            zero = 0.0 if made.zeros is None else float(made.zeros[place])
            after = error_of(numbers, h[part], float(made.scales[place]), zero, fit)
            size = float((h[part] * numbers**2).sum())
            assert after <= before + 1e-6 * size
            assert made.errors[place] == pytest.approx(after, rel=1e-3, abs=1e-6 * size)
            if fit.zero_step:
                assert zero % fit.zero_step == 0 and fit.zeros[0] <= zero <= fit.zeros[1]


def test_as_good_as_a_search_of_all_scales(rng: np.random.Generator) -> None:
    """Over 2000 scales and 40 zeros, in float64; starts find nearly the best of them."""
    fit, lost = Fit(BOTH, (0.0, 7.0), 8, 6, 0.07), []
    x, h = rng.standard_normal((12, 16)).astype("float32"), np.ones(16, "float32")
    made = native.fit_groups(x, h, 16, *start_of(x, 16, fit), fit)
    for place, numbers, _ in groups_of(x, 16):
        scales = np.linspace(0.3, 1.1, 400) * (numbers.max() - numbers.min()) / 7
        offsets = np.linspace(0, 1, 41)[:, None, None]
        level = np.rint(numbers / scales[:, None] + offsets)
        level -= level.min(axis=-1, keepdims=True)
        level = level.clip(0, 7)
        mean, middle = level.mean(-1, keepdims=True), numbers.mean()
        spread = ((level - mean) ** 2).sum(-1)
        slope = ((level - mean) * (numbers - middle)).sum(-1) / np.maximum(spread, 1e-9)
        best = (((numbers - middle) - slope[..., None] * (level - mean)) ** 2).sum(-1).min()
        lost.append(float(made.errors[place]) / best)
    assert np.mean(lost) < 1.1 and max(lost) < 1.5


@pytest.mark.parametrize("kind", ["both", "whole zeros"])
def test_weights_on_a_grid_are_found_again(kind: str, rng: np.random.Generator) -> None:
    codes = rng.integers(0, 16, (9, 64)).astype("float32")
    codes[:, ::32], codes[:, 1::32] = 0, 15
    x = (codes - 6) * 0.25
    scales = np.full((9, 2), 0.31, "float32")
    made = native.fit_groups(x, np.ones(64, "float32"), 32, scales, scales * 0 + 3, KINDS[kind])
    assert (made.errors == 0).all() and (made.scales == 0.25).all() and (made.zeros == 6).all()


@pytest.mark.parametrize("value", [0.0, 1.5, -2.0, 1e-30, 3e-39, 3e30, 3e38])
@pytest.mark.parametrize("kind", KINDS)
def test_groups_of_one_value_stay_finite(kind: str, value: float) -> None:
    x, fit = np.full((3, 8), value, "float32"), KINDS[kind]
    scales, zeros = start_of(x, 8, fit)
    made = native.fit_groups(x, np.ones(8, "float32"), 8, scales, zeros, fit)
    assert np.isfinite(made.scales).all()
    assert made.zeros is None or np.isfinite(made.zeros).all()


def test_every_instruction_set_and_thread_count_gives_the_same_bits(
    rng: np.random.Generator,
) -> None:
    x, h = rng.standard_normal((67, 100)).astype("float32"), rng.random(100).astype("float32")
    active, threads = _kernels.active_isa(), _kernels.get_num_threads()
    try:
        for fit in KINDS.values():
            scales, zeros = start_of(x, 32, fit)
            made = []
            for isa, count in itertools.product(native._kernels.isas(), (1, 3)):
                _kernels.set_isa(isa)
                _kernels.set_num_threads(count)
                made.append(native.fit_groups(x, h, 32, scales, zeros, fit))
            for other in made[1:]:
                for one, two in zip(made[0], other, strict=True):
                    assert one is two or np.array_equal(one, two, equal_nan=True)
    finally:
        _kernels.set_isa(active)
        _kernels.set_num_threads(threads if threads > 1 else 0)


def test_nothing_beyond_the_arrays_is_touched(rng: np.random.Generator) -> None:
    x, h = rng.standard_normal((19, 37)).astype("float32"), rng.random(37).astype("float32")
    outputs = [Guarded((19, 3), np.float32, offset) for offset in (1, 2, 3)]
    for output in outputs:
        output.array[...] = 0.3
    numbers = (19, 37, 16, 1, 0, 4, 3, BOTH, 0.1, 0.0, 15.0, 1e-30, 0.0, 15.0, 1.0)
    arrays = [output.array for output in outputs]
    _kernels.fit_groups(*arrays, at_page_end(x), at_offset(h, 1), None, *numbers)
    for output in outputs:
        output.check()


def test_outputs_that_overlap_are_refused_before_anything_is_written() -> None:
    """Of each call: as if two of its arrays were views of one."""
    ones = np.ones((4, 4), "float32")
    other, small = (np.ones(shape, "float32") for shape in ((4, 4), (4, 1)))
    grid = Levels(UNSIGNED)
    fit = Fit(SCALE, UNSIGNED, 1, 1, 0.1)
    calls: list[Callable[[], Any]] = [
        lambda: native.descend(
            ones, other, small, None, ones, None, 4, grid, fit, ("float32", "float32"), 1, True
        ),
        lambda: native.descend(
            ones, ones[:], small, None, other, None, 4, grid, fit, ("float32", "float32"), 1, True
        ),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="shares memory"):
            call()
    assert (ones == 1).all() and (other == 1).all() and (small == 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": 0}, "block"),
        ({"find": 4}, "code range"),
        ({"find": BOTH, "zeros": None}, "code range"),
        ({"codes": (3.0, 3.0)}, "code range"),
    ],
)
def test_what_cannot_be_fitted_is_refused(change: dict[str, Any], message: str) -> None:
    x, ones = np.ones((2, 8), "float32"), np.ones((2, 1), "float32")
    values = {"group": 8, "find": SCALE, "zeros": ones, "codes": UNSIGNED} | change
    fit = Fit(values["find"], values["codes"], 1, 1, 0.1)
    if values["group"] == 0:
        ones, values["zeros"] = ones[:, :0], None
    with pytest.raises(ValueError, match=message):
        native.fit_groups(x, np.ones(8, "float32"), values["group"], ones, values["zeros"], fit)
