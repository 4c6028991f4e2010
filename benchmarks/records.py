"""What a run leaves behind: one row for each candidate of each cell, ready for tables and JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.harness import Failure, Timing

Case = dict[str, Any]


@dataclass
class Row:
    """One candidate in one cell.

    Attributes:
        section: "linear", "quantize" and so on.
        case: what the candidates of a cell have in common: shape, tokens, dtype, threads.
        candidate: its name.
        kind: see :class:`benchmarks.harness.Candidate`.
        timing: None where there is none; then `reason` says why.
        values: figures beside the times: ratio, error, fraction and others.
        reason: why there is no timing, or what is worth knowing about it.
    """

    section: str
    case: Case
    candidate: str
    kind: str
    timing: Timing | None
    values: dict[str, Any] = field(default_factory=dict)
    reason: str = ""

    @classmethod
    def of(cls, section: str, case: Case, name: str, kind: str, result: Timing | Failure) -> Row:
        """A row from what the harness returned."""
        if isinstance(result, Failure):
            return cls(section, case, name, kind, None, {}, result.reason)
        return cls(section, case, name, kind, result)

    @property
    def median(self) -> float:
        """Seconds a call; infinite where there is no timing."""
        return self.timing.median if self.timing else float("inf")

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> Row:
        """The row that :meth:`to_dict` wrote, with three samples for all that there were."""
        entry = dict(entry)
        names = list(entry)
        case = {name: entry.pop(name) for name in names[1 : names.index("candidate")]}
        section, candidate, kind = (entry.pop(name) for name in ("section", "candidate", "kind"))
        timing = None
        if "median" in entry:
            samples = [entry.pop(name) for name in ("p10", "median", "p90")]
            entry.pop("samples")
            timing = Timing(samples, entry.pop("calls"))
        return cls(section, case, candidate, kind, timing, entry, entry.pop("reason", ""))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; times in seconds."""
        entry: dict[str, Any] = {"section": self.section, **self.case}
        entry |= {"candidate": self.candidate, "kind": self.kind}
        if self.timing:
            entry |= {"median": self.timing.median, "p10": self.timing.p10, "p90": self.timing.p90}
            entry |= {"samples": len(self.timing.samples), "calls": self.timing.calls}
        entry |= self.values
        return entry | ({"reason": self.reason} if self.reason else {})


def add_ratios(rows: list[Row], baseline: str, key: str = "ratio") -> None:
    """Give each timed row how many times faster it is than the row named `baseline`."""
    base = next((row for row in rows if row.candidate == baseline and row.timing), None)
    for row in rows:
        if base and row.timing:
            row.values[key] = base.median / row.median


@dataclass
class Results:
    """Everything a run measured.

    Attributes:
        rows: of all sections, in the order they were measured.
        absent: peers that are not there, and parts that did not run, with the reason.
        limits: the best of each limit, by name.
        machine: what ran it.
        command: how to run it again.
    """

    machine: dict[str, Any]
    command: str
    rows: list[Row] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> Results:
        """What a file of ``--json`` holds."""
        rows = [Row.from_dict(row) for row in entry["rows"]]
        return cls(entry["machine"], entry["command"], rows, entry["absent"], entry["limits"])

    def of(self, section: str) -> list[Row]:
        """Rows of one section."""
        return [row for row in self.rows if row.section == section]


def cells(rows: list[Row]) -> list[list[Row]]:
    """Rows grouped by section and case, in order."""
    grouped: dict[tuple, list[Row]] = {}
    for row in rows:
        grouped.setdefault((row.section, *row.case.items()), []).append(row)
    return list(grouped.values())
