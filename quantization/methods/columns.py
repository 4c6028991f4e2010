"""Methods that divide columns by a number each, which layers multiply their inputs by."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from quantization.methods.lsq import lsq
from quantization.methods.statistics import Statistics
from quantization.ops import native
from quantization.ops.dtypes import SOURCES, name_of
from quantization.ops.native import Tensor
from quantization.schemes.layer_weights import pack_as
from quantization.schemes.packed_weights import PARTS, PackedWeights, pack_matrix
from quantization.schemes.scheme import Scheme

__all__ = ["awq", "divided", "sinq", "sinq_lsq"]

_SWEEPS = 16
_STD = (1e-3, 1e3)  # SINQ's own bounds of a standard deviation, of a step and of a factor
_STEP = (0.7, 2.0)
_FACTOR = (-0.3, 10.0)
_ORDINARY = (-8, 1)  # exponents of the mean size of matrices that are taken as they are
_RATIOS = 20
_LEAST = 2.0**-14  # a float16 of full precision


def divided(
    weight: Tensor,
    scheme: Scheme,
    multipliers: np.ndarray,
    method: Any,
    statistics: Statistics | None = None,
) -> PackedWeights:
    """A matrix whose columns are divided by multipliers and then packed by a method.

    Args:
        weight: ``[out, in]``, finite.
        scheme: one with ``input_scale``.
        multipliers: ``[in]``, above 0. They are brought to 1 at most, by one power of two, unless
            the divided weights would be beyond their type then, and rounded as they are stored,
            before anything is divided.
        method: of the divided matrix under the scheme without multipliers.
        statistics: of the layer's inputs; the method gets those of the multiplied inputs.

    Raises:
        ValueError: if the scheme has no multipliers; and as the method raises them.

    Example:
        >>> weight = np.array([[4.0, 1.0], [8.0, 2.0]], "float32")
        >>> made = divided(weight, Scheme.parse("w4+cols"), np.array([4.0, 1.0]), lsq)
        >>> made.input_scale, np.allclose(made.dequantize(), weight)
        (array([1.  , 0.25], dtype=float32), True)
    """
    if not scheme.input_scale:
        raise ValueError(
            f"scheme {scheme} has no place for multipliers of columns: use '{scheme}+cols'"
        )
    dtype = name_of(weight.dtype)
    exact = native.to_array(native.cast(weight, "float64"))
    stored = _stored_multipliers(multipliers, exact, weight)
    factors = native.to_array(native.cast(stored, "float64"))
    wide = torch.float64 if dtype == "float64" else torch.float32
    packed = pack_as(
        torch.from_numpy(exact / factors).to(wide),
        dataclasses.replace(scheme, input_scale=False),
        getattr(torch, dtype),
        pack=lambda part, plain, name: method(part, plain, _of_multiplied(statistics, factors)),
    )
    parts = {name: _like(getattr(packed, name), weight) for name in PARTS}
    parts["input_scale"] = stored
    return PackedWeights(scheme, packed.shape, **parts, dtype=dtype)


def sinq(weight: Tensor, scheme: Scheme, statistics: Statistics | None = None) -> PackedWeights:
    """SINQ: rows and columns are brought to even deviations in turn, then rounded to nearest.

    Each tile, all rows by one group of columns, is divided by a factor a row and a factor a column,
    both corrected 16 times by its standard deviations, the step within 0.7 and 2, as long as the
    imbalance, the largest deviation over the least, does not grow. Factors of columns are kept as
    multipliers; those of rows are part of the scales, which rounding to nearest finds anyhow.

    Args:
        weight: ``[out, in]``, finite.
        scheme: one with multipliers, such as ``w4g64a+cols``; any grid.
        statistics: not used: no data is needed.

    Raises:
        ValueError: for a scheme without multipliers.

    Returns:
        The packed matrix, after about 100 passes over the weights. It fails, as rounding to
        nearest does, where few inputs are much larger than the others: weights alone do not tell.

    Source: L. Mueller et al., "SINQ" (2025), arXiv 2509.22944, and the package ``sinq`` of its
    authors, whose factors these are. Matrices of mean sizes beyond 2^-9..2 are brought there first,
    since the bounds of the method are absolute numbers.

    Example:
        >>> made = sinq(torch.randn(64, 64), Scheme.parse("w3g32a+cols"))
        >>> made.input_scale.shape
        torch.Size([64])
    """
    return divided(weight, scheme, _even_columns(weight, scheme), _nearest)


def sinq_lsq(weight: Tensor, scheme: Scheme, statistics: Statistics | None = None) -> PackedWeights:
    """The columns of :func:`sinq`, then scales and zero points by ``lsq``.

    Errors count as in the normalised matrix; with moments, as in the outputs.

    Args:
        weight: ``[out, in]``, finite.
        scheme: one with multipliers.
        statistics: of the layer's inputs, or None.

    Raises:
        ValueError: for a scheme without multipliers.

    Returns:
        The packed matrix, in the time of both. It fails as :func:`sinq` does, but for what moments
        tell of the inputs.

    Source: :func:`sinq` and :func:`quantization.methods.lsq.lsq`.

    Example:
        >>> str(sinq_lsq(torch.randn(8, 64), Scheme.parse("w3g32a+cols")).scheme)
        'w3g32a+cols'
    """
    return divided(weight, scheme, _even_columns(weight, scheme), lsq, statistics)


def awq(weight: Tensor, scheme: Scheme, statistics: Statistics | None = None) -> PackedWeights:
    """AWQ: columns of large inputs are made larger before they are rounded, by the best power.

    Columns are multiplied by ``s_k = E[x_k^2] ** (ratio / 2)``, divided by the geometric mean of
    the largest and the least s; of ratios 0, 0.05, ... 0.95 that of the least ``sum of E[x_k^2] *
    (w_k - q_k)^2`` is taken, with q rounded to nearest. ``1 / s_k`` is kept as the multiplier.

    Never worse than rounding to nearest in that sum, as the ratio 0 is rounding to nearest.

    Args:
        weight: ``[out, in]``, finite.
        scheme: one with multipliers, such as ``w4g64a+cols``; any grid.
        statistics: of the layer's inputs; their moments are used.

    Raises:
        ValueError: without statistics, or for a scheme without multipliers.

    Returns:
        The packed matrix, after 20 roundings of it. It fails where it moves the range of groups:
        ``lsq`` under the same moments loses less (docs/accuracy.md).

    Source: J. Lin et al., "AWQ" (2023), of each layer alone: with root mean squares for its mean
    magnitudes, without its search of clipping, and nothing is folded into the layer before.

    Example:
        >>> known = Statistics.of(torch.randn(10, 64))
        >>> awq(torch.randn(8, 64), Scheme.parse("w3g32a+cols"), known).shape
        (8, 64)
    """
    if statistics is None:
        raise ValueError(
            "the method awq needs moments of the layer's inputs: calibrate(model) gives them, with "
            "data or without; sinq does without"
        )
    moments = statistics.moments.numpy()
    exact = native.to_array(native.cast(weight, "float64"))
    size = np.sqrt(moments / max(moments.mean(), np.finfo("float64").tiny)).clip(1e-4)
    best, least = None, np.inf
    for step in range(_RATIOS):
        powers = size ** (step / _RATIOS)
        tried = divided(weight, scheme, np.sqrt(powers.max() * powers.min()) / powers, _nearest)
        off = exact - native.to_array(tried.dequantize("float64"))
        loss = float((np.square(off) @ moments).sum())
        if best is None or loss < least:
            best, least = tried, loss
    assert best is not None
    return best


# ---- multipliers -----------------------------------------------------------------------------


def _nearest(weight: Tensor, scheme: Scheme, statistics: Statistics | None) -> PackedWeights:
    return pack_matrix(weight, scheme)


def _stored_multipliers(multipliers: np.ndarray, weight: np.ndarray, like: Tensor) -> Any:
    """Multipliers as a layer stores them, all above 0."""
    dtype = name_of(like.dtype)
    most = multipliers.max(initial=_LEAST)
    given = np.ldexp(np.maximum(multipliers, most * _LEAST), -int(np.ceil(np.log2(most))))
    largest = min(SOURCES[dtype].max, SOURCES["float32"].max) / 2
    beyond = np.abs(weight / given).max(initial=0) / largest
    if beyond > 1:
        given = np.ldexp(given, int(np.frexp(beyond)[1]))
    wide = native.as_tensor_like(given.astype("float32"), "float32", like)
    return native.cast(wide, dtype)


def _of_multiplied(statistics: Statistics | None, factors: np.ndarray) -> Statistics | None:
    """Statistics of inputs times factors."""
    if statistics is None:
        return None
    given, hessian = torch.from_numpy(factors), statistics.hessian
    if hessian is not None:
        hessian = (hessian.double() * given * given[:, None]).to(hessian.dtype)
    return Statistics(statistics.moments * given.square(), hessian, statistics.count)


def _like(part: torch.Tensor | None, weight: Tensor) -> Any:
    """A part of a packed matrix, of the kind and on the device of the weight."""
    if part is None:
        return None
    return native.as_tensor_like(native.to_array(part), name_of(part.dtype), weight)


def _even_columns(weight: Tensor, scheme: Scheme) -> np.ndarray:
    """The factors of columns that SINQ finds, ``[in]``."""
    cast = native.to_array(native.cast(weight, "float64"))
    size = float(np.abs(cast).mean())
    exponent = int(np.frexp(size)[1])
    if size > 0 and not _ORDINARY[0] <= exponent <= _ORDINARY[1]:
        cast = np.ldexp(cast, _ORDINARY[0] // 2 - exponent)
    exact = torch.from_numpy(cast.astype("float32"))
    tiles = exact.split(scheme.group(exact.shape[1]), dim=1)
    return torch.cat([_balanced(tile.contiguous()) for tile in tiles]).double().numpy()


def _balanced(tile: torch.Tensor) -> torch.Tensor:
    """The factors of columns of one tile, ``[columns]``, that balance it best."""
    rows, columns = torch.zeros(tile.shape[0], 1), torch.zeros(tile.shape[1])
    best, least = columns.exp(), torch.inf
    if min(tile.shape) < 2:  # no deviation
        return best
    target = min(float(tile.std(dim).clamp(*_STD).min()) for dim in (0, 1)) + 1e-6
    for _ in range(_SWEEPS):
        now = tile / columns.exp() / rows.exp()
        of_rows, of_columns = now.std(1), now.std(0)
        both = torch.cat([of_rows, of_columns])
        imbalance = float(both.max() / both.min().clamp_min(1e-12))
        if imbalance > least:
            break
        best, least = columns.exp(), imbalance
        steps = (of_columns.clamp(*_STD) / target).clamp(*_STEP).log()
        columns = (columns + steps).clamp(*_FACTOR)
        steps = (of_rows.clamp(*_STD)[:, None] / target).clamp(*_STEP).log()
        rows = (rows + steps).clamp(*_FACTOR)
    return best
