"""What turns codes back into numbers: the mode, and the parameters that go with quantized codes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

from quantization.numerics.granularity import Granularity, PerDimension, PerGroup
from quantization.ops import native
from quantization.ops.native import Tensor

__all__ = ["Mode", "QuantizationParameters"]


class Mode(Enum):
    """Where zero lies among the codes.

    Attributes:
        Symmetric: zero is code 0, ``x = code * scale``.
        Asymmetric: zero is the integer code ``zero_point``, ``x = (code - zero_point) * scale``, so
            a range that leans to one side uses all codes, and zero stays exact.

    Source: B. Jacob et al., "Quantization and training of neural networks for efficient
    integer-arithmetic-only inference" (2018), section 2.1.

    Example:
        >>> Mode.Symmetric
        Mode.Symmetric
    """

    Symmetric = "symmetric"
    Asymmetric = "asymmetric"

    def __repr__(self) -> str:
        return f"Mode.{self.name}"


@dataclass(frozen=True, eq=False, repr=False)
class QuantizationParameters:
    """All that :func:`~quantization.dequantize_linear` needs beside the codes.

    Two of them are equal if all fields are; tensors are compared by value, and a torch tensor
    differs from an ndarray. They cannot be hashed, because tensors change.

    Attributes:
        scale: one number a block, in the shape that ``granularity.scale_shape`` gives; a NumPy
            scalar, which arithmetic makes of an ndarray of shape ``()``, becomes one again.
        zero_point: int32, the shape of ``scale``; zeros when symmetric.
        mode: where zero lies.
        granularity: which numbers share a scale.
        group_by: numbers in a group; None without groups. Read off ``granularity``.
        dim: the dimension of ``granularity``; None per tensor. Read off ``granularity``.
        dtype: type of the numbers that were quantized, and will be once more; None: that of
            ``scale``.

    Raises:
        TypeError: if ``mode`` is no Mode or ``granularity`` no Granularity.
        ValueError: if ``group_by`` or ``dim`` contradicts ``granularity``.

    Example:
        >>> import numpy as np
        >>> scale, zero_point = np.full((4, 1), 0.5, "float32"), np.zeros((4, 1), "int32")
        >>> params = QuantizationParameters(
        ...     scale, zero_point, Mode.Symmetric, Granularity.PerDimension(dim=1)
        ... )
        >>> params.dim
        1
        >>> params  # doctest: +NORMALIZE_WHITESPACE
        QuantizationParameters(Mode.Symmetric, Granularity.PerDimension(dim=1),
                               scale=float32[4, 1] 0.5, zero_point=int32[4, 1] 0, dtype=None)
    """

    scale: Tensor
    zero_point: Tensor
    mode: Mode
    granularity: Granularity
    group_by: int | None = None
    dim: int | None = None
    dtype: Any = None

    __hash__ = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        check_mode(self.mode)
        check_granularity(self.granularity)
        group_by = self.granularity.by if isinstance(self.granularity, PerGroup) else None
        grouped = isinstance(self.granularity, PerDimension | PerGroup)
        for field in ("scale", "zero_point"):
            if isinstance(getattr(self, field), np.generic):
                object.__setattr__(self, field, np.asarray(getattr(self, field)))
        self._settle("group_by", group_by)
        self._settle("dim", self.granularity.dim if grouped else None)

    def _settle(self, field: str, value: int | None) -> None:
        given = getattr(self, field)
        if given is not None and given != value:
            raise ValueError(
                f"{field}={given} contradicts {self.granularity}, which has {field}={value}: "
                f"leave {field} out"
            )
        object.__setattr__(self, field, value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantizationParameters):
            return NotImplemented
        return (
            (self.mode, self.granularity, self.dtype)
            == (other.mode, other.granularity, other.dtype)
            and _same(self.scale, other.scale)
            and _same(self.zero_point, other.zero_point)
        )

    def __repr__(self) -> str:
        return (
            f"QuantizationParameters({self.mode}, {self.granularity}, scale={_brief(self.scale)}, "
            f"zero_point={_brief(self.zero_point)}, dtype={self.dtype})"
        )


def check_mode(mode: Any) -> None:
    """Raise TypeError unless ``mode`` is a Mode."""
    if not isinstance(mode, Mode):
        raise TypeError(f"mode must be Mode.Symmetric or Mode.Asymmetric, not {mode!r}")


def check_granularity(granularity: Any) -> None:
    """Raise TypeError unless ``granularity`` is a Granularity."""
    if not isinstance(granularity, Granularity):
        raise TypeError(
            "granularity must be Granularity.PerTensor, Granularity.PerDimension(dim) or "
            f"Granularity.PerGroup(by, dim), not {granularity!r}"
        )


def _same(left: Any, right: Any) -> bool:
    """Equal in kind, type, shape and numbers (NaN, which marks a block, equals NaN)."""
    if not (native.is_tensor(left) and native.is_tensor(right)):
        return type(left) is type(right) and bool(left == right)
    if native.is_torch(left) != native.is_torch(right):
        return False
    if left.dtype != right.dtype or tuple(left.shape) != tuple(right.shape):
        return False
    if native.is_meta(left) or native.is_meta(right):
        return native.is_meta(left) and native.is_meta(right)
    one, other = native.to_array(left), native.to_array(right)
    return np.array_equal(one, other, equal_nan=one.dtype.kind == "f")


def _brief(tensor: Any) -> str:
    """Type, shape and range of a tensor: ``float32[4, 1] 0.25..0.5``."""
    if not native.is_tensor(tensor):
        return repr(tensor)
    head = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
    if native.is_meta(tensor):
        return f"{head} meta"
    numbers = native.to_array(native.cast(tensor, "float64"))
    marked = np.isnan(numbers)
    tail = f" ({marked.sum()} NaN)" if marked.any() else ""
    if marked.all():  # also where there are none
        return head + tail
    low, high = numbers[~marked].min(), numbers[~marked].max()
    return f"{head} {low:g}{tail}" if low == high else f"{head} {low:g}..{high:g}{tail}"
