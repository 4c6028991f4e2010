"""The results in Markdown: the machine, the summary, short tables, every cell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks import machine
from benchmarks.bench_packed import MAIN
from benchmarks.gauge import OURS
from benchmarks.peers import BASELINE
from benchmarks.peers_4bit import BITSANDBYTES
from benchmarks.records import Results, Row, cells
from benchmarks.summary import MANY, Verdict
from benchmarks.tables import grid, heading, markdown_table

Text = Callable[[Row, list[Row]], str]

LEGEND = """\
Medians; *ratio* is how many times faster than the first candidate of the cell (nn.Linear of the
same dtype, or the torch expression); *of limit* is the least time that the machine allows, measured
in the same run on the same threads, over the median; *error* is the norm of the difference to
float64 arithmetic on the float weights over the norm of that; *of its codes* the same against
float64 arithmetic on the stored codes. W8A8 marks peers that quantize the activations as well.
Weights of the limit's bandwidth and of every candidate stand in the same cache level, which is
named: each sample follows an untimed call. *Into fresh pages* adds to the traffic the first touch
of the result's memory, which an allocator that gives large blocks back has to pay at each call.
Layers in a row are held to a plain read of as many bytes as they have weights, and *vs earlier* to
the build that ``--against`` names, which took turns with this one in a process of its own."""


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
    parts = _whole_cells(results, {"in_a_model": "Layers in a row, cold, one token"})
    linear = results.of("linear")
    for isa in dict.fromkeys((best_isa, "avx2")):
        table = _pivot(linear, OURS + isa, ("dtype", "threads", "shape"), "tokens", _linear_text)
        if table:
            parts += [f"## Linear, {isa}: times {BASELINE}, and of the limit", table]
    table = _pivot(linear, OURS + best_isa, ("dtype", "threads", "shape"), "tokens", _peer_text)
    if table:
        parts += ["## Linear: times the best peer with int8 weights and float activations", table]
    parts += _packed_tables(results.of("packed"), best_isa)
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
    titles = {"files": "Files", "model": "The language model"}
    titles["packed_model"] = "The language model, by scheme"
    return parts + _whole_cells(results, titles)


def _whole_cells(results: Results, titles: dict[str, str]) -> list[str]:
    """Every row of sections, by their names, under a title each."""
    parts = []
    for section, title in titles.items():
        if results.of(section):
            parts += [f"## {title}"]
        for cell in cells(results.of(section)):
            parts += [heading(cell[0]), markdown_table(*grid(cell))]
    return parts


def _packed_tables(rows: list[Row], best_isa: str) -> list[str]:
    """The main schemes in every cell, and every scheme at one token and at many."""
    parts: list[str] = []
    for isa in dict.fromkeys((best_isa, "avx2")):
        form = f"{OURS}{isa} "
        lines = ("dtype", "threads", "shape")
        for scheme in MAIN:
            if table := _pivot(rows, form + scheme, lines, "tokens", _packed_text):
                title = f"times {BASELINE}, of the limit, times the best 4-bit peer"
                parts += [f"## Packed, {isa}, {scheme}: {title}", table]
        if table := _by_scheme(rows, form, _rate_text, lambda tokens: tokens == 1):
            parts += [f"## Packed, {isa}, M=1: Gweights/s, and of the limit", table]
        if table := _by_scheme(rows, form, _int8_text, lambda tokens: tokens >= MANY):
            parts += [f"## Packed, {isa}, M>={MANY}: times the int8 layer", table]
    return parts


def _by_scheme(rows: list[Row], form: str, text: Text, takes: Callable[[int], bool]) -> str:
    """A line for each scheme, a column for each cell whose number of tokens is taken."""
    table: dict[str, dict[str, str]] = {}
    columns: dict[str, None] = {}
    for cell in cells([row for row in rows if takes(row.case["tokens"])]):
        case = cell[0].case
        column = f"{case['shape']}, {case['dtype']}, {case['threads']} threads, M={case['tokens']}"
        columns[column] = None
        for row in cell:
            if row.candidate.startswith(form) and row.timing:
                scheme = row.candidate.removeprefix(form)
                table.setdefault(scheme, {})[column] = text(row, cell)
    if not table:
        return ""
    body = [[scheme, *(texts.get(c, "") for c in columns)] for scheme, texts in table.items()]
    return markdown_table(["scheme", *columns], body)


def _rate_text(mine: Row, cell: list[Row]) -> str:
    return f"{_of(mine, 'gweights', '{:.1f}')} ({_of(mine, 'fraction', '{:.2f}')})"


def _int8_text(mine: Row, cell: list[Row]) -> str:
    name = f"{mine.candidate.rsplit(' ', 1)[0]} int8"
    int8 = next((row for row in cell if row.candidate == name and row.timing), None)
    return f"{int8.median / mine.median:.2f}x" if int8 else ""


def _packed_text(mine: Row, cell: list[Row]) -> str:
    return f"{_linear_text(mine, cell)} {_best_of(mine, cell, 'W4A16')}".rstrip()


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
    return _best_of(mine, cell, "W8A16")


def _best_of(mine: Row, cell: list[Row], kind: str) -> str:
    """How many times the fastest peer of a kind, and which that is."""
    peers = [row for row in cell if row.kind == kind and row.timing]
    peer = min(peers, key=lambda row: row.median, default=None)
    return (
        f"{peer.median / mine.median:.2f}x {_SHORT.get(peer.candidate, peer.candidate)}"
        if peer
        else ""
    )


_SHORT = {
    "cast whole weight": "cast", "torch int8pack": "int8pack", "torch int4pack": "int4pack",
    "onnxruntime 4-bit": "onnxruntime", BITSANDBYTES: "bitsandbytes", "quanto qint4": "quanto",
}  # fmt: skip


def _of(row: Row, name: str, form: str) -> str:
    value = row.values.get(name)
    return "" if value is None else form.format(value)
