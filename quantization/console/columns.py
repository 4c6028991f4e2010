"""What a column of a table holds, and how a cell of it is written."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["KINDS", "Column", "shorter", "size", "spark"]

#: Kinds of columns, and on which side their cells stand.
KINDS = {
    "name": "<",  # a dotted name: never cut, rather on a line of its own
    "text": "<",  # words: wrapped where there is no room
    "number": ">",
    "bytes": ">",
    "share": ">",  # 0..1, with a bar where there is room for pictures
    "bar": ">",  # a number from 0 on, with a bar that is as long as the column's largest allows
    "histogram": "<",  # counts
}

_BINS = 8
_BLOCKS, _PLAIN = " ▁▂▃▄▅▆▇█", " .:-=+*%#"


@dataclass(frozen=True)
class Column:
    """A column of a :class:`quantization.console.table.Table`.

    Attributes:
        key: what a row calls it: a key of a mapping, or an attribute.
        kind: one of :data:`KINDS`.
        title: its heading; empty: the key.
        format: of numbers, as ``format`` has it; empty: four digits.
        help: what it is, in words.
        extra: it is left out first where a line has no room for it, and the table says so.

    Raises:
        ValueError: for another kind.

    Example:
        >>> Column("nbytes", "bytes", "bytes").text(113_246_208), Column("bits").text(None)
        ('113.2 MB', '')
    """

    key: str
    kind: str = "text"
    title: str = ""
    format: str = ""
    help: str = ""
    extra: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"a column is one of {', '.join(KINDS)}, not {self.kind!r}")

    @property
    def heading(self) -> str:
        """What stands above it."""
        return self.title or self.key

    @property
    def side(self) -> str:
        """``"<"`` or ``">"``: where its cells stand."""
        return KINDS[self.kind]

    def of(self, row: Any) -> Any:
        """The cell of a row; None where it has none."""
        return row.get(self.key) if isinstance(row, Mapping) else getattr(row, self.key, None)

    def text(self, value: Any) -> str:
        """A cell as words."""
        if value is None:
            return ""
        if self.kind == "bytes":
            return size(value)
        if self.kind == "histogram":
            return spark(value)
        if isinstance(value, float) or (isinstance(value, int) and self.format):
            if not math.isfinite(value):
                return str(float(value))
            return format(value, self.format or (".1%" if self.kind == "share" else ".4g"))
        if isinstance(value, tuple | list):
            return " x ".join(map(str, value))
        return " ".join(str(value).split()) if self.kind == "text" else str(value)


def shorter(name: str, most: int = 60) -> str:
    """A name for the middle of a sentence: a long one keeps both its ends.

    Example:
        >>> shorter("model.layers.11.mlp.down_proj", 20)
        'model.la...down_proj'
    """
    if len(name) <= most:
        return name
    start = (most - 3) // 2
    return f"{name[:start]}...{name[start + 3 - most :]}"


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


def spark(counts: Sequence[float], bins: int = _BINS) -> str:
    """Counts as a line of small bars, or of denser signs where output has no letters for them.

    Example:
        >>> len(spark([0, 1, 8]))
        3
    """
    signs = _BLOCKS if _can_write(_BLOCKS) else _PLAIN
    sums = binned(counts, bins)
    most = max(sums, default=0) or 1
    return "".join(signs[math.ceil(8 * max(total, 0) / most)] for total in sums)


def binned(counts: Sequence[float], bins: int) -> list[float]:
    """Counts in at most so many bins of neighbours.

    Example:
        >>> binned([1, 2, 3, 4], 2)
        [3, 7]
    """
    step = -(-len(counts) // bins) or 1
    return [sum(counts[start : start + step]) for start in range(0, len(counts), step)]


def _can_write(text: str) -> bool:
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
