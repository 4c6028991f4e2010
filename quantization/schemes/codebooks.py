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

import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from quantization.ops import native
from quantization.ops.dtypes import index_of

__all__ = [
    "E2M1",
    "FP4",
    "NF4",
    "fit_codebook",
    "fit_ternary",
    "own_grids",
    "own_levels",
    "register_grid",
]


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

#: Levels by bits, of grids that have names of their own.
_OWN: dict[str, tuple[float, ...] | Callable[[int], Iterable[float]]] = {}
_TAKEN = re.compile(r"w|int|kmeans|nf|fp|mxfp|binary|ternary|table")


_EXACT = 1 << 16  # values that a row may have for each to be a place where levels part
_CELL_BITS = 12  # of a float32's mantissa, left out where values are gathered into cells
_AT_ONCE = 1 << 22  # values that are gathered at once


def register_grid(name: str, levels: Iterable[float] | Callable[[int], Iterable[float]]) -> None:
    """Let schemes name a table of levels of one's own: ``"nameg32"``; of a function ``"name3g32"``.

    A weight is the nearest level times its scale, and the scale of a group its largest magnitude
    over the largest level's; methods that fit scales, such as ``lsq``, fit these too. The scheme
    itself is ``table(-1,0,...)g32``: its levels are data, so what is saved loads anywhere.

    Args:
        name: letters and underscores, not that of another grid.
        levels: 2, 4, ... or 256 numbers in any order, one a code; or a function from the width of a
            code to these.

    Raises:
        TypeError: if that is neither, or ``name`` is no string.
        ValueError: for another name, one that is taken by other levels, or another count of levels.

    Example:
        >>> from quantization import pack_matrix
        >>> register_grid("steep", [-1, -0.25, 0.25, 1])
        >>> pack_matrix(np.array([[-8.0, 1.9, 3, 8]]), "steep").dequantize()
        array([[-8.,  2.,  2.,  8.]])
        >>> register_grid("cubic", lambda bits: np.linspace(-1, 1, 2**bits) ** 3)
        >>> str(pack_matrix(np.ones((1, 4)), "cubic1g2+dq").scheme)
        'table(-1,1)g2+dq'
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of a grid is a string, not {name!r:.60}")
    if not re.fullmatch("[A-Za-z_]+", name) or _TAKEN.fullmatch(name):
        raise ValueError(
            f"the name of a grid is letters and underscores, and not that of another: {name!r:.60}"
        )
    source = levels if callable(levels) else _counted(levels, None)
    if _OWN.setdefault(name, source) != source:
        raise ValueError(f"there is a grid {name!r} of other levels already; choose another name")


def own_grids() -> tuple[str, ...]:
    """Names of registered grids."""
    return tuple(_OWN)


def own_levels(name: str, bits: int | None) -> tuple[float, ...]:
    """The levels of a registered grid, for codes of that width; None: the only one it has.

    Raises:
        ValueError: for a width that it does not have.
    """
    source = _OWN[name]
    if not callable(source):
        return _counted(source, bits)
    if bits is None:
        raise ValueError(f"the grid {name!r} has several widths: write one, such as {name}4")
    return _counted(source(bits), bits)


def _counted(levels: Any, bits: int | None) -> tuple[float, ...]:
    given = tuple(float(level) for level in levels)
    if len(given) not in [2**width for width in range(1, 9)] or bits not in (
        None, (len(given) - 1).bit_length()
    ):  # fmt: skip
        raise ValueError(f"there are {len(given)} levels, and codes of {bits or '1..8'} bits")
    return given


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
