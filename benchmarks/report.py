"""The results in Markdown: the machine, the summary, a compact table for a README, every cell."""

from __future__ import annotations

from benchmarks import machine
from benchmarks.gauge import OURS
from benchmarks.peers import BASELINE
from benchmarks.records import Results, Row, cells
from benchmarks.summary import Verdict
from benchmarks.tables import grid, heading, markdown_table, seconds_text

LEGEND = """\
Medians; *ratio* is how many times faster than the first candidate of the cell (nn.Linear of the
same dtype, or the torch expression); *of limit* is the least time that the machine allows, measured
in the same run on the same threads, over the median; *error* is the norm of the difference to
float64 arithmetic on the float weights over the norm of that; *of its codes* the same against
float64 arithmetic on the int8 codes. W8A8 marks peers that quantize the activations as well.
Weights of the limit's bandwidth and of every candidate stand in the same cache level, which is
named: each sample follows an untimed call. *Into fresh pages* adds to the traffic the first touch
of the result's memory, which an allocator that gives large blocks back has to pay at each call."""


def markdown(results: Results, verdicts: list[Verdict], best_isa: str) -> str:
    """The whole report."""
    parts = ["# Benchmarks", machine.line(results.machine), f"`{results.command}`", LEGEND]
    parts += ["## Figures", summary_table(verdicts), *_missed(verdicts)]
    if results.of("linear"):
        parts += ["## Linear, in short", compact(results.of("linear"), OURS + best_isa)]
    if results.absent:
        lines = [[name, reason] for name, reason in results.absent.items()]
        parts += ["## Not measured", markdown_table(["what", "why"], lines)]
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


def compact(rows: list[Row], ours: str) -> str:
    """One line a cell: ours, the limit, nn.Linear, and the best peer with float activations."""
    lines = []
    for cell in cells(rows):
        mine = next((row for row in cell if row.candidate == ours and row.timing), None)
        if mine is None:
            continue
        case = mine.case
        peers = [row for row in cell if row.kind == "W8A16" and row.timing]
        peer = min(peers, key=lambda row: row.median, default=None)
        lines.append(
            [
                case["shape"], str(case["dtype"]), str(case["threads"]), str(case["tokens"]),
                seconds_text(mine.median), _of(mine, "fraction", "{:.2f}"),
                _of(mine, "bound", "{}"), _of(mine, "ratio", "{:.1f}x"),
                f"{peer.median / mine.median:.1f}x {peer.candidate}" if peer else "",
                _of(mine, "error", "{:.1e}"),
            ]
        )  # fmt: skip
    headings = [
        "weight", "dtype", "threads", "M", "ours", "of limit", "bound by", f"vs {BASELINE}",
        "vs best W8A16 peer", "error",
    ]  # fmt: skip
    return markdown_table(headings, lines)


def _of(row: Row, name: str, form: str) -> str:
    value = row.values.get(name)
    return "" if value is None else form.format(value)
