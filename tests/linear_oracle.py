"""The linear map and its gradient in extended precision, with bounds on what a kernel may answer.

A sum of K products in a type of unit roundoff u errs by at most (K + 2) u sum|x w|, whatever its
order and with or without FMA (Higham, Accuracy and Stability of Numerical Algorithms, 3.1).
"""

from __future__ import annotations

import numpy as np

from tests.oracle import largest

Array = np.ndarray
Wide = np.longdouble

#: Half the distance from 1 to the next number, and half the smallest number.
UNIT = {"float32": 2.0**-24, "float64": 2.0**-53, "float16": 2.0**-11, "bfloat16": 2.0**-8}
TINY = {"float32": 2.0**-150, "float64": 2.0**-1074, "float16": 2.0**-25, "bfloat16": 2.0**-134}


def accumulator(name: str) -> str:
    """The type in which activations of a type are summed."""
    return "float64" if name == "float64" else "float32"


def forward(x: Array, weights: Array, scales: Array, bias: Array | None) -> tuple[Array, Array]:
    """Exact y [M, N] from x [M, K], and the magnitude of what was summed for each."""
    factors = weights.astype(Wide) * scales.astype(Wide)[:, None]
    y, size = _products(x.astype(Wide), factors)
    if bias is not None:
        y, size = y + bias.astype(Wide), size + np.abs(bias.astype(Wide))
    return y, size


def backward(grad: Array, weights: Array, scales: Array) -> tuple[Array, Array]:
    """Exact grad_x [M, K] from grad [M, N], and the magnitude of what was summed for each."""
    return _products(grad.astype(Wide), (weights.astype(Wide) * scales.astype(Wide)[:, None]).T)


def _products(rows: Array, factors: Array) -> tuple[Array, Array]:
    terms = rows[:, None, :] * factors[None]
    return terms.sum(-1), np.abs(terms).sum(-1)


def is_within(have: Array, exact: Array, size: Array, terms: int, summed: str, stored: str) -> bool:
    """Whether every number of `have` (float64) is one that a kernel may give.

    Args:
        have: what it gave.
        exact: what is right.
        size: the magnitude of all that was summed.
        terms: products in a sum.
        summed: type of the accumulator.
        stored: type of the result.
    """
    bound = (terms + 6) * (UNIT[summed] * size + Wide(2 * TINY[summed]) * (1 + size))
    bound += UNIT[stored] * (np.abs(exact) + bound) + TINY[stored]
    overflows = np.abs(exact) + bound > largest(stored)
    with np.errstate(invalid="ignore"):
        return bool(np.all(overflows | (np.abs(have.astype(Wide) - exact) <= bound)))
