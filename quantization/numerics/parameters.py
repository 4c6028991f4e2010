"""What turns codes back into numbers: the mode, and the parameters that go with quantized codes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Self

import numpy as np

from quantization.numerics.granularity import Granularity, PerDimension, PerGroup
from quantization.ops import native

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


@dataclass(eq=False, repr=False)
class QuantizationParameters:
    """All that :func:`~quantization.dequantize_linear` needs beside the codes.

    An ordinary dataclass: fields can be set, to anything, and what they hold is looked at when they
    are used. Two of them are equal if all fields are; tensors are compared by value, and a torch
    tensor differs from an ndarray. They cannot be hashed, because they change.

    Attributes:
        scale: one number a block, in the shape that ``granularity.scale_shape`` gives; a NumPy
            scalar, which arithmetic makes of an ndarray of shape ``()``, becomes one again. None:
            not known yet.
        zero_point: int32, the shape of ``scale``; zeros, or None, when symmetric.
        mode: where zero lies.
        granularity: which numbers share a scale.
        group_by: numbers in a group; None without groups. It follows ``granularity``.
        dim: the dimension of ``granularity``; None per tensor. It follows ``granularity``.
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
        >>> params.scale = scale / 2
        >>> params  # doctest: +NORMALIZE_WHITESPACE
        QuantizationParameters(Mode.Symmetric, Granularity.PerDimension(dim=1),
                               scale=float32[4, 1] 0.25, zero_point=int32[4, 1] 0, dtype=None)
    """

    scale: Any = None  # a tensor of either kind
    zero_point: Any = None
    mode: Mode = Mode.Symmetric
    granularity: Granularity = Granularity.PerTensor
    group_by: int | None = None
    dim: int | None = None
    dtype: Any = None

    __hash__ = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        given = {"group_by": self.group_by, "dim": self.dim}
        self.granularity = self.granularity  # which group_by and dim follow
        for field, value in given.items():
            if value is not None:
                setattr(self, field, value)
        check_parameters(self)

    @classmethod
    def of_checked(
        cls, scale: Any, zero_point: Any, mode: Mode, granularity: Granularity, dtype: Any
    ) -> Self:
        """Parameters of what was looked at already: the short way, at each call of a quantizer."""
        made = cls.__new__(cls)
        made.__dict__.update(
            scale=scale, zero_point=zero_point, mode=mode, granularity=granularity, dtype=dtype
        )
        made.__dict__.update(_read_off(granularity))
        return made

    def __setattr__(self, field: str, value: Any) -> None:
        if field in ("scale", "zero_point") and isinstance(value, np.generic):
            value = np.asarray(value)
        object.__setattr__(self, field, value)
        if field == "granularity":
            self.__dict__.update(_read_off(value))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantizationParameters):
            return NotImplemented
        return (
            (self.mode, self.granularity, self.group_by, self.dim, self.dtype)
            == (other.mode, other.granularity, other.group_by, other.dim, other.dtype)
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


def check_parameters(params: QuantizationParameters) -> None:
    """Raise unless mode and granularity are such, and group_by and dim those of the granularity."""
    check_mode(params.mode)
    check_granularity(params.granularity)
    for field, value in _read_off(params.granularity).items():
        given = getattr(params, field)
        if given != value:
            raise ValueError(
                f"{field}={given} contradicts {params.granularity}, which has {field}={value}: "
                f"leave {field} out"
            )


def _read_off(granularity: Any) -> dict[str, int | None]:
    """What is read off a granularity."""
    has_dim = isinstance(granularity, PerDimension | PerGroup)
    return {
        "group_by": granularity.by if isinstance(granularity, PerGroup) else None,
        "dim": granularity.dim if has_dim else None,
    }


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
