"""The one table of every report: to print, sort, filter, and take elsewhere."""

from __future__ import annotations

import math
import shutil
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from quantization.console.as_html import html_table
from quantization.console.as_text import markdown_lines, paragraph, text_lines
from quantization.console.columns import Column
from quantization.console.near import did_you_mean

__all__ = ["Table", "Tabular", "table_of"]

Row = TypeVar("Row")


class Tabular(Generic[Row]):
    """What has a table: whatever it is beside that, it is looked at in the same ways.

    A subclass says its :meth:`table`, and may be a sequence of other things than its rows.
    """

    @abstractmethod
    def table(self) -> Table[Row]:
        """All of it as a table."""

    def sort(self, column: str, reverse: bool = False) -> Table[Row]:
        """The rows in the order of a column; those without a value, or NaN, come last.

        Raises:
            KeyError: if there is no such column; the message says which there are.
        """
        table = self.table()
        of = table.column(column).of
        known = [row for row in table.rows if _is_there(of(row))]
        others = [row for row in table.rows if not _is_there(of(row))]
        ordered = sorted(known, key=lambda row: _key(of(row)), reverse=reverse)
        return replace(table, rows=(*ordered, *others))

    def filter(self, predicate: Callable[[Row], Any]) -> Table[Row]:
        """The rows for which a function of a row says yes."""
        table = self.table()
        return replace(table, rows=tuple(row for row in table.rows if predicate(row)))

    def to_dict(self) -> dict[str, list[Any]]:
        """Columns by their keys, with the plain values of all cells."""
        table = self.table()
        return {
            column.key: [column.of(row) for row in table.rows] for column in table.columns
        }  # fmt: skip

    def to_records(self) -> list[dict[str, Any]]:
        """Rows as dicts of plain values, by the columns' keys."""
        columns = self.to_dict()
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def to_pandas(self) -> Any:
        """A ``pandas.DataFrame`` of the same cells.

        Raises:
            ImportError: if pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "to_pandas needs pandas: pip install pandas; to_dict() needs nothing"
            ) from error
        return pandas.DataFrame(self.to_dict())

    def to_markdown(self) -> str:
        """The table as Markdown, title and notes around it."""
        table = self.table()
        columns, cells = table.texts()
        parts = [[f"**{table.title}**"] if table.title else [], markdown_lines(columns, cells)]
        parts += [[note] for note in table.notes]
        return "\n\n".join("\n".join(lines) for lines in parts if lines)

    def to_text(self, width: int | None = None) -> str:
        """Plain lines of at most ``width`` letters; None: as wide as they are."""
        table = self.table()
        lines = paragraph(table.title, width) if table.title else []
        columns, cells = table.texts()
        lines += text_lines(columns, cells, width) if cells else []
        for note in table.notes:
            lines += paragraph(note, width)
        return "\n".join(lines) if lines else "(no rows)"

    def to_html(self) -> str:
        """HTML without style sheets and scripts, with bars and histograms as inline SVG."""
        table = self.table()
        columns = table.shown()
        values = [[column.of(row) for column in columns] for row in table.rows]
        return html_table(columns, values, table.title, table.notes)

    def __str__(self) -> str:
        return self.to_text(shutil.get_terminal_size((80, 24)).columns)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return self.to_html()


@dataclass(frozen=True, repr=False)
class Table(Tabular[Row], Sequence[Row]):
    """Rows of typed columns.

    It prints as plain text as wide as the terminal (80 letters where there is none), without a
    name cut short; notebooks draw it, with bars and histograms. Columns without a value in any row
    are not shown, but stand in :meth:`to_dict` and its like.

    Attributes:
        columns: their keys, kinds and headings.
        rows: mappings, or objects with attributes by the keys of the columns.
        title: above it.
        notes: sentences below it.

    Example:
        >>> columns = [Column("layer", "name"), Column("nbytes", "bytes", "bytes")]
        >>> columns += [Column("done", "share")]
        >>> rows = [{"layer": "a", "nbytes": 1500, "done": 0.5}, {"layer": "b", "nbytes": 20}]
        >>> table = Table(columns, rows)
        >>> table
        layer   bytes   done
        a      1.5 kB  50.0%
        b        20 B
        >>> table.sort("nbytes")[0]["layer"], len(table.filter(lambda row: row["nbytes"] > 99))
        ('b', 1)
        >>> table.to_dict()
        {'layer': ['a', 'b'], 'nbytes': [1500, 20], 'done': [0.5, None]}
        >>> print(table.to_markdown())
        | layer | bytes | done |
        | --- | ---: | ---: |
        | a | 1.5 kB | 50.0% |
        | b | 20 B |  |
    """

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    title: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("columns", "rows", "notes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def table(self) -> Table[Row]:
        """Itself."""
        return self

    def column(self, key: str) -> Column:
        """A column by its key or its heading.

        Raises:
            KeyError: if there is none; the message says which there are.
        """
        for column in self.columns:
            if key in (column.key, column.heading):
                return column
        keys = [column.key for column in self.columns]
        raise KeyError(f"no column {key!r}; there are {', '.join(keys)}{did_you_mean(key, keys)}")

    def shown(self) -> list[Column]:
        """The columns that have a value in some row."""
        return [
            column
            for column in self.columns
            if any(column.of(row) not in (None, "") for row in self.rows)
        ]

    def texts(self) -> tuple[list[Column], list[list[str]]]:
        """The columns that are shown, and the cells of each row as words."""
        columns = self.shown()
        return columns, [[column.text(column.of(row)) for column in columns] for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, key: Any) -> Any:
        """A row by its place or by the text in its first column; a slice is a table again.

        Raises:
            KeyError: if no row has that name.
            IndexError: if there are not so many.
        """
        if isinstance(key, slice):
            return replace(self, rows=self.rows[key])
        if not isinstance(key, str):
            return self.rows[key]
        names = [self.columns[0].of(row) for row in self.rows]
        if key in names:
            return self.rows[names.index(key)]
        raise KeyError(f"no row {key!r}{did_you_mean(key, names)}")


def table_of(
    head: Sequence[str | Column], rows: Iterable[Sequence[Any]], **words: Any
) -> Table[Any]:
    """A table of rows that are sequences.

    Args:
        head: columns, or headings: of numbers, but for the first, which is a name.
        rows: as many cells in each.
        **words: title and notes.

    Example:
        >>> table_of(("layer", "bits"), [("a", 4), ("head", 16)])
        layer  bits
        a         4
        head     16
    """
    columns = [
        column if isinstance(column, Column) else Column(column, "number" if at else "name")
        for at, column in enumerate(head)
    ]
    keys = [column.key for column in columns]
    records: list[Mapping[str, Any]] = [dict(zip(keys, row, strict=True)) for row in rows]
    return Table(tuple(columns), tuple(records), **words)


def _is_there(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def _key(value: Any) -> Any:
    return value if isinstance(value, int | float | str) else str(value)
