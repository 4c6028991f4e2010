"""Why a weight is the number that it is, down to the bits of its bytes; and what a byte holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from quantization.inspection.bit_diagram import bit_diagram
from quantization.inspection.places import (
    LayerParts,
    Place,
    checked_index,
    parts_of,
)
from quantization.ops import native
from quantization.ops.dtypes import name_of
from quantization.schemes.packed_weights import PackedWeights
from quantization.schemes.scheme import Scheme
from quantization.schemes.stored_scales import restore, restore_zeros

__all__ = ["Explanation", "Part", "explain", "float_matrix", "levels_of"]


class Part(NamedTuple):
    """One number that a weight is made of.

    Attributes:
        name: what it is.
        value: the number.
        words: how it comes about, or how it is stored.
        place: the bits that hold it; None where it is computed of other parts.
    """

    name: str
    value: float
    words: str
    place: Place | None = None


@dataclass(frozen=True, repr=False)
class Explanation:
    """How one weight comes about; print it, or look at it in a notebook.

    Attributes:
        row, col: of the weight, in the layout of ``layer.weight``.
        scheme: of the layer.
        dtype: of the weight, by name.
        columns: which columns of the row share its scale.
        code: as it is stored, signed where codes are.
        level: what it stands for before zero point and scale.
        zero_point: 0 where there is none.
        scale: float32, as the codes are multiplied by it.
        multiplier: of the column; 1 where there is none.
        value: the weight.
        formula: in words, how the value follows from the rest.
        parts: every number that it is made of, and where its bits lie.
        reference: the float weight, or None.
        quotient: ``reference / (scale * multiplier) + zero_point``: where it lies among the levels.
        error: ``value - reference``.
        nearest: the code whose level is nearest to the quotient.

    Example:
        >>> from quantization import pack_matrix
        >>> told = explain(pack_matrix(np.array([[0.0, 15.0]], "float32"), "w4a"), 0, 1)
        >>> told.code, told.zero_point, told.scale, told.value
        (15, 0.0, 1.0, 15.0)
    """

    row: int
    col: int
    scheme: Scheme
    dtype: str
    columns: tuple[int, ...]
    code: int
    level: float
    zero_point: float
    scale: float
    multiplier: float
    value: float
    formula: str
    parts: tuple[Part, ...] = field(default=())
    reference: float | None = None
    quotient: float | None = None
    error: float | None = None
    nearest: int | None = None

    def __str__(self) -> str:
        head = f"weight[{self.row}, {self.col}] of {self.scheme}, {self.dtype}: {self.value:.6g}"
        rows = [
            (part.name, f"{part.value:.6g}", "; ".join(filter(None, _words_of(part))))
            for part in self.parts
        ]
        rows.append(("value", f"{self.value:.6g}", f"= {self.formula}"))
        if self.reference is not None:
            rows.append(("reference", f"{self.reference:.6g}", self._compared()))
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        lines = [f"  {a:<{widths[0]}}  {b:>{widths[1]}}  {c}".rstrip() for a, b, c in rows]
        return "\n".join([head, *lines])

    __repr__ = __str__

    def _compared(self) -> str:
        if self.quotient is None or not np.isfinite(self.quotient):
            return f"error {self.error:.6g}"
        below = "scale" if self.multiplier == 1 else "(scale * multiplier)"
        zero = " + zero point" if self.zero_point else ""
        words = f"/ {below}{zero} = {self.quotient:.6g}, error {self.error:.6g}"
        if self.nearest != self.code:
            words += f"; the nearest level is that of code {self.nearest}"
        return words

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values, fit for JSON.

        Example:
            >>> from quantization import pack_matrix
            >>> weight = np.array([[-3.5, 2.0, 1.0]], "float32")
            >>> explain(pack_matrix(weight, "w4"), 0, 0).to_dict()["parts"][0]["byte"]
            0
        """
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        parts = [
            {"name": part.name, "value": part.value, "words": part.words}
            | ({} if part.place is None else _plain_place(part.place))
            for part in self.parts
        ]
        return plain | {"scheme": str(self.scheme), "parts": parts, "columns": list(self.columns)}

    def _repr_html_(self) -> str:
        drawn = [(part.name, part.place) for part in self.parts if part.place is not None]
        return bit_diagram(str(self), drawn)


