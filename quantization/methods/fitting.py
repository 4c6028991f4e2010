"""What methods stand on: weights opened for a scheme, errors of stored scales, nearest codes."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from quantization.methods.statistics import Statistics
from quantization.numerics.parameters import Mode
from quantization.ops import native
from quantization.ops.dtypes import SOURCES
from quantization.ops.native import Fit, Fitted, Tensor
from quantization.schemes.grids import Coded, Matrix, encode_matrix, integer_codes, level_codes
from quantization.schemes.packed_weights import PackedWeights, open_matrix, packed_of_codes
from quantization.schemes.scheme import Scheme
from quantization.schemes.stored_scales import (
    StoredScales,
    as_exponents_of,
    as_floats,
    restore_zeros,
    under_steps,
)

__all__ = ["Problem", "Stored"]

_ROOM = 40  # binary exponents around 1 within which float32 sums of squares are safe


class Stored(NamedTuple):
    """Scales and zero points as a packed matrix stores them, and the numbers these stand for."""

    scales: StoredScales
    zero_points: Tensor | None = None
    zeros: np.ndarray | None = None  # float32 [lines, groups]


class Problem:
    """Finite weights under a scheme, to be fitted: lines of groups that share a scale.

    A line is a row of the matrix, or all of it where it has one scale.

    Args:
        weight: ``[out, in]``, as :func:`quantization.pack_matrix` takes it.
        scheme: how it is to be stored.
        statistics: of the layer's inputs; None: all columns count the same.

    Attributes:
        matrix: the weights and their scheme.
        x: the same as float32 ``[lines, columns]``, brought near 1 by a power of two a line.
        importance: float32 ``[columns]``, of mean 1: how much a column's squared error counts.
        group: columns of a line that share a scale.
        rtn: what rounding to nearest gives.

    Raises:
        TypeError, ValueError: as :func:`quantization.pack_matrix` raises them.
    """

    def __init__(self, weight: Tensor, scheme: Scheme, statistics: Statistics | None) -> None:
        moments = None if statistics is None else statistics.moments
        self.matrix = open_matrix(weight, scheme, moments)
        self.scheme = scheme
        self.rtn = encode_matrix(self.matrix if _weighs(scheme) else _unweighed(self.matrix))
        x, weights = self.matrix.x, self.matrix.importance
        if weights is None or not weights.any():
            weights = np.ones(x.shape[1])
        if self.matrix.is_one_block:
            weights, x = np.tile(weights, x.shape[0]), x.reshape(1, -1)
        self.importance = (weights / weights.mean()).astype("float32")
        self.group = x.shape[1] if self.matrix.is_one_block else self.matrix.group
        exponents = np.frexp(np.abs(x).max(axis=1, keepdims=True, initial=0))[1]
        self._exponents = np.where(np.abs(exponents) > _ROOM, exponents, 0)
        self.x = np.ldexp(x, -self._exponents) if self._exponents.any() else x
        self.codebook: np.ndarray | None = None
        if self.rtn.codebook is not None:
            self.codebook = native.to_array(native.cast(self.rtn.codebook, "float32"))

    # ---- what the scheme allows ----------------------------------------------------------

    @property
    def table(self) -> np.ndarray | None:
        """The levels of the codebook, ascending in each row; None where codes are numbers."""
        return None if self.codebook is None else np.sort(self.codebook, axis=1)

    @property
    def codes(self) -> tuple[float, float]:
        """The smallest and the largest code, or level."""
        if self.codebook is not None:
            return float(self.codebook.min()), float(self.codebook.max())
        bits = self.scheme.bits
        if self.scheme.grid == "ternary":
            return -1.0, 1.0
        if self.scheme.mode is Mode.Asymmetric:
            return 0.0, 2.0**bits - 1
        most = 2.0 ** (bits - 1) - 1
        return (-most if bits == 8 else -most - 1), most

    def find(self, what: int, starts: int = 0, rounds: int = 0, shrink: float = 0.0) -> Fit:
        """What :func:`quantization.ops.native.fit_groups` is to look for under this scheme.

        Scales are above 0, but those of symmetric codes kept as floats, which may have a sign, so
        that the longer half of the codes meets the larger magnitude.
        """
        scheme, levels = self.scheme, self.codebook
        is_signed = scheme.mode is Mode.Symmetric and levels is None and not scheme.double_quant
        fit = Fit(what, self.codes, starts, rounds, shrink)
        if levels is not None:
            fit = fit._replace(levels=self.table)
        if is_signed:
            fit = fit._replace(least_scale=-np.inf)
        if scheme.zero_point == "fixed" or scheme.has_integer_zeros:
            step = 1.0 if scheme.has_integer_zeros else 2.0 ** (scheme.bits - 8)
            most = self.codes[1] if scheme.has_integer_zeros else 2.0**scheme.bits - step
            fit = fit._replace(zeros=(0.0, most), zero_step=step)
        return fit

    # ---- stored numbers ------------------------------------------------------------------

    def stored_rtn(self) -> Stored:
        """The scales and zero points of rounding to nearest."""
        zeros = self.rtn.zero_points
        if zeros is None:
            return Stored(self.rtn.scales)
        return Stored(self.rtn.scales, zeros, restore_zeros(zeros, self.scheme.bits))

    def store(
        self, scales: np.ndarray, zeros: np.ndarray | None = None, steps: np.ndarray | None = None
    ) -> Stored:
        """Scales and zeros as the scheme stores them, scales clipped at the largest of their type.

        Under double quantization rows have the steps given, or those of their largest scale.
        """
        like, scheme = self.matrix.weight, self.scheme
        if scheme.grid == "mxfp4":
            kept = as_exponents_of(scales, like)
        elif steps is not None:
            kept = under_steps(scales, steps, like, scheme.steps_dtype)
        elif scheme.double_quant:
            kept = self.matrix.store(scales)
        else:
            dtype = scheme.scale_dtype or self.matrix.source.name
            largest = min(SOURCES[dtype].max, SOURCES["float32"].max)
            kept = as_floats(np.clip(scales, -largest, largest), dtype, like)
        if zeros is None:
            return Stored(kept)
        return Stored(kept, *self.matrix.store_zeros(zeros))

    def near(self, scales: np.ndarray) -> np.ndarray:
        """Scales ``[lines, n]`` as they are beside :attr:`x`, float32."""
        near: np.ndarray = np.ldexp(np.ascontiguousarray(scales, "float32"), -self._exponents)
        return near

    def far(self, scales: np.ndarray) -> np.ndarray:
        """The reverse of :meth:`near`."""
        far: np.ndarray = np.ldexp(scales, self._exponents)
        return far

    @property
    def near_rows(self) -> np.ndarray:
        """The weights of :attr:`x` in the shape of the matrix."""
        return self.x.reshape(self.matrix.x.shape)

    def fit(self, scales: np.ndarray, zeros: np.ndarray | None, fit: Fit) -> Fitted:
        """:func:`quantization.ops.native.fit_groups`, from these scales on."""
        zeros = None if zeros is None else np.ascontiguousarray(zeros, "float32")
        made = native.fit_groups(self.x, self.importance, self.group, self.near(scales), zeros, fit)
        return made._replace(scales=self.far(made.scales))

    def errors(self, stored: Stored) -> np.ndarray:
        """Weighted squared errors of the nearest codes, float32 ``[lines, groups]``."""
        return self.fit(stored.scales.restored, stored.zeros, self.find(native.NOTHING)).errors

    # ---- packed --------------------------------------------------------------------------

    def pack(self, stored: Stored, codes: Tensor | None = None) -> PackedWeights:
        """The matrix under stored scales; codes uint8 or int8 ``[out, in]``, None: the nearest."""
        if codes is None and self.codebook is not None:
            codes = level_codes(self.matrix, stored.scales.restored, self.codebook)
        elif codes is None:
            codes = integer_codes(self.matrix, stored.scales.restored, stored.zeros)
        coded = Coded(codes, stored.scales, stored.zero_points, self.rtn.codebook)
        return packed_of_codes(coded, self.matrix)

    def pack_rtn(self) -> PackedWeights:
        """The matrix rounded to nearest."""
        return packed_of_codes(self.rtn, self.matrix)


def _weighs(scheme: Scheme) -> bool:
    return scheme.grid in ("kmeans", "binary", "ternary")


def _unweighed(matrix: Matrix) -> Matrix:
    return dataclasses.replace(matrix, importance=None)
