"""What quantizing a weight is expected to lose, and what is odd in it, found without doing it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from quantization.methods.registry import rtn
from quantization.schemes.layer_weights import pack_as
from quantization.schemes.scheme import Scheme

__all__ = ["ROWS", "Expected", "expected", "sqnr"]

#: Rows of a weight that are quantized to see what is lost.
ROWS = 16
_FAR = 6.0  # standard deviations


@dataclass(frozen=True)
class Expected:
    """What was found.

    Attributes:
        sqnr: of the sampled rows rounded to nearest, in decibels; None where that says nothing.
        outliers: numbers that are further than six standard deviations from 0.
        nonfinite: NaN and infinite ones.
    """

    sqnr: float | None = None
    outliers: int | None = None
    nonfinite: int | None = None


def expected(rows: torch.Tensor, scheme: Scheme, whole: torch.Tensor | None = None) -> Expected:
    """What is to be expected of a matrix.

    Args:
        rows: some of its rows, float ``[rows, in]``.
        scheme: what it is to become.
        whole: all of it, to be searched for odd numbers; None: ``rows`` are.

    Example:
        >>> found = expected(torch.tensor([[7.0, 0.4]]), Scheme(bits=4))
        >>> round(found.sqnr, 1), found.outliers, found.nonfinite
        (21.1, 0, 0)
    """
    searched = rows if whole is None else whole
    if searched.is_meta or not searched.numel():
        return Expected()
    outliers, nonfinite = _odd(searched)
    if not bool(rows.isfinite().all()):
        return Expected(None, outliers, nonfinite)
    packed = pack_as(rows, scheme, rows.dtype, pack=_rounded)
    return Expected(sqnr(rows, packed.dequantize()), outliers, nonfinite)


def _rounded(weight: Any, scheme: Scheme, **options: Any) -> Any:
    return rtn(weight, scheme)


def _odd(matrix: torch.Tensor) -> tuple[int, int]:
    """Numbers that are far from 0, and such as are no numbers."""
    low, high = (float(bound) for bound in torch.aminmax(matrix))
    nonfinite = 0
    if not math.isfinite(low + high):
        nonfinite = int(matrix.numel() - matrix.isfinite().sum())
        matrix = matrix[matrix.isfinite()]
        if not matrix.numel():
            return 0, nonfinite
        low, high = (float(bound) for bound in torch.aminmax(matrix))
    far = (
        _FAR * float(torch.linalg.vector_norm(matrix, dtype=torch.float32)) / matrix.numel() ** 0.5
    )
    above = torch.count_nonzero(matrix > far) if high > far else 0
    below = torch.count_nonzero(matrix < -far) if -low > far else 0
    return int(above + below), nonfinite


def sqnr(float_numbers: torch.Tensor, decoded: torch.Tensor) -> float | None:
    """Signal to quantization noise in decibels; infinite without noise, None without signal.

    Example:
        >>> sqnr(torch.tensor([10.0]), torch.tensor([9.0]))
        20.0
    """
    signal = float(float_numbers.double().square().sum())
    noise = float((float_numbers.double() - decoded.double()).square().sum())
    if not signal or math.isnan(signal + noise):
        return None
    return 10 * math.log10(signal / noise) if noise else math.inf
