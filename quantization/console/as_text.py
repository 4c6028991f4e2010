"""A table as plain lines that fit the width of a terminal, and as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from quantization.console.columns import Column

__all__ = ["markdown_lines", "paragraph", "text_lines"]

_GAP = 2
#: Letters of a column that gives way; words give way first, names are what readers look for.
_LEAST = {"text": 16, "name": 0}


def text_lines(
    columns: Sequence[Column], cells: Sequence[Sequence[str]], width: int | None = None
) -> list[str]:
    """Rows in columns below their headings; nothing of a cell is lost, and no word is cut.

    Where the width does not do, words are wrapped in their column, or stand below the row where two
    lines of it do not do; names that are too long stand on a line of their own above the row;
    then columns that are ``extra`` are left out, and a last line says which. A name that is longer
    than the width goes on behind one of its dots.

    Args:
        columns: their kinds.
        cells: as many texts in each row.
        width: of a line; None: as wide as it is.

    Example:
        >>> columns = Column("layer", "name"), Column("bits", "number")
        >>> for line in text_lines(columns, [("a", "4"), ("model.layers.0.mlp", "16")], 18):
        ...     print(line)
        layer         bits
        a                4
        model.layers.0.mlp
                        16
    """
    shown = list(range(len(columns)))
    left_out: list[str] = []
    while (widths := _widths(columns, cells, shown, width)) is None:
        place = max((i for i in shown if columns[i].extra), default=None)
        if place is None:
            widths = _least_widths(columns, cells, shown)
            break
        shown.remove(place)
        left_out.insert(0, columns[place].heading)
    kept = [columns[i] for i in shown]
    lines = _row(kept, [column.heading for column in kept], widths, width)
    for row in cells:
        lines += _row(kept, [row[i] for i in shown], widths, width)
    if left_out:
        lines += paragraph(f"(no room for {', '.join(left_out)})", width)
    return lines


def _full_widths(
    cells: Sequence[Sequence[str]], columns: Sequence[Column], shown: list[int]
) -> list[int]:
    return [max([len(columns[i].heading), *(len(row[i]) for row in cells)]) for i in shown]


def _least_widths(
    columns: Sequence[Column], cells: Sequence[Sequence[str]], shown: list[int]
) -> list[int]:
    return [
        min(full, max(_LEAST.get(columns[i].kind, full), len(columns[i].heading)))
        for i, full in zip(shown, _full_widths(cells, columns, shown), strict=True)
    ]


def _widths(
    columns: Sequence[Column], cells: Sequence[Sequence[str]], shown: list[int], width: int | None
) -> list[int] | None:
    """The width of each column that is shown, or None where they do not fit."""
    full = _full_widths(cells, columns, shown)
    gaps = _GAP * (len(full) - 1)
    if width is None or sum(full) + gaps <= width:
        return full
    least = _least_widths(columns, cells, shown)
    if sum(least) + gaps > width:
        return None
    over = sum(full) + gaps - width
    for kind in _LEAST:
        for at, i in enumerate(shown):
            if columns[i].kind == kind:
                taken = min(over, full[at] - least[at])
                full[at] -= taken
                over -= taken
    return full


def _row(
    columns: Sequence[Column], texts: Sequence[str], widths: Sequence[int], width: int | None
) -> list[str]:
    """The lines of one row."""
    above: list[str] = []
    below: list[str] = []
    parts: list[list[str]] = []
    for column, text, room in zip(columns, texts, widths, strict=True):
        if len(text) <= room:
            parts.append([text])
        elif column.kind == "name":
            above += _broken(text, width or len(text))
            parts.append([""])
        elif _is_long(text, room):
            below += paragraph(f"  {text}", width)
            parts.append([""])
        else:
            parts.append(textwrap.wrap(text, room, break_on_hyphens=False))
    lines = []
    for at in range(max(map(len, parts), default=0)):
        line = (" " * _GAP).join(
            f"{part[at] if at < len(part) else '':{column.side}{room}}"
            for column, part, room in zip(columns, parts, widths, strict=True)
        )
        lines.append(line.rstrip())
    return [*above, *lines, *below]


def _is_long(text: str, room: int) -> bool:
    """Whether words do not go into a column, or not into two lines of it."""
    return max(map(len, text.split())) > room or len(textwrap.wrap(text, room)) > 2


def _broken(name: str, width: int) -> list[str]:
    """A name in pieces that fit, each but the last ending with a dot of it where it has one."""
    lines: list[str] = []
    while len(name) > width:
        cut = name.rfind(".", 0, width) + 1 or width
        lines.append(name[:cut])
        name = "  " + name[cut:]
    return [*lines, name]


def paragraph(text: str, width: int | None) -> list[str]:
    """A text in lines that fit, words whole.

    Example:
        >>> paragraph("one two", 4)
        ['one', '  two']
    """
    if width is None or len(text) <= width:
        return [text]
    indent = " " * (len(text) - len(text.lstrip()) + 2)
    return textwrap.wrap(
        text, max(width, len(indent) + 1), subsequent_indent=indent, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def markdown_lines(columns: Sequence[Column], cells: Sequence[Sequence[str]]) -> list[str]:
    """Rows as a table of Markdown.

    Example:
        >>> print(*markdown_lines((Column("layer"), Column("bits", "number")), [("a", "4")]))
        | layer | bits | | --- | ---: | | a | 4 |
    """
    rows = [
        [_escaped(column.heading) for column in columns],
        ["---" if column.side == "<" else "---:" for column in columns],
        *([_escaped(text) for text in row] for row in cells),
    ]
    return [f"| {' | '.join(row)} |" for row in rows]


def _escaped(text: str) -> str:
    for sign in "\\|*_<>`[]":
        text = text.replace(sign, "\\" + sign)
    return " ".join(text.split())