def explain(layer: Any, row: int, col: int, *, reference: Any = None) -> Explanation:
    """How one weight of a quantized layer comes about, down to the bits that hold it.

    Args:
        layer: a quantized layer, a :class:`quantization.PackedWeights` (of NumPy alone, too), or a
            layer of a stored model. Of a layer that is one process's share, its own rows and
            columns.
        row: in the layout of ``layer.weight``: an output feature, or a row of an embedding.
        col: an input feature, or a place in that row.
        reference: the float weight, or the float layer, that it was made of: then also where that
            number lies among the levels, and the error.

    Returns:
        An :class:`Explanation`: text where it is printed, a drawing of the bits in a notebook.

    Raises:
        TypeError: if ``layer`` is not quantized (a model is told its layers), or an index or the
            reference is of a wrong kind.
        ValueError: for an index beyond the weight, a reference of another shape, or a layer that
            has no numbers (on meta).

    Source: the formula at the head of :mod:`quantization.schemes.packed_weights`.

    Example:
        >>> from quantization import pack_matrix
        >>> weight = np.array([[-3.5, 2.0, 1.1]], "float32")
        >>> explain(pack_matrix(weight, "w4"), 0, 2, reference=weight)
        weight[0, 2] of w4, float32: 0.933333
          code              2  bits 0..3 of byte 1, packed_weights[0, 1] = 0010
          scale      0.466667  float32; bytes 0..3, scales[0, 0]
          value      0.933333  = code * scale = 2 * 0.466667
          reference       1.1  / scale = 2.35714, error -0.166667
    """
    parts = parts_of(layer)
    rows, cols = parts.packed.shape
    row, col = checked_index(row, rows, "row"), checked_index(col, cols, "col")
    number = None
    if reference is not None:
        number = float(float_matrix(reference, (rows, cols), slice(row, row + 1))[0, col])
    return _Weight(parts, row, col).explanation(number)


class _Weight:
    """One weight and what it is made of."""

    def __init__(self, parts: LayerParts, row: int, col: int) -> None:
        self.parts, self.row, self.col = parts, row, col
        self.scheme = parts.packed.scheme
        self.one: PackedWeights = parts.packed.rows(row, row + 1)
        self.stored = int(np.flatnonzero(parts.order == col)[0])
        length = self.scheme.group(parts.packed.shape[1])
        self.group = self.stored // length
        self.columns = parts.order[self.group * length :][:length]
        self.code = int(native.to_array(self.one.codes)[0, col])
        self.level: float = self.code
        self.zero = 0.0
        self.multiplier = 1.0
        self.found: list[Part] = []
        self._collect()

    def _collect(self) -> None:
        """Each number, from the code on, in the order of the formula."""
        if self.one.input_order is not None:
            words = f"the column is stored as number {self.stored}"
            self._add("column", self.col, words, self.parts.place("input_order", self.stored))
        place = self.parts.place_of_code(self.row, self.stored)
        self._add("code", self.code, "", place)
        book = self.one.codebook
        if book is not None:
            row = self.row if self.parts.packed.codebook.shape[0] > 1 else 0
            self.level = float(_floats(book)[0, self.code])
            place = self.parts.place("codebook", row, self.code)
            self._add("level", self.level, f"of code {self.code}, {name_of(book.dtype)}", place)
        if self.one.zero_points is not None:
            self._add_zero(self.one.zero_points)
        self._add_scale()
        if self.one.input_scale is not None:
            self.multiplier = float(_floats(self.one.input_scale)[self.stored])
            kind = name_of(self.one.input_scale.dtype)
            place = self.parts.place("input_scale", self.stored)
            self._add("multiplier", self.multiplier, f"of the column, {kind}", place)

    def _add(self, name: str, value: float, words: str, place: Place | None = None) -> None:
        self.found.append(Part(name, value, words, place))

    def _add_zero(self, zeros: Any) -> None:
        place = self.parts.place_of_zero(self.row, self.group)
        if self.scheme.has_integer_zeros:
            self.zero = float(self.one.integer_zero_points()[0, self.group])
            self._add("zero point", self.zero, "", place)
            return
        self.zero = float(restore_zeros(zeros, self.scheme.bits)[0, self.group])
        if self.scheme.zero_point == "float":
            self._add("zero point", self.zero, name_of(zeros.dtype), place)
            return
        stored = int(zeros[0, self.group])
        power = f"2**{self.scheme.bits - 8}" if self.scheme.bits < 8 else "1"
        self._add("zero point", self.zero, f"= (zero point code + 128) * {power}")
        self._add("zero point code", stored, "fixed point, int8", place)

    def _add_scale(self) -> None:
        scales, steps = self.one.scales, self.one.scale_steps
        if self.parts.is_int8:  # multiplied in the layer's own dtype, float64 too
            self.scale = float(native.to_array(native.cast(scales, "float64"))[0, 0])
        else:
            self.scale = float(restore(scales, steps)[0, self.group])
        place = self.parts.place("scales", self.row, self.group)
        if name_of(scales.dtype) != "uint8":
            self._add("scale", self.scale, name_of(scales.dtype), place)
            return
        stored = int(scales[0, self.group])
        if steps is None:
            self._add("scale", self.scale, "= 2**(scale exponent - 127), NaN for 255")
            self._add("scale exponent", stored, "uint8", place)
            return
        self._add("scale", self.scale, "= scale code * scale step")
        self._add("scale code", stored, "uint8", place)
        step = float(_floats(steps)[0])
        self._add(
            "scale step", step, name_of(steps.dtype), self.parts.place("scale_steps", self.row)
        )

    def _value(self) -> float:
        """The weight, as the layer has it."""
        packed = self.one
        if not self.parts.is_int8:
            return float(packed.dequantize()[0, self.col])
        exact = native.as_tensor_like(np.array([self.level * self.scale]), "float64", packed.scales)
        return float(native.cast(exact, packed.dtype)[0])

    def _formula(self) -> str:
        """The formula, with names and with numbers."""
        level, number = "code", f"{self.code}"
        if self.one.codebook is not None:
            level, number = "level", f"{self.level:.6g}"
        if self.one.zero_points is not None:
            level, number = f"({level} - zero point)", f"({number} - {self.zero:.6g})"
        names, numbers = [level, "scale"], [number, f"{self.scale:.6g}"]
        if self.one.input_scale is not None:
            names, numbers = [*names, "multiplier"], [*numbers, f"{self.multiplier:.6g}"]
        rounded = (
            "" if self.one.dtype in ("float32", "float64") else f", rounded to {self.one.dtype}"
        )
        return f"{' * '.join(names)} = {' * '.join(numbers)}{rounded}"

    def explanation(self, reference: float | None) -> Explanation:
        value, more = self._value(), dict[str, Any]()
        if reference is not None:
            size = self.scale * self.multiplier
            quotient = reference / size + self.zero if size else float("nan")
            more = {
                "reference": reference, "quotient": quotient, "error": value - reference,
                "nearest": self._nearest(quotient),
            }  # fmt: skip
        return Explanation(
            self.row, self.col, self.scheme, self.one.dtype, tuple(sorted(self.columns.tolist())),
            self.code, self.level, self.zero, self.scale, self.multiplier, value,
            self._formula(), tuple(self.found), **more,
        )  # fmt: skip

    def _nearest(self, quotient: float) -> int:
        """The code of the level that is nearest to a place; its own where that is as near."""
        levels = levels_of(self.one)
        far = np.abs(np.array(list(levels.values())) - quotient)
        own = abs(self.level - quotient)
        return (
            list(levels)[int(far.argmin())] if far.min() < own - 1e-6 * abs(quotient) else self.code
        )


