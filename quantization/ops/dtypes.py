"""The number types of the package: what a code, a scale or an activation may be.

A type is named as torch names it (``"int4"``, ``"uint3"``, ``"float8_e4m3fn"``, ``"bfloat16"``);
torch dtypes, NumPy dtypes and strings all lead to the same :class:`DType`. Torch is not imported.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class DType:
    """One number type.

    Attributes:
        name: torch's name of the type, without ``torch.``.
        bits: width of a number in bits.
        is_floating_point: whether it is a float type.
        is_signed: whether it holds negative numbers.
        min: smallest finite number. ``int1`` is binary: its numbers are -1 and +1.
        max: largest finite number.
        storage: name of the type that holds it in memory (``int4`` lives in ``int8``).
    """

    name: str
    bits: int
    is_floating_point: bool
    is_signed: bool
    min: float
    max: float
    storage: str

    @property
    def itemsize(self) -> int:
        """Bytes that one number takes in memory."""
        return {"int16": 2, "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}.get(
            self.storage, 1
        )

    def __str__(self) -> str:
        return self.name


def _float(name: str, bits: int, largest: float) -> DType:
    return DType(name, bits, True, True, -largest, largest, name)


def _integer(bits: int, is_signed: bool) -> DType:
    name = f"{'' if is_signed else 'u'}int{bits}"
    storage = name if bits > 8 else ("int8" if is_signed else "uint8")
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if is_signed else (0, (1 << bits) - 1)
    if name == "int1":
        low, high = -1, 1
    return DType(name, bits, False, is_signed, low, high, storage)


#: Types that weights, activations and scales may have.
SOURCES: dict[str, DType] = {
    dtype.name: dtype
    for dtype in (
        _float("float32", 32, float(np.finfo(np.float32).max)),
        _float("float64", 64, float(np.finfo(np.float64).max)),
        _float("float16", 16, 65504.0),
        _float("bfloat16", 16, float.fromhex("0x1.fep127")),
    )
}

#: Types that codes may have.
TARGETS: dict[str, DType] = {
    dtype.name: dtype
    for dtype in (
        *(_integer(bits, True) for bits in (*range(1, 9), 16)),
        *(_integer(bits, False) for bits in range(1, 9)),
        *(SOURCES[name] for name in ("float32", "float16", "bfloat16")),
        _float("float8_e4m3fn", 8, 448.0),
        _float("float8_e5m2", 8, 57344.0),
    )
}

_ALL = SOURCES | TARGETS


def name_of(dtype: Any) -> str:
    """Name of anything that names a type: a :class:`DType`, torch dtype, NumPy dtype or string.

    Raises:
        TypeError: if it names none.
    """
    if isinstance(dtype, DType):
        return dtype.name
    text = str(dtype)
    if text.startswith("torch."):
        return text.removeprefix("torch.")
    if isinstance(dtype, str) and dtype in _ALL:
        return dtype
    try:
        if dtype is None or isinstance(dtype, list | dict):  # NumPy: float64, and records
            raise TypeError
        return str(np.dtype(dtype).name)
    except (TypeError, ValueError, SyntaxError):  # NumPy raises any of these
        raise TypeError(
            f"{dtype!r:.60} is not a dtype; give a torch dtype, a NumPy dtype or a name such as "
            "'int8'"
        ) from None


def index_of(value: Any, what: str) -> int:
    """``value`` as an int.

    Raises:
        TypeError: for a bool, a float or anything else that is no integer.

    Example:
        >>> index_of(np.int8(3), "size")
        3
    """
    if isinstance(value, bool | np.bool_) or not hasattr(value, "__index__"):
        raise TypeError(f"{what} must be an integer, not {value!r:.60}")
    return operator.index(value)


def dtype_of(dtype: Any) -> DType:
    """The number type that ``dtype`` names, of codes or of what becomes codes.

    Raises:
        TypeError: if the package does not know the type; the message lists those it knows.

    Example:
        >>> dtype_of("float64").bits
        64
    """
    name = name_of(dtype)
    if name not in _ALL:
        raise TypeError(f"no number type here is {name}; allowed are {', '.join(_ALL)}")
    return _ALL[name]


def target_of(dtype: Any) -> DType:
    """The code type that ``dtype`` names.

    Raises:
        TypeError: if codes cannot have that type; the message lists those they can.

    Example:
        >>> target_of("int4").max
        7
        >>> target_of(np.uint8).max
        255
    """
    name = name_of(dtype)
    if name not in TARGETS:
        raise TypeError(f"cannot quantize to {name}; allowed are {', '.join(TARGETS)}")
    return TARGETS[name]


def source_of(dtype: Any, what: str = "tensor") -> DType:
    """The float type that ``dtype`` names.

    Raises:
        TypeError: if it is not one of float32, float64, float16, bfloat16.
    """
    name = name_of(dtype)
    if name not in SOURCES:
        allowed = ", ".join(SOURCES)
        raise TypeError(f"{what} has dtype {name}; allowed are {allowed}: convert it first")
    return SOURCES[name]
