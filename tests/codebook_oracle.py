"""The best levels of a few numbers by trying every clustering; the nearest level by fractions."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np


def squared_error(values: np.ndarray, levels: np.ndarray, weights: np.ndarray) -> float:
    """Sum of weight times squared distance to the nearest level."""
    apart = np.abs(values[:, None] - levels[None, :]).min(axis=1)
    return float((weights * apart**2).sum())


def least_error(values: np.ndarray, count: int, weights: np.ndarray) -> float:
    """The squared error of the best `count` levels, over all cuts of the sorted values."""
    order = np.argsort(values)
    values, weights = values[order], weights[order]
    best = np.inf
    count = min(count, values.size)
    for cuts in itertools.combinations(range(1, values.size), count - 1):
        error = 0.0
        for first, last in itertools.pairwise((0, *cuts, values.size)):
            x, w = values[first:last], weights[first:last]
            if w.sum() > 0:
                error += (w * (x - (w * x).sum() / w.sum()) ** 2).sum()
        best = min(best, error)
    return float(best)


def least_error_of_many(values: np.ndarray, count: int, weights: np.ndarray) -> float:
    """The same by the textbook recurrence over all pairs of cuts, for some hundred values."""
    order = np.argsort(values)
    x, w = values[order], weights[order]
    size = x.size
    cost = np.zeros((size + 1, size + 1))
    for first in range(size):
        total = np.cumsum(w[first:])
        mean = np.cumsum(w[first:] * x[first:]) / np.maximum(total, 1e-300)
        for last in range(first + 1, size + 1):
            part = slice(first, last)
            cost[first, last] = (w[part] * (x[part] - mean[last - first - 1]) ** 2).sum()
    best = cost[0].copy()
    for _ in range(1, min(count, size)):
        best = np.array([(best[: i + 1] + cost[: i + 1, i]).min() for i in range(size + 1)])
    return float(best[size])


def nearest_code(x: float, scale: float, levels: np.ndarray) -> int:
    """Which level times the scale is nearest to x, exactly; the first of several."""
    apart = [abs(Fraction(x) - Fraction(scale) * Fraction(float(level))) for level in levels]
    return apart.index(min(apart))
