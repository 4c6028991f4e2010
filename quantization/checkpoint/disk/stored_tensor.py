"""A tensor that a file holds: shape and dtype are known, numbers are read when asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from quantization.ops.dtypes import name_of

__all__ = ["StoredTensor", "key_of", "nbytes_of"]


def key_of(name: str, part: str) -> str:
    """The key in a state dict of a tensor of the module of that dotted name.

    Example:
        >>> key_of("a.b", "scales"), key_of("", "scales")
        ('a.b.scales', 'scales')
    """
    return f"{name}.{part}" if name else part


def nbytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of that dtype, by torch's name, and shape.

    Example:
        >>> nbytes_of("bfloat16", (2, 3))
        12
    """
    return math.prod(shape) * getattr(torch, dtype).itemsize


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is not part of a packed weight.

    Attributes:
        shape: its shape.
        dtype: its dtype, by torch's name without ``torch.``.
        load: reads it; the tensor may be a view of a file.
        rows: reads rows ``[start, stop)`` of its first dimension and no others; None where that
            cannot be.
    """

    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], torch.Tensor]
    rows: Callable[[int, int], torch.Tensor] | None = None

    @classmethod
    def of(cls, tensor: torch.Tensor) -> StoredTensor:
        """A tensor that is there already.

        Example:
            >>> StoredTensor.of(torch.ones(2, 3)).shape
            (2, 3)
        """
        return cls(tuple(tensor.shape), name_of(tensor.dtype), lambda: tensor)
