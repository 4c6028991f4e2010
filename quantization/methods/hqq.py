"""Half-quadratic quantization: zero points that make large errors few and leave small ones."""

from __future__ import annotations

import numpy as np

from quantization.methods.fitting import Problem, Stored
from quantization.methods.statistics import Statistics
from quantization.numerics.parameters import Mode
from quantization.ops.native import Tensor
from quantization.schemes.packed_weights import PackedWeights
from quantization.schemes.scheme import Scheme

__all__ = ["half_quadratic", "hqq"]

_ROUNDS = 20
_POWER, _BETA = 0.7, np.float32(10)
_ROUNDED = 4  # bits at which the package starts from whole zero points
_MOST = 2.0e4  # of 1 / scale


def hqq(weight: Tensor, scheme: Scheme, statistics: Statistics | None = None) -> PackedWeights:
    """HQQ: zero points of least ``|w - q|^0.7``, found by half-quadratic splitting; no data.

    The scale of a group is its range over the largest code. By turns, codes are the nearest, errors
    e are what shrinking leaves of ``w - q``, ``sign(d) * max(|d| - |d|^(0.7 - 1) / beta, 0)``, and
    the zero point is the mean of ``code - (w - e) / scale``, with beta = 10, for 20 rounds or until
    the mean error of the matrix falls no more.

    A group whose mean error rounding to nearest keeps smaller, or whose zero point cannot be
    stored, is rounded to nearest: so no group has more mean absolute error than by ``rtn``, but for
    the rounding of scales under double quantization.

    Args:
        weight: ``[out, in]``, finite.
        scheme: one with zero points; those between codes (``w4g64af``) are what it is made for,
            whole ones are rounded from them.
        statistics: not used: no data is needed.

    Raises:
        ValueError: for a scheme without zero points.

    Returns:
        The packed matrix, after about 60 passes over the weights. It fails at 3 bits and fewer,
        where its few large errors are in columns of large inputs: ``lsq`` loses less.

    Source: H. Badri and A. Shaji, "Half-Quadratic Quantization of Large Machine Learning Models"
    (2023), and the solver of their package ``hqq``, whose numbers these are.

    Example:
        >>> import torch
        >>> hqq(torch.randn(8, 64), Scheme.parse("w4g64af")).zero_points.shape
        torch.Size([8, 1])
    """
    if scheme.mode is not Mode.Asymmetric:
        raise ValueError(
            f"the method hqq looks for zero points, and scheme {scheme} has none: use one such as "
            "'w4g64af', or the method lsq"
        )
    problem = Problem(weight, scheme, None)
    given = problem.stored_rtn()
    x = problem.matrix.x
    blocks, held = _in_groups(x.reshape(problem.x.shape), problem.group)
    scales, zeros = half_quadratic(blocks, held, scheme.bits, scheme.zero_point != "float")
    rtn_scales, rtn_zeros = given.scales.restored, given.zeros
    assert rtn_zeros is not None
    known = scales > 0
    made = problem.store(np.where(known, scales, rtn_scales), np.where(known, zeros, rtn_zeros))
    errors = [_mean_errors(stored, blocks, held, scheme.bits) for stored in (made, given)]
    take = errors[0] < errors[1]
    assert made.zeros is not None
    zeros = np.where(take, made.zeros, rtn_zeros)
    return problem.pack(problem.store(np.where(take, made.scales.restored, rtn_scales), zeros))


def half_quadratic(
    blocks: np.ndarray, held: np.ndarray, bits: int, within: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zero points of groups, float32 ``[lines, groups]``; 0 and 0 without a range.

    Args:
        blocks: float32 ``[lines, groups, length]``.
        held: bool ``[groups, length]``: False where a group is shorter than that.
        bits: width of a code.
        within: whether zero points must be codes of that width, so that a range holds 0.
    """
    most = np.float32(2**bits - 1)
    low = np.where(held, blocks, np.inf).min(axis=-1, keepdims=True)
    high = np.where(held, blocks, -np.inf).max(axis=-1, keepdims=True)
    if within:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
    with np.errstate(over="ignore"):
        span = (high - low).astype("float32")
    has_range = (span > np.finfo("float32").tiny) & np.isfinite(span)
    blocks, low = np.where(has_range, blocks, 0), np.where(has_range, low, 0)
    inverse = np.minimum(most / np.where(has_range, span, 1), np.float32(_MOST))
    zeros, best = -low.astype("float32") * inverse, np.inf
    if bits == _ROUNDED:
        zeros = np.rint(zeros)
    count = held.sum() * len(blocks)
    for _ in range(_ROUNDS):
        codes = np.rint(blocks * inverse + zeros).clip(0, most)
        off = blocks - (codes - zeros) / inverse
        error = np.abs(off * held).sum(dtype="float64") / count
        size = np.abs(off)
        with np.errstate(divide="ignore"):
            shrunk = np.sign(off) * np.maximum(size - size ** (_POWER - 1) / _BETA, 0)
        found = (codes - (blocks - shrunk) * inverse) * held
        zeros = found.sum(axis=-1, keepdims=True) / held.sum(axis=-1)[:, None]
        if error >= best:
            break
        best = error
    known = has_range[..., 0]
    return np.where(known, 1 / inverse[..., 0], 0), np.where(known, zeros[..., 0], 0)


def _in_groups(x: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Lines in groups, the last filled up with zeros, and which numbers are not filling."""
    lines, columns = x.shape
    groups = -(-columns // group)
    filled = np.pad(x, ((0, 0), (0, groups * group - columns)))
    held = np.arange(groups * group) < columns
    return filled.reshape(lines, groups, group), held.reshape(groups, group)


def _mean_errors(stored: Stored, blocks: np.ndarray, held: np.ndarray, bits: int) -> np.ndarray:
    """Mean magnitudes of errors by group, infinite where stored numbers are not finite."""
    assert stored.zeros is not None
    scales, zeros = stored.scales.restored[..., None], stored.zeros[..., None]
    most = np.float32(2**bits - 1)
    with np.errstate(all="ignore"):
        codes = np.rint(blocks / np.where(scales > 0, scales, 1) + zeros).clip(0, most)
        errors = np.abs((blocks - (codes - zeros) * scales) * held).mean(axis=-1)
    return np.where(np.isfinite(errors), errors, np.inf)
