"""What a line of the table of figures is, how its values are found, and those of cold layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.records import Row

Cell = list[Row]
Test = Callable[[Row, Cell], tuple[float, float] | None]  # (value, the least it should be)
Bound = Callable[[Row], float | None]


@dataclass(frozen=True)
class Figure:
    """A line of the table of figures.

    Attributes:
        title: what it asks for.
        section: whose rows it looks at.
        test: value and bound of a row of ours, or None where the figure does not speak of it.
        strict: whether the value must be above the bound, not at least as large.
    """

    title: str
    section: str
    test: Test
    strict: bool = False


def reaches(bound: Bound, value: str = "fraction") -> Test:
    """A value of the row against a bound that depends on its case; no bound: not meant."""

    def test(row: Row, cell: Cell) -> tuple[float, float] | None:
        least = bound(row)
        return None if least is None or value not in row.values else (row.values[value], least)

    return test


def beats(wanted: Callable[[Row], bool], bound: float, applies: Callable[[Row], bool]) -> Test:
    """How many times faster than the fastest of some others in the cell.

    One that was too slow to run counts with the time that it was expected to take.
    """

    def test(row: Row, cell: Cell) -> tuple[float, float] | None:
        others = [o.values.get("expected") or o.median for o in cell if wanted(o)]
        others = [seconds for seconds in others if seconds != float("inf")]
        if not others or not applies(row):
            return None
        return min(others) / row.median, bound

    return test


def named(name: str) -> Callable[[Row], bool]:
    """Whether a row is that candidate's."""
    return lambda row: row.candidate == name


def in_a_model_figures() -> list[Figure]:
    """Of layers in a row, float32 on one thread: what a token in a model pays."""
    shares = {"576x576": 0.80, "1536x576": 0.85, "4096x4096": 0.90}
    speedups = {"576x576": 2.0, "1536x576": 1.9, "4096x4096": 1.35}

    def is_meant(row: Row) -> bool:
        return row.case["dtype"] == "float32" and row.case["threads"] == 1

    def of_int8(least: dict[str, float]) -> Bound:
        def bound(row: Row) -> float | None:
            is_int8 = row.candidate == "ours w8a16" and is_meant(row)
            return least.get(row.case["shape"]) if is_int8 else None

        return bound

    def of_4_bits(least: float) -> Bound:
        is_4_bit = "ours w4".__eq__
        return lambda row: least if is_4_bit(row.candidate[:7]) and is_meant(row) else None

    section, row = "in_a_model", "in a row, cold, one token"
    return [
        Figure(
            f"int8 {row}: 0.80..0.90 of a plain read, by shape",
            section, reaches(of_int8(shares)),
        ),
        Figure(
            f"int8 {row}: 2.0, 1.9, 1.35 times the earlier build, by shape",
            section, reaches(of_int8(speedups), "of_earlier"),
        ),
        Figure(
            f"4 bits {row}: 2.0 times the earlier build",
            section, reaches(of_4_bits(2.0), "of_earlier"),
        ),
        Figure(f"4 bits {row}: 1.5 times int8", section, reaches(of_4_bits(1.5), "of_int8")),
    ]  # fmt: skip