def levels_of(one: PackedWeights) -> dict[int, float]:
    """The level of each code of the first row, before zero point and scale.

    Example:
        >>> from quantization import pack_matrix
        >>> levels_of(pack_matrix(np.ones((1, 4), "float32"), "w2"))
        {-2: -2.0, -1: -1.0, 0: 0.0, 1: 1.0}
    """
    scheme = one.scheme
    if one.codebook is not None:
        return {code: float(level) for code, level in enumerate(_floats(one.codebook)[0])}
    if scheme.grid == "ternary":
        return {-1: -1.0, 0: 0.0, 1: 1.0}
    low = 0 if one.zero_points is not None else -(1 << (scheme.bits - 1))
    return {code: float(code) for code in range(low, low + (1 << scheme.bits))}


def float_matrix(given: Any, shape: tuple[int, int], rows: slice = slice(None)) -> np.ndarray:
    """Rows of a float matrix or of the weight of a float layer, float64.

    Raises:
        TypeError: if it is neither.
        ValueError: if it has another shape.
    """
    weight = getattr(given, "weight", given)
    if not native.is_tensor(weight):
        raise TypeError(f"reference is a {type(given).__name__}; give a float weight or layer")
    if type(given).__name__ == "Conv1D":  # of transformers, whose weight is [in, out]
        weight = weight.T
    if tuple(weight.shape) != shape:
        raise ValueError(f"reference has shape {tuple(weight.shape)}; the weight has {shape}")
    return native.to_array(native.cast(weight[rows], "float64"), "reference")


def _floats(tensor: Any) -> np.ndarray:
    return native.to_array(native.cast(tensor, "float32"))


def _words_of(part: Part) -> tuple[str, ...]:
    if part.place is None:
        return (part.words,)
    text = str(part.place)
    if part.name in ("code", "zero point") and not part.words and part.place.digit is None:
        text += f" = {_own_bits(part.place)}"
    return part.words, text


def _own_bits(place: Place) -> str:
    """The bits of a number, the highest first."""
    pairs = list(zip(place.masks, place.data, strict=True))[::-1]
    return "".join(
        str(byte >> bit & 1) for mask, byte in pairs for bit in range(7, -1, -1) if mask >> bit & 1
    )


def _plain_place(place: Place) -> dict[str, Any]:
    plain = {"buffer": place.buffer, "element": list(place.element), "byte": place.offset}
    plain |= {"masks": list(place.masks), "data": list(place.data)}
    return plain if place.digit is None else plain | {"digit": place.digit}
