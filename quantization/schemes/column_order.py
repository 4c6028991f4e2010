"""What belongs to the columns of a packed matrix: their order, multipliers, and importance.

GPTQ's act-order leaves columns in an order of their own; SINQ and AWQ divide a column by a number
before it is rounded, and multiply that input by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from quantization.ops import native
from quantization.ops.dtypes import SOURCES
from quantization.ops.native import Tensor

__all__ = [
    "COLUMN_PARTS",
    "check_columns",
    "check_order",
    "checked_importance",
    "column_parts",
    "same_order",
    "times_columns",
]

#: Parts of a packed matrix that have one number a column; each is a field of a scheme, too.
COLUMN_PARTS = ("input_order", "input_scale")


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


def column_parts(weight: Tensor, scheme: Any, dtype: str) -> dict[str, Any]:
    """Parts of a packed matrix whose columns are as they are: same order, multipliers of 1.

    Args:
        weight: ``[out, in]``; the parts are of its kind and on its device.
        scheme: a :class:`quantization.Scheme`; what it has no use for is None.
        dtype: of the packed matrix.

    Example:
        >>> from quantization.schemes.scheme import Scheme
        >>> column_parts(np.zeros((2, 3)), Scheme.parse("w4+cols"), "float32")
        {'input_order': None, 'input_scale': array([1., 1., 1.], dtype=float32)}
    """
    ones = native.filled(weight.shape[1:], 1, dtype, weight) if scheme.input_scale else None
    return {"input_order": same_order(weight, scheme), "input_scale": ones}


def times_columns(stored: Any, multipliers: Any, dtype: str) -> Any:
    """Float32 numbers ``[out, in]`` times one multiplier a column, rounded once to ``dtype``.

    A number beyond the largest of ``dtype`` becomes that one; None multiplies nothing.
    """
    if multipliers is not None:
        largest = min(SOURCES[dtype].max, SOURCES["float32"].max)
        with np.errstate(over="ignore"):
            stored = (stored * native.cast(multipliers, "float32")).clip(-largest, largest)
    return native.cast(stored, dtype)


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


def check_columns(parts: Mapping[str, Any], prefix: str = "") -> None:
    """Raise ValueError unless an order and multipliers, where there are any, are such.

    Args:
        parts: tensors by name, after ``prefix``; those that are not of columns are not looked at.
        prefix: what their names begin with.

    Example:
        >>> check_columns({"input_scale": np.array([1.0, np.nan])})
        Traceback (most recent call last):
        ...
        ValueError: input_scale must be finite, and column 1 has nan
    """
    order, multipliers = (parts.get(prefix + name) for name in COLUMN_PARTS)
    if order is not None:
        check_order(order, prefix + "input_order")
    if multipliers is None or native.is_meta(multipliers):
        return
    numbers = native.to_array(native.cast(multipliers, "float64"), prefix + "input_scale")
    wrong = np.flatnonzero(~np.isfinite(numbers))
    if len(wrong):
        raise ValueError(
            f"{prefix}input_scale must be finite, and column {wrong[0]} has {numbers[wrong[0]]}"
        )


def checked_importance(importance: Any, cols: int) -> np.ndarray | None:
    """Importance as float64 ``[cols]``.

    Raises:
        TypeError: if it is no tensor.
        ValueError: if it has another shape, or is negative, NaN or infinite.

    Example:
        >>> checked_importance(np.array([1, 4]), 2)
        array([1., 4.])
    """
    if importance is None:
        return None
    if not native.is_tensor(importance):
        raise TypeError(
            f"importance must be a torch.Tensor or ndarray, not {type(importance).__name__}"
        )
    weights = native.to_array(native.cast(importance, "float64"), "importance")
    if weights.shape != (cols,):
        raise ValueError(f"importance has shape {weights.shape}; one a column is ({cols},)")
    if not (np.isfinite(weights) & (weights >= 0)).all():
        raise ValueError("importance must be finite and not negative")
    return weights
