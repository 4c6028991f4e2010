"""A table as HTML that needs neither style sheets nor scripts, which GitHub and others take out.

Bars and histograms are inline SVG in the colour of the text, so they are right on any background;
the number stands beside its bar, for where pictures are taken out too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from quantization.console.columns import Column, binned

__all__ = ["html_table", "svg"]

_BAR, _HIGH = 48, 12  # of a bar, in pixels
_BINS = 64


def html_table(
    columns: Sequence[Column],
    values: Sequence[Sequence[Any]],
    title: str = "",
    notes: Sequence[str] = (),
) -> str:
    """The rows of a table, with a caption and notes, all texts escaped.

    Args:
        columns: their kinds.
        values: cells in each row.
        title: above the table.
        notes: below it.

    Example:
        >>> "&lt;b&gt;" in html_table([Column("layer")], [["<b>"]])
        True
    """
    largest = [_largest(column, [row[i] for row in values]) for i, column in enumerate(columns)]
    head = "".join(
        f'<th align="{_side(column)}"{_help(column)}>{escape(column.heading)}</th>'
        for column in columns
    )
    body = "\n".join(
        "<tr>" + "".join(map(_cell, columns, row, largest)) + "</tr>" for row in values
    )
    said = f"<p><b>{escape(title)}</b></p>\n" if title else ""
    below = "".join(f"<p>{escape(note)}</p>\n" for note in notes)
    return (
        f"<div>\n{said}<table>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody>\n</table>\n{below}</div>"
    )


def _side(column: Column) -> str:
    return "left" if column.side == "<" else "right"


def _help(column: Column) -> str:
    return f' title="{escape(column.help)}"' if column.help else ""


def _largest(column: Column, values: Sequence[Any]) -> float:
    if column.kind == "share":
        return 1.0
    if column.kind != "bar":
        return 0.0
    return max((value for value in values if _is_number(value)), default=0.0)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _cell(column: Column, value: Any, largest: float) -> str:
    if column.kind == "histogram":
        return f'<td align="left">{"" if value is None else _histogram(value)}</td>'
    text = escape(column.text(value))
    if column.kind == "name":
        text = text.replace(".", ".<wbr>")  # where a long one may go on below
    picture = ""
    if column.kind in ("share", "bar") and _is_number(value):
        picture = "&nbsp;" + _bar(value / largest if largest else 0.0)
    whole = "" if column.kind in ("name", "text") else " nowrap"
    return f'<td align="{_side(column)}"{whole}>{text}{picture}</td>'


def svg(width: float, label: str, inside: str, height: float = _HIGH) -> str:
    """An inline picture of that size in pixels; ``label`` is what those hear who do not see it.

    Example:
        >>> svg(8, "nothing", "")[:29]
        '<svg xmlns="http://www.w3.org'
    """
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'role="img" aria-label="{label}">{inside}</svg>'
    )


def _bar(share: float) -> str:
    long = round(_BAR * min(max(share, 0.0), 1.0), 1)
    frame = f'<path d="M0 0h{_BAR}v{_HIGH}H0z" fill="currentColor" fill-opacity=".12"/>'
    full = f'<path d="M0 0h{long:g}v{_HIGH}H0z" fill="currentColor" fill-opacity=".6"/>'
    return svg(_BAR, f"{share:.0%}", frame + full)


def _histogram(counts: Sequence[float]) -> str:
    bins = binned(counts, _BINS)
    most = max(bins, default=0) or 1
    wide = max(1, _BAR * 2 // max(len(bins), 1))
    tops = [round(_HIGH * (1 - max(total, 0) / most), 1) for total in bins]
    line = "".join(f"V{top:g}h{wide}" for top in tops)
    path = f'<path d="M0 {_HIGH}{line}V{_HIGH}z" fill="currentColor" fill-opacity=".6"/>'
    return svg(wide * len(bins), f"{len(counts)} counts", path)
