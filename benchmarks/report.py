"""The results in Markdown: the machine, the summary, short tables, every cell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks import machine
from benchmarks.gauge import OURS
from benchmarks.peers import BASELINE
from benchmarks.records import Results, Row, cells
from benchmarks.summary import Verdict
from benchmarks.tables import grid, heading, markdown_table

Text = Callable[[Row, list[Row]], str]

LEGEND = """\
Medians; *ratio* is how many times faster than the first candidate of the cell (nn.Linear of the
same dtype, or the torch expression); *of limit* is the least time that the machine allows, measured
in the same run on the same threads, over the median; *error* is the norm of the difference to
float64 arithmetic on the float weights over the norm of that; *of its codes* the same against
float64 arithmetic on the int8 codes. W8A8 marks peers that quantize the activations as well.
Weights of the limit's bandwidth and of every candidate stand in the same cache level, which is
named: each sample follows an untimed call. *Into fresh pages* adds to the traffic the first touch
of the result's memory, which an allocator that gives large blocks back has to pay at each call."""


def markdown(
    results: Results, verdicts: list[Verdict], best_isa: str, every_cell: bool = True
) -> str:
    """The whole report, or without the table of each cell."""
    parts = ["# Benchmarks", machine.line(results.machine), f"`{results.command}`", LEGEND]
    parts += ["## Figures", summary_table(verdicts), *_missed(verdicts)]
    parts += _short_tables(results, best_isa)
    if results.absent:
        lines = [[name, reason] for name, reason in results.absent.items()]
        parts += ["## Not measured", markdown_table(["what", "why"], lines)]
    if every_cell:
        parts.append("## Every cell")
        for cell in cells(results.rows):
            parts += [f"**{cell[0].section}**: {heading(cell[0])}", markdown_table(*grid(cell))]
    return "\n\n".join(parts) + "\n"


def summary_table(verdicts: list[Verdict]) -> str:
    """Cells reached and asked for, a line a figure."""
    return markdown_table(*summary_grid(verdicts))


def summary_grid(verdicts: list[Verdict]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines of the summary."""
    lines = [
        [v.title, "reached" if not v.missed else "missed", f"{v.reached} of {v.cells}"]
        for v in verdicts
    ]
    return ["figure", "verdict", "cells"], lines


def _missed(verdicts: list[Verdict]) -> list[str]:
    parts = []
    for verdict in verdicts:
        if verdict.missed:
            entries = "\n".join(f"- {text}" for text in verdict.missed)
            parts.append(f"Missed, {verdict.title}:\n\n{entries}")
    return parts


# ---- a cell of the benchmark as a cell of a table ----------------------------------------------


def _short_tables(results: Results, best_isa: str) -> list[str]:
    parts = []
    linear = results.of("linear")
    for isa in dict.fromkeys((best_isa, "avx2")):
        table = _pivot(linear, OURS + isa, ("dtype", "threads", "shape"), "tokens", _linear_text)
        if table:
            parts += [f"## Linear, {isa}: times {BASELINE}, and of the limit", table]
    table = _pivot(linear, OURS + best_isa, ("dtype", "threads", "shape"), "tokens", _peer_text)
    if table:
        parts += ["## Linear: times the best peer with int8 weights and float activations", table]
    for section, lines, column in (
        ("backward", ("dtype", "threads", "shape"), "tokens"),
        ("quantize", ("way", "dtype", "mode", "granularity"), "threads"),
        ("pack", ("way", "layout", "threads"), "bits"),
        ("overhead", ("dtype",), "shape"),
    ):
        table = _pivot(results.of(section), OURS + best_isa, lines, column, _section_text)
        if table:
            parts += [f"## {section.capitalize()}: times the expression in torch, and of the limit"]
            parts += [table]
    if results.of("model"):
        parts += ["## The language model"]
        for cell in cells(results.of("model")):
            parts += [heading(cell[0]), markdown_table(*grid(cell))]
    return parts


def _pivot(rows: list[Row], ours: str, lines: tuple[str, ...], column: str, text: Text) -> str:
    """A line for each case without its `column`, a column for each value of that."""
    table: dict[tuple, dict[Any, str]] = {}
    columns: dict[Any, None] = {}
    for cell in cells(rows):
        mine = next((row for row in cell if row.candidate == ours and row.timing), None)
        if mine is None or column not in mine.case:
            continue
        columns[mine.case[column]] = None
        key = tuple(str(mine.case.get(name, "")) for name in lines)
        table.setdefault(key, {})[mine.case[column]] = text(mine, cell)
    if not table:
        return ""
    headings = [*lines, *(f"{column} {value}" for value in columns)]
    body = [[*key, *(values.get(c, "") for c in columns)] for key, values in table.items()]
    return markdown_table(headings, body)


def _linear_text(mine: Row, cell: list[Row]) -> str:
    return f"{_of(mine, 'ratio', '{:.2f}x')} ({_of(mine, 'fraction', '{:.2f}')})"


def _section_text(mine: Row, cell: list[Row]) -> str:
    fraction = _of(mine, "fraction", "{:.2f}")
    return _of(mine, "ratio", "{:.1f}x") + (f" ({fraction})" if fraction else "")


def _peer_text(mine: Row, cell: list[Row]) -> str:
    peers = [row for row in cell if row.kind == "W8A16" and row.timing]
    peer = min(peers, key=lambda row: row.median, default=None)
    return (
        f"{peer.median / mine.median:.2f}x {_SHORT.get(peer.candidate, peer.candidate)}"
        if peer
        else ""
    )


_SHORT = {"cast whole weight": "cast", "torch int8pack": "int8pack"}


def _of(row: Row, name: str, form: str) -> str:
    value = row.values.get(name)
    return "" if value is None else form.format(value)
