"""What a byte of a layer's buffer holds: the way back from bits to weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import numpy as np

from quantization.inspection.bit_diagram import bit_diagram
from quantization.inspection.places import (
    CODES,
    LayerParts,
    Place,
    bits_text,
    checked_index,
    index_at,
    parts_of,
)
from quantization.ops.dtypes import name_of
from quantization.schemes.scheme import TERNARY_CODES, Scheme

__all__ = ["ByteExplanation", "HeldBits", "explain_byte"]


class HeldBits(NamedTuple):
    """What some bits of a byte belong to.

    Attributes:
        what: ``"code"``, ``"scale"``, ``"zero point"``, ``"step"``, ``"level"``, ``"column"``,
            ``"multiplier"`` or ``"padding"``.
        rows: of the weights that they are of.
        cols: of these weights: each of the columns in each of the rows.
        mask: which bits of the byte.
        words: which bits of the number these are.
        code: of a level: only weights of this code use it; else None.
    """

    what: str
    rows: range
    cols: tuple[int, ...]
    mask: int
    words: str
    code: int | None = None

    def __str__(self) -> str:
        if not self.rows:
            return f"{bits_text(self.mask)}: {self.what}, {self.words}"
        weights = f"weight[{_span(tuple(self.rows))}, {_span(self.cols)}]"
        of = weights if self.code is None else f"code {self.code} in {weights}"
        return f"{bits_text(self.mask)}: {self.what} of {of}, {self.words}"


@dataclass(frozen=True, repr=False)
class ByteExplanation:
    """What one byte of a layer's buffer holds; print it.

    Attributes:
        buffer: name of the buffer.
        offset: of the byte.
        element: index of the element that it belongs to.
        value: of the byte.
        scheme: of the layer.
        held: what its bits belong to, the lowest first; padding belongs to no weight.

    Example:
        >>> from quantization import pack_matrix
        >>> told = explain_byte(pack_matrix(np.ones((2, 5), "float32"), "w4"), 2)
        >>> [(held.what, f"{held.mask:08b}") for held in told.held]
        [('code', '00001111'), ('padding', '11110000')]
    """

    buffer: str
    offset: int
    element: tuple[int, ...]
    value: int
    scheme: Scheme
    held: tuple[HeldBits, ...]

    def __str__(self) -> str:
        where = f"{self.buffer}[{', '.join(map(str, self.element))}]"
        head = f"byte {self.offset}, {where} of {self.scheme}: 0x{self.value:02x} {self.value:08b}"
        lines = [f"  {held}" for held in self.held]
        return "\n".join([head, *lines])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        drawn = [
            (str(held).partition(": ")[2].partition(", its")[0],
             Place(self.buffer, self.element, self.offset, (held.mask,), (self.value,)))
            for held in self.held
        ]  # fmt: skip
        return bit_diagram(str(self), drawn)


def explain_byte(layer: Any, offset: int, buffer: str = "codes") -> ByteExplanation:
    """Which weights the bits of a byte belong to.

    Args:
        layer: as for :func:`explain`.
        offset: of the byte, counted in the order of the buffer's elements from 0.
        buffer: ``"codes"``, whatever the layer calls them, or a name of the layer's buffers:
            ``"scales"``, ``"scale_steps"``, ``"zero_points"``, ``"codebook"``, ``"input_order"``,
            ``"input_scale"``.

    Raises:
        TypeError: as :func:`explain`.
        ValueError: for a buffer that the weight does not have, or an offset beyond it.

    Example:
        >>> from quantization import pack_matrix
        >>> packed = pack_matrix(np.ones((2, 5), "float32"), "w3")
        >>> explain_byte(packed, 1)
        byte 1, packed_weights[0, 1] of w3: 0x36 00110110
          bit 0: code of weight[0, 2], its bit 2
          bits 1..3: code of weight[0, 3], its bits 0..2
          bits 4..6: code of weight[0, 4], its bits 0..2
          bit 7: padding, of no weight
    """
    parts = parts_of(layer)
    part = parts.part(buffer)
    name, tensor = parts.buffers[part]
    size = tensor.dtype.itemsize
    nbytes = int(np.prod(tuple(tensor.shape))) * size
    offset = checked_index(offset, nbytes, "offset", name)
    index = index_at(tensor, offset)
    is_codes = part == CODES or (part == "zero_points" and parts.packed.scheme.has_integer_zeros)
    held = _codes_held(parts, part, offset) if is_codes else [_held(parts, part, offset)]
    value = parts.data(part, offset, 1)[0]
    return ByteExplanation(name, offset, index, value, parts.packed.scheme, tuple(held))


def _codes_held(parts: LayerParts, part: str, offset: int) -> list[HeldBits]:
    made, is_digit = [], False
    for row, index, place in parts.codes_in(part, offset):
        nth = offset - place.offset
        mask = place.masks[nth]
        before = sum(each.bit_count() for each in place.masks[:nth])
        own = ((1 << mask.bit_count()) - 1) << before
        words = f"its {bits_text(own)}" if place.digit is None else f"digit {place.digit} in base 3"
        cols = _group_columns(parts, index) if part != CODES else (int(parts.order[index]),)
        what = "code" if part == CODES else "zero point"
        made.append(HeldBits(what, range(row, row + 1), cols, mask, words))
        is_digit = place.digit is not None
    if is_digit:
        digits = range(len(made), TERNARY_CODES)
        return [*made, *(_padding(0xFF, f"digit {digit} in base 3") for digit in digits)]
    left = 0xFF & ~reduce(or_, (held.mask for held in made), 0)
    return [*made, _padding(left, "of no weight")] if left else made


def _padding(mask: int, words: str) -> HeldBits:
    return HeldBits("padding", range(0), (), mask, words)


_WHAT = {
    "scales": "scale",
    "scale_steps": "step",
    "zero_points": "zero point",
    "codebook": "level",
    "input_order": "column",
    "input_scale": "multiplier",
}


def _held(parts: LayerParts, part: str, offset: int) -> HeldBits:
    """Of a part whose elements are whole bytes."""
    tensor = getattr(parts.packed, part)
    size = tensor.dtype.itemsize
    index = index_at(tensor, offset)
    (rows, cols), code = parts.packed.shape, None
    covered, columns = range(rows), tuple(range(cols))
    if part in ("input_order", "input_scale"):
        columns = (int(parts.order[index[0]]),)
    elif part == "codebook":
        code = index[1]
        covered = range(index[0], index[0] + 1) if tensor.shape[0] > 1 else covered
    else:
        covered = range(index[0], index[0] + 1)
        columns = _group_columns(parts, index[1]) if len(index) > 1 else columns
    words = f"its byte {offset % size} of {size}, {name_of(tensor.dtype)}"
    return HeldBits(_WHAT[part], covered, columns, 0xFF, words, code)


def _group_columns(parts: LayerParts, group: int) -> tuple[int, ...]:
    length = parts.packed.scheme.group(parts.packed.shape[1])
    return tuple(sorted(parts.order[group * length :][:length].tolist()))


def _span(numbers: tuple[int, ...]) -> str:
    """Indices for reading: one, a range, or the first few of many."""
    if len(numbers) == 1:
        return str(numbers[0])
    if numbers and numbers == tuple(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}..{numbers[-1]}"
    some = ", ".join(map(str, numbers[:4]))
    return f"({some}, ... {len(numbers)} in all)" if len(numbers) > 4 else f"({some})"
