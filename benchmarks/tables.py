"""Rows of numbers for a reader: plain columns on the terminal, the same in Markdown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.records import Row, cells

Cell = Callable[[Row], str]


@dataclass(frozen=True)
class Column:
    """A heading, and how a row fills it; a column that no row fills is left out."""

    heading: str
    text: Cell


def seconds_text(seconds: float) -> str:
    """A time with three digits and its unit.

    Example:
        >>> seconds_text(0.00123), seconds_text(4.5e-7)
        ('1.23 ms', '450 ns')
    """
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "us"), (1e9, "ns")):
        if seconds * factor >= 0.9995 or unit == "ns":
            return f"{three_digits(seconds * factor)} {unit}"
    raise AssertionError


def three_digits(value: float) -> str:
    """Three digits, without an exponent.

    Example:
        >>> three_digits(1.234), three_digits(56.78), three_digits(1234.5)
        ('1.23', '56.8', '1234')
    """
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def _value(name: str, form: Callable[[float], str]) -> Cell:
    return lambda row: form(row.values[name]) if row.values.get(name) is not None else ""


def _spread(row: Row) -> str:
    if not row.timing:
        return ""
    return f"{seconds_text(row.timing.p10)} .. {seconds_text(row.timing.p90)}"


def _samples(row: Row) -> str:
    return str(len(row.timing.samples)) if row.timing else ""


def _fraction_of(row: Row) -> str:
    bound = row.values.get("bound")
    return f"{bound}, {row.values['level']}" if bound and "level" in row.values else bound or ""


COLUMNS = (
    Column("candidate", lambda row: row.candidate),
    Column("kind", lambda row: row.kind),
    Column("median", lambda row: seconds_text(row.median) if row.timing else "-"),
    Column("p10 .. p90", _spread),
    Column("samples", _samples),
    Column("a layer", _value("per_layer", seconds_text)),
    Column("ratio", _value("ratio", lambda v: f"{v:.2f}x")),
    Column("vs earlier", _value("of_earlier", lambda v: f"{v:.2f}x")),
    Column("vs int8", _value("of_int8", lambda v: f"{v:.2f}x")),
    Column("of limit", _value("fraction", lambda v: f"{v:.2f}")),
    Column("of FMA limit", _value("fraction_fma", lambda v: f"{v:.2f}")),
    Column("into fresh pages", _value("fraction_fresh", lambda v: f"{v:.2f}")),
    Column("bound by", _fraction_of),
    Column("Gweights/s", _value("gweights", three_digits)),
    Column("GFLOP/s", _value("gflops", three_digits)),
    Column("GB/s", _value("gbytes", three_digits)),
    Column("pages", _value("pages", str)),
    Column("resident MB", _value("resident_mb", three_digits)),
    Column("bytes", _value("bytes", lambda v: f"{v:,}")),
    Column("bits a weight", _value("bits_per_weight", lambda v: f"{v:.2f}")),
    Column("perplexity", _value("perplexity", three_digits)),
    Column("tokens/s", _value("tokens_per_second", three_digits)),
    Column("of zero-cost", _value("of_zero_cost", lambda v: f"{v:.2f}")),
    Column("vs same float", _value("of_float", lambda v: f"{v:.2f}x")),
    Column("error", _value("error", lambda v: f"{v:.1e}")),
    Column("of its codes", _value("rounding", lambda v: f"{v:.1e}")),
    Column("exact", _value("exact", lambda v: "yes" if v else "NO")),
    Column("", lambda row: row.reason),
)


def heading(row: Row) -> str:
    """What the rows of a cell have in common, in words."""
    parts = [f"{key} {value}" for key, value in row.case.items()]
    return ", ".join(parts)


def grid(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and texts of the columns that at least one row fills."""
    filled = [column for column in COLUMNS if any(column.text(row) for row in rows)]
    return [c.heading for c in filled], [[c.text(row) for c in filled] for row in rows]


def print_cells(say: Callable[[str], None], rows: list[Row]) -> None:
    """A table for each cell."""
    for cell in cells(rows):
        say(f"\n{cell[0].section}: {heading(cell[0])}")
        print_columns(say, *grid(cell))


def print_columns(say: Callable[[str], None], headings: list[str], lines: list[list[str]]) -> None:
    """Aligned columns: the first to the left, a last one without heading too."""
    widths = [max(map(len, column)) for column in zip(headings, *lines, strict=True)]
    for line in [headings, *lines]:
        texts = [
            text.ljust(width) if index == 0 or not headings[index] else text.rjust(width)
            for index, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        say("  " + "  ".join(texts).rstrip())


def markdown_table(headings: list[str], lines: list[list[str]]) -> str:
    """The same in Markdown."""
    rule = ["---"] + ["---:" for _ in headings[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in [headings, rule, *lines])
