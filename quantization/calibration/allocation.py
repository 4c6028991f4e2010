"""One choice a layer, all together within a budget, at the least sum of losses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Allocation", "Point", "allocate", "hull"]

_PLACES = 1 << 26  # of the table of choices: layers times budgets
_BUDGETS = 1 << 18


class Allocation(NamedTuple):
    """A choice for each layer.

    Attributes:
        choices: the number of each layer's choice.
        cost: their costs together.
        loss: their losses together.
        bound: no choices of that cost or less have a smaller loss than this.
    """

    choices: list[int]
    cost: int
    loss: float
    bound: float


class Point(NamedTuple):
    """Choices that no other choices of their cost or less, nor mixtures of such, can beat."""

    cost: int
    loss: float


def allocate(
    costs: Sequence[Sequence[int]],
    losses: Sequence[Sequence[float]],
    budget: int | None = None,
    most_loss: float = math.inf,
) -> Allocation | None:
    """The choices of least loss within a budget; without one, of least cost within ``most_loss``.

    Dynamic programming over the costs in units of their greatest common divisor, which is exact.
    Where these are more than 2^18, or 2^26 with all layers, costs are rounded up to a coarser unit:
    the result is then within the budget, and its distance to ``bound`` says what that may have
    cost.

    Args:
        costs: of each layer, what each of its choices takes: whole numbers, 0 or more.
        losses: of each layer, what each of its choices loses.
        budget: of all costs together.
        most_loss: of all losses together, where there is no budget.

    Returns:
        None if there are no such choices.

    Source: the multiple-choice knapsack problem; P. Sinha and A. Zoltners (1979) for the bound, the
    hull of each layer with the last step taken in part.

    Example:
        >>> allocate([[1, 2], [1, 3]], [[5.0, 1.0], [9.0, 2.0]], budget=4)
        Allocation(choices=[0, 1], cost=4, loss=7.0, bound=6.5)
    """
    least = [min(each) for each in costs]
    room = sum(max(each) for each in costs) - sum(least)
    if budget is not None:
        room = min(room, budget - sum(least))
    if room < 0:
        return None
    steps = [[cost - low for cost in each] for each, low in zip(costs, least, strict=True)]
    unit = math.gcd(*(step for each in steps for step in each)) or 1
    most = max(1, min(_BUDGETS, _PLACES // max(1, len(costs))))
    unit *= max(1, -(-(room // unit) // most))
    weights = [[-(-step // unit) for step in each] for each in steps]
    values, taken = _table(weights, losses, room // unit)
    place = room // unit
    if budget is None:
        if values[-1] > most_loss:
            return None
        place = int(np.argmax(values <= most_loss))
    chosen = _read(weights, taken, place)
    cost = sum(each[c] for each, c in zip(costs, chosen, strict=True))
    loss = math.fsum(each[c] for each, c in zip(losses, chosen, strict=True))
    within = cost if budget is None else budget
    return Allocation(chosen, cost, loss, min(loss, _bound(costs, losses, within)))


def _table(
    weights: list[list[int]], losses: Sequence[Sequence[float]], room: int
) -> tuple[np.ndarray, np.ndarray]:
    """Least losses within each budget 0..room, and the choices of each layer there."""
    values = np.zeros(room + 1)
    taken = np.zeros((len(weights), room + 1), "uint8")
    for layer, (each, lost) in enumerate(zip(weights, losses, strict=True)):
        made = np.full(room + 1, np.inf)
        for choice in sorted(range(len(each)), key=each.__getitem__):
            weight = each[choice]
            if weight > room:
                continue
            tried = values[: room + 1 - weight] + lost[choice]
            better = tried < made[weight:]
            made[weight:][better] = tried[better]
            taken[layer, weight:][better] = choice
        values = made
    return values, taken


def _read(weights: list[list[int]], taken: np.ndarray, place: int) -> list[int]:
    """The choices that lead to a budget, from the last layer back."""
    chosen = []
    for each, row in zip(reversed(weights), taken[::-1], strict=True):
        chosen.append(int(row[place]))
        place -= each[chosen[-1]]
    return chosen[::-1]


def hull(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]]) -> list[Point]:
    """The corners of the lower convex hull of all choices together, from the least cost on.

    Example:
        >>> hull([[1, 2], [1, 3]], [[5.0, 1.0], [9.0, 2.0]])
        [Point(cost=2, loss=14.0), Point(cost=3, loss=10.0), Point(cost=5, loss=3.0)]
    """
    corners = [_corners(*each) for each in zip(costs, losses, strict=True)]
    at = Point(sum(each[0].cost for each in corners), math.fsum(each[0].loss for each in corners))
    steps = [
        Point(after.cost - before.cost, after.loss - before.loss)
        for each in corners
        for before, after in itertools.pairwise(each)
    ]
    points = [at]
    for step in sorted(steps, key=lambda step: step.loss / step.cost):
        at = Point(at.cost + step.cost, at.loss + step.loss)
        points.append(at)
    return points


def _corners(costs: Sequence[int], losses: Sequence[float]) -> list[Point]:
    """The lower convex hull of one layer's choices, falling."""
    found: list[Point] = []
    for point in sorted(map(Point, costs, losses)):
        if found and point.loss >= found[-1].loss:
            continue
        while len(found) > 1 and _slope(found[-2], point) <= _slope(found[-2], found[-1]):
            found.pop()
        found.append(point)
    return found


def _slope(one: Point, other: Point) -> float:
    return (other.loss - one.loss) / (other.cost - one.cost)


def _bound(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> float:
    """The least loss within a budget, were choices mixed."""
    points = hull(costs, losses)
    for before, after in itertools.pairwise(points):
        if after.cost > budget:
            return before.loss + (budget - before.cost) * _slope(before, after)
    return points[-1].loss
