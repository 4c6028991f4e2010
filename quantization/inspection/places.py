"""Where the numbers of a packed weight lie, bit by bit, and what lies in a byte.

The layout is asked of what packs: a row in which one code alone is set shows which bits are its
own, and a row of one full byte shows which codes are in there. There is no second copy of it here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from quantization.numerics.packing import LARGEST_TERNARY_BYTE
from quantization.numerics.weight_packing import pack_weights, unpack_weights
from quantization.ops import native
from quantization.ops.dtypes import index_of
from quantization.schemes.packed_weights import PARTS, PackedWeights, layout_of

__all__ = ["CODES", "LayerParts", "Place", "bits_text", "checked_index", "index_at", "parts_of"]

#: The part that is codes, and what callers may call it in every layer.
CODES, _ALIAS = PARTS[0], "codes"
_FULL = 255


class Place(NamedTuple):
    """Where a number lies in a buffer, whose bytes are counted in the order of its elements.

    Attributes:
        buffer: name of the buffer, as the layer has it.
        element: index of the element that the number begins in.
        offset: of the byte that it begins in.
        masks: which bits of that byte and of those behind it are its own.
        data: those bytes.
        digit: which of the five digits of base 3 it is, the lowest first; None for bits.
    """

    buffer: str
    element: tuple[int, ...]
    offset: int
    masks: tuple[int, ...]
    data: tuple[int, ...]
    digit: int | None = None

    def __str__(self) -> str:
        where = f"{self.buffer}[{', '.join(map(str, self.element))}]"
        last = self.offset + len(self.masks) - 1
        if self.digit is not None:
            return f"digit {self.digit} in base 3 of byte {self.offset}, {where}"
        if all(mask == _FULL for mask in self.masks):
            span = f"byte {last}" if last == self.offset else f"bytes {self.offset}..{last}"
            return f"{span}, {where}"
        parts = (f"{bits_text(m)} of byte {self.offset + i}" for i, m in enumerate(self.masks))
        return f"{' and '.join(parts)}, {where}"


def bits_text(mask: int) -> str:
    """The bits of a mask in words, bit 0 the lowest.

    Example:
        >>> bits_text(0b11110000), bits_text(1)
        ('bits 4..7', 'bit 0')
    """
    low, high = (mask & -mask).bit_length() - 1, mask.bit_length() - 1
    return f"bit {low}" if low == high else f"bits {low}..{high}"


@dataclass(frozen=True)
class LayerParts:
    """The weight of a layer as a value, and what the layer calls the tensors it is made of.

    Attributes:
        packed: the weight.
        buffers: the layer's own name and tensor of each part of ``packed`` that there is.
        is_int8: whether it is an int8 layer, which multiplies in its own dtype.
    """

    packed: PackedWeights
    buffers: Mapping[str, tuple[str, Any]]
    is_int8: bool = False

    @cached_property
    def order(self) -> np.ndarray:
        """Which column of the matrix each stored one is."""
        given = self.packed.input_order
        return np.arange(self.packed.shape[1]) if given is None else native.to_array(given)

    def part(self, buffer: str) -> str:
        """The part that a buffer is.

        Raises:
            ValueError: if the layer has none of that name.
        """
        for part, (name, _) in self.buffers.items():
            if buffer in (name, _ALIAS if part == CODES else name):
                return part
        names = [name for name, _ in self.buffers.values()]
        raise ValueError(
            f"no buffer {buffer!r} belongs to this weight; there are {_ALIAS} (in {names[0]})"
            + "".join(f", {name}" for name in names[1:])
        )

    def place_of_code(self, row: int, column: int) -> Place:
        """Of the code of a stored column."""
        return self._of_code(
            CODES, row, column, self.packed.shape[1], layout_of(self.packed.scheme)
        )

    def place_of_zero(self, row: int, group: int) -> Place:
        """Of a zero point, in whichever form it is stored."""
        scheme = self.packed.scheme
        if not scheme.has_integer_zeros:
            return self.place("zero_points", row, group)
        return self._of_code(
            "zero_points", row, group, scheme.groups(self.packed.shape[1]), "dense"
        )

    def place(self, part: str, *index: int) -> Place:
        """Of a number that is a whole element of a part, given by its index there."""
        name, tensor = self.buffers[part]
        size = tensor.dtype.itemsize
        offset = int(np.ravel_multi_index(index, getattr(self.packed, part).shape)) * size
        return Place(name, index_at(tensor, offset), offset, (_FULL,) * size,
                     self.data(part, offset, size))  # fmt: skip

    def data(self, part: str, offset: int, count: int) -> tuple[int, ...]:
        """Bytes of a part."""
        _, tensor = self.buffers[part]
        size = tensor.dtype.itemsize
        first, last = offset // size, -(-(offset + count) // size)
        some = native.to_array(tensor.reshape(-1)[first:last], part).view("uint8")
        return tuple(some[offset - first * size :][:count].tolist())

    def codes_in(self, part: str, offset: int) -> list[tuple[int, int, Place]]:
        """The (row, index, place) of each code that has bits in a byte of packed codes."""
        scheme, (_, cols) = self.packed.scheme, self.packed.shape
        layout, count = layout_of(scheme), cols
        if part != CODES:
            layout, count = "dense", scheme.groups(cols)
        row, byte = divmod(offset, self._row_bytes(part))
        probe = np.zeros((1, self._row_bytes(part)), "uint8")
        probe[0, byte] = LARGEST_TERNARY_BYTE if layout == "base3" else _FULL
        found = unpack_weights(probe, scheme.bits, layout=layout, dim=1, size=count)[0].nonzero()[0]
        return [(row, i, self._of_code(part, row, i, count, layout)) for i in found.tolist()]

    def _of_code(self, part: str, row: int, index: int, count: int, layout: str) -> Place:
        name, tensor = self.buffers[part]
        first, masks, digit = _bits_of(self.packed.scheme.bits, layout, count, index)
        offset = row * self._row_bytes(part) + first
        return Place(name, index_at(tensor, offset), offset, masks,
                     self.data(part, offset, len(masks)), digit)  # fmt: skip

    def _row_bytes(self, part: str) -> int:
        return int(getattr(self.packed, part).shape[1])


def parts_of(layer: Any) -> LayerParts:
    """The parts of a quantized layer, of packed weights, or of a layer of a stored model.

    Raises:
        TypeError: for anything else; a model is told its layers.

    Example:
        >>> from quantization import pack_matrix
        >>> list(parts_of(pack_matrix(np.ones((2, 8), "float32"), "w4a")).buffers)
        ['packed_weights', 'scales', 'zero_points']
    """
    names = dict(zip(PARTS, PARTS, strict=True))
    if hasattr(layer, "load") and hasattr(layer, "module"):  # of a stored model
        layer = layer.module()
    if isinstance(layer, PackedWeights):
        packed = layer
    elif hasattr(layer, "packed") and hasattr(layer, "_weight_names"):
        packed, names[CODES] = layer.packed(), layer._weight_names()[0]
    else:
        raise TypeError(_not_quantized(layer))
    there = {part: getattr(packed, part) for part in PARTS}
    own = {part: getattr(layer, names[part], tensor) for part, tensor in there.items()}
    buffers = {p: (names[p], own[p]) for p, tensor in there.items() if tensor is not None}
    native.to_array(packed.packed_weights[:0], names[CODES])  # raises where there are no numbers
    return LayerParts(packed, buffers, is_int8=names[CODES] != CODES)


def checked_index(value: Any, count: int, what: str, of: str = "the weight") -> int:
    """An index of 0..count - 1.

    Raises:
        TypeError: if it is no whole number.
        ValueError: if it lies beyond.
    """
    index = index_of(value, what)
    if not 0 <= index < count:
        allowed = f"0..{count - 1}" if count else "none, as it is empty"
        raise ValueError(f"{what} is {index}; {of} has {allowed}")
    return index


def _bits_of(bits: int, layout: str, count: int, index: int) -> tuple[int, Any, int | None]:
    """First byte of a row, masks from there on, and digit of a code among ``count``."""
    probe = np.zeros((1, count), "uint8")
    is_digit = layout == "base3"
    probe[0, index] = 1 if is_digit else (1 << bits) - 1
    row = pack_weights(probe, bits, layout=layout, dim=1)[0]
    found = row.nonzero()[0]
    if is_digit:
        return int(found[0]), (_FULL,), round(math.log(row[found[0]], 3))
    return int(found[0]), tuple(row[found].tolist()), None


def index_at(tensor: Any, offset: int) -> tuple[int, ...]:
    """The index of the element that a byte of a tensor belongs to."""
    place = np.unravel_index(offset // tensor.dtype.itemsize, tuple(tensor.shape))
    return tuple(int(i) for i in place)


def _not_quantized(layer: Any) -> str:
    kind, inside = type(layer).__name__, []
    if hasattr(layer, "named_modules"):
        inside = [name for name, part in layer.named_modules() if hasattr(part, "_weight_names")]
    if not inside:
        return f"{kind} is no quantized layer, no PackedWeights and no layer of a stored model"
    more = f" and {len(inside) - 3} others" if len(inside) > 3 else ""
    return (
        f"{kind} is no quantized layer; it holds {', '.join(inside[:3])}{more}: give one of them, "
        f"model.get_submodule({inside[0]!r})"
    )
