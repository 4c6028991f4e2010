"""GPTQ and coordinate descent: codes of columns that make up for each other's errors."""

from __future__ import annotations

from quantization.methods.hessians import CoupledProblem
from quantization.methods.lsq import fit_scales
from quantization.methods.statistics import Statistics
from quantization.ops.native import Tensor
from quantization.schemes.packed_weights import PackedWeights
from quantization.schemes.scheme import Scheme

__all__ = ["descent", "gptq"]


def gptq(
    weight: Tensor,
    scheme: Scheme,
    statistics: Statistics | None = None,
    *,
    damping: float = 0.01,
) -> PackedWeights:
    """GPTQ: round one column after the other, and let those that come after make up for its error.

    Scales and zero points are those of ``lsq``, fixed before (static groups). Columns are taken in
    the order of their mean square, the largest first (act-order); their storage keeps its order.
    After column k, ``w_j -= e_k U_kj / U_kk`` for all j after it, with ``H^-1 = U^T U``.

    Args:
        weight: ``[out, in]``, finite.
        scheme: any.
        statistics: of the inputs, with their Hessian.
        damping: added to the diagonal of H, in units of its mean. Factorisations are float64.

    Returns:
        The packed matrix, after ``out in^2 / 2`` multiply-adds beside the factorisation, ``in^3``.

    Raises:
        ValueError: without a Hessian.

    It fails where the Hessian is of inputs that the model never sees: random token ids make a
    decoder worse than ``lsq`` does.

    Source: E. Frantar et al., "GPTQ" (2023), with the order of its act-order.

    Example:
        >>> import torch
        >>> x = torch.randn(200, 64) @ torch.randn(64, 64)
        >>> made = gptq(torch.randn(8, 64), Scheme.parse("w3g32a"), Statistics.of(x, hessian=True))
        >>> made.shape
        (8, 64)
    """
    problem = CoupledProblem(weight, scheme, statistics, damping, "gptq")
    stored = fit_scales(problem)
    return problem.pack_values(stored, problem.round_in_order(stored))


def descent(
    weight: Tensor,
    scheme: Scheme,
    statistics: Statistics | None = None,
    *,
    damping: float = 0.1,
    sweeps: int = 4,
) -> PackedWeights:
    """Coordinate descent on ``d H d^T``, from GPTQ's codes, with scales and zeros refitted.

    Each sweep first moves scale and zero point of each group to the least loss for its codes, a
    2 x 2 system in the full Hessian, rounded as they are stored and taken only if the loss falls;
    then gives each code in turn the level of least loss beside all others. The loss never grows.
    Ends when a sweep changes nothing. One scale for the whole matrix, and those of ``mxfp4``, stay.

    Args:
        weight: ``[out, in]``, finite.
        scheme: any.
        statistics: of the inputs, with their Hessian.
        damping: as for :func:`gptq`; more than there, as every code is fitted to H again.
        sweeps: at most.

    Returns:
        The packed matrix, after ``out in^2`` multiply-adds a sweep for scales and as many as codes
        change, beside those of :func:`gptq`.

    Raises:
        ValueError: without a Hessian.

    It fails as :func:`gptq` does, and where moments are of few tokens: then raise ``damping``.

    Source: coordinate descent as in QuantEase, K. Behdin et al. (2023), on a grid that moves too.

    Example:
        >>> import torch
        >>> x = torch.randn(200, 64) @ torch.randn(64, 64)
        >>> known, weight = Statistics.of(x, hessian=True), torch.randn(8, 64)
        >>> loss = lambda made: ((made.dequantize() - weight) @ x.T).norm()
        >>> scheme = Scheme.parse("w3g32af+dq")
        >>> bool(loss(descent(weight, scheme, known)) < loss(gptq(weight, scheme, known)))
        True
    """
    problem = CoupledProblem(weight, scheme, statistics, damping, "descent")
    stored = fit_scales(problem)
    values = problem.round_in_order(stored)
    return problem.pack_values(*problem.descend(stored, values, sweeps))
