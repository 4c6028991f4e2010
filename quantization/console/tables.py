"""Tables of texts in plain columns, and sizes for reading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["is_text", "size", "table_lines"]

_TEXTS = {"layer", "tensor", "what", "kernel", "codes"}


def is_text(heading: str) -> bool:
    """Whether a column of that heading holds words, which begin at the left, and not numbers."""
    return heading in _TEXTS


def table_lines(rows: Sequence[Sequence[Any]], indent: int = 0) -> list[str]:
    r"""Rows in columns, the first row the headings; words aligned left, numbers right.

    Args:
        rows: cells of any kind, as many in each row; no rows give no lines.
        indent: spaces before each line.

    Example:
        >>> print(*table_lines([("layer", "bits"), ("a", 4), ("head", 16)]), sep="\n")
        layer  bits
        a         4
        head     16
    """
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    sides = ["<" if is_text(heading) else ">" for heading in (texts[0] if texts else ())]
    lines = [
        "  ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)
        )
        for row in texts
    ]
    return [" " * indent + line.rstrip() for line in lines]


def size(nbytes: int) -> str:
    """Bytes for reading, in decimal units.

    Example:
        >>> size(999), size(113_246_208)
        ('999 B', '113.2 MB')
    """
    if nbytes < 1000:
        return f"{nbytes} B"
    for power, unit in enumerate(("kB", "MB", "GB"), start=1):
        if nbytes < 999.95 * 1000**power:
            return f"{nbytes / 1000**power:.1f} {unit}"
    return f"{nbytes / 1000**4:.1f} TB"
