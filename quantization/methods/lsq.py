"""Scales and zero points of least weighted squared error, from several starts."""

from __future__ import annotations

import numpy as np

from quantization.methods.fitting import Problem, Stored
from quantization.methods.statistics import Statistics
from quantization.ops import native
from quantization.ops.native import Tensor
from quantization.schemes.packed_weights import PackedWeights
from quantization.schemes.scheme import Scheme

__all__ = ["fit_scales", "lsq"]

_STARTS, _ROUNDS = 8, 4
#: By how much of the whole range each start is shorter, by the width of a code.
_SHRINK = {1: 0.12, 2: 0.09, 3: 0.07, 4: 0.05, 5: 0.03, 6: 0.02, 7: 0.012, 8: 0.006}
_EXPONENTS = (1, -1)  # tried around that of the MX rule


def lsq(weight: Tensor, scheme: Scheme, statistics: Statistics | None = None) -> PackedWeights:
    """Least squares: of each group the scale and zero point that lose least, and nearest codes.

    Minimises ``sum of E[x_k^2] * (w_k - (q_k - z) * s)^2`` over s, z and codes q: for given codes
    s and z have a closed form, for given s and z the codes are the nearest; the two take turns from
    8 starts, the whole range of the group and shorter ones. Scales and zero points are then rounded
    as they are stored, and the zero point is fitted again to the rounded scale. Symmetric codes may
    get a scale with a sign. Levels of a table (``nf4``, ``fp4``, ``kmeans``) stay, their scale is
    fitted; ``mxfp4`` tries the powers of two around its rule. ``binary`` and ``ternary`` have exact
    solutions already, which are taken.

    Never worse than rounding to nearest in weighted squared error on any group. It fails where
    columns go together strongly, which moments do not see: use ``descent`` there.

    Args:
        weight: ``[out, in]``, finite.
        scheme: any.
        statistics: of the layer's inputs; their moments weigh the columns. None: all the same.

    Returns:
        The packed matrix; in time about 45 passes over the weights.

    Source: the alternation is Lloyd's (1957) under an affine grid, as in llama.cpp's
    ``make_qkx2_quants`` (2023), with weights and starts of its own.

    Example:
        >>> import torch
        >>> from quantization import pack_matrix
        >>> weight, scheme = torch.randn(8, 64), Scheme.parse("w3g32a")
        >>> better, plain = lsq(weight, scheme), pack_matrix(weight, scheme)
        >>> bool((better.dequantize() - weight).norm() <= (plain.dequantize() - weight).norm())
        True
    """
    problem = Problem(weight, scheme, statistics)
    if scheme.grid in ("binary", "ternary"):
        return problem.pack_rtn()
    return problem.pack(fit_scales(problem))


def fit_scales(problem: Problem) -> Stored:
    """The scales and zero points of :func:`lsq`, as they are stored."""
    given = problem.stored_rtn()
    scales, zeros = given.scales.restored, given.zeros
    if problem.scheme.grid == "mxfp4":
        tried = [problem.store(scales * 2.0**exponent) for exponent in _EXPONENTS]
        for other in tried:
            given = _better(problem, given, other)
        return given
    what = native.SCALE if zeros is None else native.BOTH
    shrink = _SHRINK[problem.scheme.bits]
    found = problem.fit(scales, zeros, problem.find(what, _STARTS, _ROUNDS, shrink))
    made = _settled(problem, found.scales, found.zeros)
    if given.scales.steps is None or made.scales.steps is None:
        return _better(problem, given, made)
    # under a step of its own a row would not have the very scales of rounding to nearest
    worse = ~(problem.errors(made) <= problem.errors(given)).all(axis=1)
    old, own = given.scales.steps, made.scales.steps
    old, own = (native.to_array(native.cast(steps, "float32")) for steps in (old, own))
    taken = np.where(worse, old, own)
    made = _settled(problem, found.scales, found.zeros, taken)
    return _better(problem, given, made, taken)


def _settled(
    problem: Problem, scales: np.ndarray, zeros: np.ndarray | None, steps: np.ndarray | None = None
) -> Stored:
    """Scales as stored, and the zero points that suit these, as stored."""
    stored = problem.store(scales, zeros, steps)
    if zeros is None:
        return stored
    again = problem.fit(stored.scales.restored, stored.zeros, problem.find(native.ZERO, 0, _ROUNDS))
    return problem.store(scales, again.zeros, steps)


def _better(
    problem: Problem, given: Stored, made: Stored, steps: np.ndarray | None = None
) -> Stored:
    """Of each group the pair with the smaller error."""
    take = problem.errors(made) < problem.errors(given)
    scales = np.where(take, made.scales.restored, given.scales.restored)
    zeros = None
    if given.zeros is not None and made.zeros is not None:
        zeros = np.where(take, made.zeros, given.zeros)
    return problem.store(scales, zeros, steps)
