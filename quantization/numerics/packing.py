"""What a packing is: its layouts, widths and containers, and the checks of those arguments."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantization.ops import native
from quantization.ops.dtypes import index_of, name_of
from quantization.ops.native import Tensor

LAYOUTS = ("aligned", "dense", "base3")
CONTAINERS = tuple(f"{sign}int{bits}" for sign in ("u", "") for bits in (8, 16, 32, 64))
INTEGERS = ("bool", *CONTAINERS)
TERNARY_BITS = 2  # pack_bits of base3: what one ternary code takes in the other layouts
TERNARY_CODES = 5  # of them in a byte
LARGEST_TERNARY_BYTE = 3**TERNARY_CODES - 1


@dataclass(frozen=True)
class Packing:
    """How a matrix of codes was packed: all that is needed to restore it.

    Attributes:
        bits: width of a code, 1..8 (2 in the layout ``base3``).
        layout: ``"aligned"``, ``"dense"`` or ``"base3"``.
        dim: the dimension that shrank, 0 or 1.
        container: name of the packed integers' dtype.
        shape: of the codes, before packing.
        is_signed: whether the codes are two's complement (unpacked to int8), else uint8.

    Raises:
        TypeError, ValueError: if the attributes fit no layout.

    Example:
        >>> packing = Packing(3, "dense", 1, "uint8", (4, 10), is_signed=False)
        >>> packing.packed_shape  # ten codes of 3 bits fill four bytes
        (4, 4)
    """

    bits: int
    layout: str
    dim: int
    container: str
    shape: tuple[int, int]
    is_signed: bool

    def __post_init__(self) -> None:
        bits, container = checked_layout(self.bits, self.layout, self.container, "container")
        if not isinstance(self.shape, Iterable):
            raise TypeError(f"shape must be (rows, cols), not {self.shape!r}")
        shape = tuple(index_of(length, "a length of shape") for length in self.shape)
        if len(shape) != 2 or min(shape) < 0:
            raise ValueError(f"shape must be (rows, cols), not {shape}")
        plain = {"bits": bits, "container": container, "dim": checked_dim(self.dim), "shape": shape}
        for name, value in (plain | {"is_signed": bool(self.is_signed)}).items():
            object.__setattr__(self, name, value)

    @property
    def packed_shape(self) -> tuple[int, int]:
        """Shape of the packed containers."""
        rows, cols = self.shape
        length = self.packed_length(self.shape[self.dim])
        return (length, cols) if self.dim == 0 else (rows, length)

    def packed_length(self, length: int) -> int:
        """Containers that ``length`` codes along ``dim`` fill."""
        if self.layout == "base3":
            return -(-length // TERNARY_CODES)
        container_bytes = get_dtype_size_in_bits(self.container) // 8
        return native.packed_length(length, self.bits, container_bytes, self.layout == "dense")

    def capacity(self, containers: int) -> int:
        """Codes along ``dim`` that fit into so many containers."""
        if self.layout == "base3":
            return containers * TERNARY_CODES
        width = get_dtype_size_in_bits(self.container)
        if self.layout == "dense":
            return containers * width // self.bits
        return containers * (width // self.bits)


# ---- widths ----------------------------------------------------------------------------------


def bit_shifts(pack_bits: int, dtype: Any = "uint8") -> tuple[int, ...]:
    """Where each code of an aligned container starts: the shifts that bring it to bit 0.

    Raises:
        ValueError: if ``pack_bits`` is not 1..8.
        TypeError: if ``dtype`` is not a container's.

    Example:
        >>> bit_shifts(2)
        (0, 2, 4, 6)
        >>> bit_shifts(5, "uint16")
        (0, 5, 10)
    """
    bits, container = checked_layout(pack_bits, "aligned", dtype, "dtype")
    return tuple(range(0, get_dtype_size_in_bits(container) - bits + 1, bits))


def get_dtype_size_in_bits(dtype: Any) -> int:
    """Bits that one number of a torch dtype, NumPy dtype or named dtype takes.

    Raises:
        TypeError: if ``dtype`` is no number type.

    Example:
        >>> get_dtype_size_in_bits("int4"), get_dtype_size_in_bits(np.float32)
        (4, 32)
    """
    name = dtype if isinstance(dtype, str) else name_of(dtype)
    if name == "bool":
        return 8
    match = re.fullmatch(
        r"(?:bfloat|float|complex|u?int|quint|qint)([1-9]\d{,2})(?:[_x]\w*)?", name
    )
    if match is None:
        raise TypeError(f"{name} is not a number type; give one such as uint8 or float32")
    return int(match[1])


def get_max_bits_needed(tensor: Tensor) -> int:
    """The narrowest width, in bits, that holds every value of an integer tensor of any shape.

    Two's complement if any value is negative. At least 1, also for no values at all.

    Raises:
        TypeError: if ``tensor`` is not an integer tensor.

    Example:
        >>> get_max_bits_needed(np.array([0, 5])), get_max_bits_needed(np.array([-4, 3]))
        (3, 3)
    """
    return bits_for(*extremes(integers_of(tensor, "tensor", ndim=None)))


def bits_for(low: int, high: int) -> int:
    """Bits that hold ``low..high``, in two's complement if ``low`` is negative."""
    if low < 0:
        return max((-low - 1).bit_length(), high.bit_length() if high > 0 else 0) + 1
    return max(1, high.bit_length())


def extremes(codes: np.ndarray) -> tuple[int, int]:
    """Smallest and largest code; (0, 0) if there are none."""
    return (int(codes.min()), int(codes.max())) if codes.size else (0, 0)


# ---- checks ----------------------------------------------------------------------------------


def integer_name(dtype: Any, what: str, allowed: tuple[str, ...] = INTEGERS) -> str:
    """Name of an integer dtype."""
    name = name_of(dtype)
    if name not in allowed:
        raise TypeError(f"{what} is {name}; allowed are {', '.join(allowed)}")
    return name


def integers_of(
    tensor: Tensor, what: str, allowed: tuple[str, ...] = INTEGERS, ndim: int | None = 2
) -> np.ndarray:
    """The numbers of an integer tensor, C-contiguous in native byte order."""
    if native.is_tensor(tensor):
        integer_name(tensor.dtype, f"dtype of {what}", allowed)
        if ndim not in (None, tensor.ndim):
            raise ValueError(
                f"{what} has shape {tuple(tensor.shape)}; expected 2 dimensions: reshape it first"
            )
    return native.to_array(tensor, what)


def checked_layout(pack_bits: int, layout: str, dtype: Any, what: str) -> tuple[int, str]:
    """Width and container name of a layout that exists; ``what`` is the container in messages."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} does not exist; allowed are {', '.join(LAYOUTS)}")
    bits = index_of(pack_bits, "pack_bits")
    if layout == "base3" and bits != TERNARY_BITS:
        raise ValueError(f"layout 'base3' packs ternary codes: pack_bits must be 2, not {bits}")
    if not 1 <= bits <= 8:
        raise ValueError(f"pack_bits must be 1..8, not {bits}")
    container = integer_name(dtype, what, CONTAINERS)
    if layout == "base3" and container not in ("uint8", "int8"):
        raise TypeError(f"layout 'base3' packs into uint8 or int8, not {container}")
    return bits, container


def checked_dim(dim: int) -> int:
    """``dim`` as 0 or 1."""
    dim = index_of(dim, "dim")
    if not -2 <= dim <= 1:
        raise ValueError(f"dim must be 0 (down the columns) or 1 (along the rows), not {dim}")
    return dim % 2
