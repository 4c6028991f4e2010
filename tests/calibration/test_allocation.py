"""Choices within a budget: against all of them, and against the bound."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

pytest.importorskip("torch")

from quantization.calibration import allocation
from quantization.calibration.allocation import allocate, hull
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


def problem(rng: np.random.Generator, layers: int, choices: int):
    costs = rng.integers(0, 40, (layers, choices)).tolist()
    losses = rng.exponential(size=(layers, choices)).tolist()
    return costs, losses


def every(costs, losses):
    for chosen in itertools.product(*(range(len(each)) for each in costs)):
        yield (
            sum(each[c] for each, c in zip(costs, chosen, strict=True)),
            sum(each[c] for each, c in zip(losses, chosen, strict=True)),
        )


@pytest.mark.parametrize("seed", range(12))
def test_no_other_choices_are_better(seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs, losses = problem(rng, 5, 4)
    pairs = list(every(costs, losses))
    for budget in range(min(pair[0] for pair in pairs), 200, 7):
        found = allocate(costs, losses, budget)
        best = min(loss for cost, loss in pairs if cost <= budget)
        assert found.loss == pytest.approx(best) and found.cost <= budget
        assert found.bound <= best + 1e-12
        assert found.loss == pytest.approx(
            sum(each[c] for each, c in zip(losses, found.choices, strict=True))
        )
    for most in (min(pair[1] for pair in pairs), 3.0, 6.0):
        fitting = [cost for cost, loss in pairs if loss <= most]
        found = allocate(costs, losses, most_loss=most + 1e-12)
        assert (found and found.cost) == (min(fitting) if fitting else None)


def test_budgets_that_nothing_keeps_to() -> None:
    assert allocate([[3, 4]], [[1.0, 0.5]], 2) is None
    assert allocate([[3, 4]], [[1.0, 0.5]], most_loss=0.4) is None
    assert allocate([[3, 4]], [[1.0, 0.5]], 10**15).choices == [1]


def test_a_coarser_unit_keeps_to_the_budget_and_near_the_bound(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocation, "_BUDGETS", 5000)
    base = rng.integers(10_000, 1_000_000, 60)
    costs = [[int(size * bits) for bits in (2, 3, 4, 6)] for size in base]
    losses = [[float(x) * 4.0**-bits for bits in (2, 3, 4, 6)] for x in rng.exponential(size=60)]
    for bits in (2.2, 3, 4.5):
        budget = int(bits * base.sum())
        found = allocate(costs, losses, budget)
        assert found.cost <= budget and found.bound <= found.loss <= 1.05 * found.bound


def test_the_hull_is_convex_and_reached(rng: np.random.Generator) -> None:
    costs, losses = problem(rng, 5, 4)
    points = hull(costs, losses)
    slopes = [(b.loss - a.loss) / (b.cost - a.cost) for a, b in itertools.pairwise(points)]
    assert slopes == sorted(slopes)
    for point in points:
        assert allocate(costs, losses, point.cost).loss == pytest.approx(point.loss)
