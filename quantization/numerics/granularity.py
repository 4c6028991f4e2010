"""Granularity: which numbers of a tensor share one scale and one zero point.

A granularity is data, not code: it says how a tensor of some shape is seen as a matrix and what one
block of that matrix is. One kernel then serves them all.

============================  ==================  =========================  ====================
granularity                   tensor              block of the matrix        shape of the scales
============================  ==================  =========================  ====================
``PerTensor``                 any                 the whole matrix           ``()``
``PerDimension(dim=1)``       ``[R, C]``          a row, ``(1, C)``          ``[R, 1]``
``PerDimension(dim=0)``       ``[R, C]``          a column, ``(R, 1)``       ``[1, C]``
``PerDimension(dim)``         N-D                 a line along ``dim``       ``shape``, ``dim`` = 1
``PerGroup(by, dim=1)``       ``[R, C]``          ``(1, by)``                ``[R, ceil(C/by)]``
``PerGroup(by, dim=0)``       ``[R, C]``          ``(by, 1)``                ``[ceil(R/by), C]``
============================  ==================  =========================  ====================
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from quantization.ops.dtypes import index_of
from quantization.ops.native import Grid

__all__ = ["PER_COLUMNS", "PER_ROWS", "Granularity", "PerDimension", "PerGroup"]

#: Dimensions to reduce over in a matrix: one scale a row, one scale a column.
PER_ROWS, PER_COLUMNS = 1, 0

Shape = Sequence[int]


class Granularity(ABC):
    """Which numbers share one scale: an immutable, hashable value that works in ``match``.

    ``Granularity.PerTensor`` is a value, ``Granularity.PerDimension(dim)`` and
    ``Granularity.PerGroup(by, dim)`` are made by a call.

    Source: per tensor and per channel, R. Krishnamoorthi, "Quantizing deep convolutional networks
    for efficient inference" (2018); groups, S. Shen et al., "Q-BERT" (2020).

    Example:
        >>> def describe(granularity):
        ...     match granularity:
        ...         case Granularity.PerTensor:
        ...             return "one scale"
        ...         case Granularity.PerDimension(dim):
        ...             return f"one scale for each line along dimension {dim}"
        ...         case Granularity.PerGroup(by, dim):
        ...             return f"one scale for {by} numbers along dimension {dim}"
        >>> describe(Granularity.PerTensor)
        'one scale'
        >>> describe(Granularity.PerDimension(0))
        'one scale for each line along dimension 0'
        >>> Granularity.PerGroup(32, dim=1).scale_shape((8, 100))
        (8, 4)
    """

    __slots__ = ()

    PerTensor: ClassVar[Granularity]
    PerDimension: ClassVar[type[PerDimension]]
    PerGroup: ClassVar[type[PerGroup]]

    @abstractmethod
    def grid(self, shape: Shape) -> Grid:
        """A tensor of that shape as a matrix cut into blocks; its numbers keep their C order.

        Raises:
            ValueError: if the tensor lacks the dimension, or has another number of them than this
                granularity takes.
        """

    @abstractmethod
    def scale_shape(self, shape: Shape) -> tuple[int, ...]:
        """Shape of the scales and zero points; it holds as many numbers as the grid has blocks.

        Raises:
            ValueError: as :meth:`grid`.
        """


class _PerTensor(Granularity):
    """One scale for all numbers."""

    __slots__ = ()

    def grid(self, shape: Shape) -> Grid:
        rows, cols = math.prod(shape[:-1]), shape[-1] if shape else 1
        return Grid(rows, cols, max(rows, 1), max(cols, 1))

    def scale_shape(self, shape: Shape) -> tuple[int, ...]:
        return ()

    def __repr__(self) -> str:
        return "Granularity.PerTensor"

    def __reduce__(self) -> str:  # copies and pickles are this one value
        return "Granularity.PerTensor"


@dataclass(frozen=True, slots=True)
class PerDimension(Granularity):
    """One scale for each line along ``dim``: the scale is reduced over that dimension.

    Attributes:
        dim: ``PER_ROWS`` (1, the default) gives one scale a row of a matrix, ``PER_COLUMNS`` (0)
            one a column. A tensor of any number of dimensions will do; negative ``dim`` counts
            from the end.

    Example:
        >>> Granularity.PerDimension().scale_shape((8, 100))
        (8, 1)
        >>> Granularity.PerDimension(-2).scale_shape((3, 5, 7))
        (3, 1, 7)
    """

    dim: int = PER_ROWS

    def __post_init__(self) -> None:
        object.__setattr__(self, "dim", index_of(self.dim, "dim"))

    def grid(self, shape: Shape) -> Grid:
        """Lines along ``dim`` are rows where it is the last dimension, columns where it is not."""
        dim = _checked_dim(self, shape)
        length, outer, inner = shape[dim], math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
        if inner == 1:
            return Grid(outer, length, 1, max(length, 1))
        return Grid(outer * length, inner, max(length, 1), 1)

    def scale_shape(self, shape: Shape) -> tuple[int, ...]:
        """``shape`` with 1 in the place of ``dim``."""
        dim = _checked_dim(self, shape)
        return (*shape[:dim], 1, *shape[dim + 1 :])

    def __repr__(self) -> str:
        return f"Granularity.PerDimension(dim={self.dim})"


@dataclass(frozen=True, slots=True)
class PerGroup(Granularity):
    """One scale for each run of ``by`` numbers along ``dim`` of a matrix.

    Attributes:
        by: numbers in a group, at least 1; a last group that the dimension does not fill is
            smaller, and a ``by`` beyond the dimension gives one group a line.
        dim: 1 (the default) for groups along a row, 0 for groups along a column.

    Example:
        >>> Granularity.PerGroup(32, dim=0).scale_shape((100, 8))
        (4, 8)
    """

    by: int
    dim: int = PER_ROWS

    def __post_init__(self) -> None:
        object.__setattr__(self, "by", index_of(self.by, "by"))
        object.__setattr__(self, "dim", index_of(self.dim, "dim"))
        if self.by < 1:
            raise ValueError(f"PerGroup: by={self.by}, but a group has at least 1 number")

    def grid(self, shape: Shape) -> Grid:
        """The matrix itself, in blocks of ``(1, by)`` or ``(by, 1)``."""
        if len(shape) != 2:
            raise ValueError(
                f"{self} cuts a 2-D tensor, but this one has shape {tuple(shape)}: reshape it "
                f"first, e.g. to (-1, last dimension), or use Granularity.PerDimension"
            )
        rows, cols = shape
        if _checked_dim(self, shape) == PER_ROWS:
            return Grid(rows, cols, 1, max(min(self.by, cols), 1))
        return Grid(rows, cols, max(min(self.by, rows), 1), 1)

    def scale_shape(self, shape: Shape) -> tuple[int, ...]:
        """``(R, ceil(C / by))`` or ``(ceil(R / by), C)``."""
        return self.grid(shape).blocks

    def __repr__(self) -> str:
        return f"Granularity.PerGroup(by={self.by}, dim={self.dim})"


def _checked_dim(granularity: PerDimension | PerGroup, shape: Shape) -> int:
    dim, ndim = granularity.dim, len(shape)
    if not -ndim <= dim < ndim:
        allowed = f"dim must be {-ndim}..{ndim - 1}" if ndim else "use Granularity.PerTensor"
        raise ValueError(f"{granularity} does not fit a tensor of shape {tuple(shape)}: {allowed}")
    return dim % ndim


Granularity.PerTensor = _PerTensor()
Granularity.PerDimension = PerDimension
Granularity.PerGroup = PerGroup
