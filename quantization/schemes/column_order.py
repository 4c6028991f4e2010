"""Columns of a packed matrix in an order of their own, as GPTQ's act-order leaves them."""

from __future__ import annotations

from typing import Any

import numpy as np

from quantization.ops import native
from quantization.ops.native import Tensor

__all__ = ["check_order", "same_order"]


def same_order(weight: Tensor, scheme: Any) -> Any:
    """The columns as they are, int32 ``[in]``, where a scheme has an order; else None.

    Args:
        weight: ``[out, in]``; the order is of its kind and on its device.
        scheme: a :class:`quantization.Scheme`.

    Example:
        >>> from quantization.schemes.scheme import Scheme
        >>> same_order(np.zeros((2, 3)), Scheme.parse("w4g2+order"))
        array([0, 1, 2], dtype=int32)
    """
    if not scheme.input_order:
        return None
    order = np.arange(weight.shape[1], dtype="int32")
    if native.is_meta(weight):
        return native.filled(order.shape, 0, "int32", weight)
    return native.as_tensor_like(order, "int32", weight)


def check_order(order: Any, name: str = "input_order") -> None:
    """Raise ValueError unless integers are 0, 1, 2, ..., in whatever order; meta tensors pass.

    Example:
        >>> check_order(np.array([2, 0, 0]))
        Traceback (most recent call last):
        ...
        ValueError: input_order must have each of the columns 0..2 once
    """
    if native.is_meta(order):
        return
    numbers = native.to_array(order, name)
    if not np.array_equal(np.sort(numbers), np.arange(len(numbers))):
        raise ValueError(f"{name} must have each of the columns 0..{len(numbers) - 1} once")
