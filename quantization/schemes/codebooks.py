"""Codebooks: tables of levels that codes point into, and levels that are fitted to numbers.

=========  ========================================================================================
table      levels
=========  ========================================================================================
``NF4``    16 quantiles of the normal distribution, -1..1, with 0 among them; code 0 is the lowest
``FP4``    sign, then an order of bitsandbytes' own: 0, 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4
``E2M1``   sign, two bits of exponent, one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6
=========  ========================================================================================

In the last two the upper eight codes are the lower eight with a minus sign; code 8, minus zero, is
never chosen.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantization.ops import native
from quantization.ops.dtypes import index_of

__all__ = ["E2M1", "FP4", "NF4", "fit_codebook", "fit_ternary"]


def _signed(*levels: float) -> tuple[float, ...]:
    return (*levels, *(-level for level in levels))


#: T. Dettmers et al., QLoRA (2023), appendix E.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

#: bitsandbytes (2023), data type "fp4".
FP4 = _signed(0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12)

#: OCP Microscaling formats, version 1.0 (2023), table of FP4.
E2M1 = _signed(0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

_EXACT = 1 << 16  # values that a row may have for each to be a place where levels part
_CELL_BITS = 12  # of a float32's mantissa, left out where values are gathered into cells
_AT_ONCE = 1 << 22  # values that are gathered at once


def fit_codebook(values: np.ndarray, bits: int, weights: np.ndarray | None = None) -> np.ndarray:
    """The ``2**bits`` levels that are nearest to the values of each row, in squared error.

    Exact for rows of up to 65536 values. In a longer row, values that agree in sign, exponent and
    the first 11 bits of their float32 mantissa keep together.

    Args:
        values: ``[rows, count]``, finite floats in any order.
        bits: 1..8.
        weights: not negative, ``[rows, count]`` or what broadcasts to it: how much each squared
            error counts; None: all the same, as where a row has the weight 0 throughout.

    Returns:
        float64 ``[rows, 2**bits]``, ascending. Levels that a row does not need repeat its largest
        value (no values: 0).

    Raises:
        TypeError: if ``bits`` is not an integer.
        ValueError: if ``bits`` is not 1..8, or ``values`` has not two dimensions.

    Source: H. Wang and M. Song, "Ckmeans.1d.dp: optimal k-means clustering in one dimension by
    dynamic programming" (2011).

    Example:
        >>> fit_codebook(np.array([[9.0, 1.0, 2.0, 11.0]]), bits=1)
        array([[ 1.5, 10. ]])
        >>> fit_codebook(np.array([[9.0, 1.0, 2.0, 11.0]]), bits=1, weights=np.array([1, 3, 1, 0]))
        array([[1.25, 9.  ]])
    """
    bits = index_of(bits, "bits")
    if not 1 <= bits <= 8 or values.ndim != 2:
        raise ValueError(
            f"values [rows, count] and bits 1..8 are needed, not shape {values.shape} and {bits}"
        )
    if weights is not None:
        weights = np.broadcast_to(weights, values.shape)
    if values.shape[1] <= _EXACT:
        ordered, beside = _sorted(values, weights)
        return native.fit_levels(ordered, beside, 1 << bits)
    levels = np.empty((values.shape[0], 1 << bits))
    for row, numbers in enumerate(values):
        cells = _gathered(numbers, None if weights is None else weights[row])
        ordered, beside = _sorted(*cells)
        levels[row] = native.fit_levels(ordered, beside, 1 << bits)
    return levels


def _sorted(values: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, Any]:
    """Rows of float64 values, ascending, and their weights."""
    if weights is None:
        return np.sort(values, axis=1).astype("float64", copy=False), None
    order = np.argsort(values, axis=1)
    ordered, beside = (np.take_along_axis(each, order, axis=1) for each in (values, weights))
    return ordered.astype("float64", copy=False), beside.astype("float64", copy=False)


def _gathered(values: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Cells of a long row: their mean values and weights, ``[1, cells]`` each, in no order."""
    if weights is not None and not weights.any():
        weights = None
    weight, moment = np.zeros((2, 1 << 32 - _CELL_BITS))
    for start in range(0, values.size, _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        part = values[some].astype("float32", copy=False)
        cell = part.view("uint32") >> _CELL_BITS
        share = None if weights is None else weights[some]
        weight += np.bincount(cell, share, minlength=weight.size)
        moment += np.bincount(cell, part if share is None else part * share, minlength=weight.size)
    used = weight > 0
    return (moment[used] / weight[used])[None], weight[used][None]


def fit_ternary(magnitudes: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """The scales of least squared error for -1, 0 and 1, one for each line along the last axis.

    For a scale s the magnitudes beyond s / 2 become 1. They are the n largest for some n, the best
    s for them is their mean, and that takes ``(their sum)**2 / n`` off the squared error: the n
    with the largest such gain is found among all. In a line of more than 65536, magnitudes keep
    together as in :func:`fit_codebook`.

    Args:
        magnitudes: ``[..., count]``, finite, not negative; padding by zeros does no harm.
        weights: not negative, what broadcasts to that shape: how much each squared error counts,
            not all 0 in a line; None: all the same.

    Returns:
        float64 ``[...]``; 0 for a line of zeros.

    Source: F. Li et al., "Ternary weight networks" (2016), equation 4, without its approximation
    of the threshold.

    Example:
        >>> fit_ternary(np.array([[4.0, 0.5, 6.0, 1.0], [1.0, 1.0, 1.0, 1.0]]))
        array([5., 1.])
    """
    if weights is not None:
        weights = np.broadcast_to(weights, magnitudes.shape)
    if magnitudes.shape[-1] <= _EXACT:
        return _fit_ternary(magnitudes, weights)
    scales = np.empty(magnitudes.shape[:-1])
    for line in np.ndindex(scales.shape):
        cells = _gathered(magnitudes[line], None if weights is None else weights[line])
        scales[line] = _fit_ternary(*cells)[0]
    return scales


def _fit_ternary(magnitudes: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    if weights is None:
        ordered = np.sort(magnitudes, axis=-1)[..., ::-1]
        count: np.ndarray = np.arange(1, magnitudes.shape[-1] + 1)
        total = np.cumsum(ordered, axis=-1, dtype="float64")
    else:
        order = np.argsort(-magnitudes, axis=-1)
        share = np.take_along_axis(weights, order, axis=-1)
        count = np.cumsum(share, axis=-1, dtype="float64")
        moment = share * np.take_along_axis(magnitudes, order, axis=-1)
        total = np.cumsum(moment, axis=-1, dtype="float64")
    with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0 before the first weight
        mean = total / count
    gain = np.where(count > 0, total * mean, 0)
    best = np.argmax(gain, axis=-1, keepdims=True)
    return np.take_along_axis(mean, best, axis=-1)[..., 0]
