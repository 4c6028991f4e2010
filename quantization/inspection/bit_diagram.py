"""Bits and bytes drawn: inline SVG in the colour of the text, right on any background."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from quantization.console.as_html import svg
from quantization.inspection.places import Place

__all__ = ["bit_diagram"]

_CELL, _HIGH, _GAP = 14, 18, 6  # of a bit, in pixels
_LABEL = 8  # of a letter
_WIDTH = 8


def bit_diagram(text: str, drawn: Sequence[tuple[str, Place]]) -> str:
    """A text, and below it a line for each number: its bytes, with the bits that are its own full.

    Args:
        text: lines as they are printed.
        drawn: names of numbers, and where each lies.

    Example:
        >>> place = Place("codes", (0, 1), 1, (0b1111,), (0x36,))
        >>> "codes[0, 1]" in bit_diagram("a < b", [("code", place)])
        True
    """
    label = _LABEL * max((len(name) for name, _ in drawn), default=0)
    lines, y, wide = [], 0, 0
    for name, place in drawn:
        x = label + _GAP
        lines.append(_text(0, y, name, "start"))
        for cells, full in _bytes(place):
            each = _CELL * (2 if len(cells) == 1 else 1)
            for cell, is_own in zip(cells, full, strict=True):
                lines.append(_box(x, y, each, is_own) + _text(x + each / 2, y, cell, "middle"))
                x += each
            x += _GAP
        where = f"{place.buffer}[{', '.join(map(str, place.element))}]"
        lines.append(_text(x, y, where, "start"))
        wide = max(wide, x + _WIDTH * len(where))
        y += _HIGH + _GAP
    picture = svg(wide, "bits", "".join(lines), y) if lines else ""
    return f"<div>\n<pre>{escape(text)}</pre>\n{picture}\n</div>"


def _bytes(place: Place) -> list[tuple[list[str], list[bool]]]:
    """Cells of each byte, and which are the number's own: digits, bits, or the byte in hex."""
    if place.digit is not None:
        digits = [place.data[0] // 3**i % 3 for i in range(4, -1, -1)]
        return [([str(digit) for digit in digits], [i == place.digit for i in range(4, -1, -1)])]
    if len(place.masks) > 2 or all(mask == 0xFF for mask in place.masks):
        return [([f"{byte:02x}"], [True]) for byte in place.data]
    high = range(7, -1, -1)
    pairs = zip(place.masks, place.data, strict=True)
    return [([str(d >> i & 1) for i in high], [bool(m >> i & 1) for i in high]) for m, d in pairs]


def _box(x: float, y: float, wide: float, is_own: bool) -> str:
    shade = ".35" if is_own else ".06"
    return (
        f'<path d="M{x:g} {y:g}h{wide:g}v{_HIGH}h-{wide:g}z" fill="currentColor" '
        f'fill-opacity="{shade}" stroke="currentColor" stroke-opacity=".4"/>'
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return (
        f'<text x="{x:g}" y="{y + _HIGH - 5:g}" text-anchor="{anchor}" fill="currentColor" '
        f'font-family="monospace" font-size="12">{escape(text)}</text>'
    )
