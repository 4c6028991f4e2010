"""What the sections that stream a matrix through a kernel share: the cell, and its limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.formulas import Stream, stream_limit
from benchmarks.harness import Candidate, take_turns
from benchmarks.limits import Limits
from benchmarks.records import Case, Row, add_ratios
from benchmarks.session import Session, threads_of_torch
from benchmarks.tables import print_cells


@dataclass
class Trip:
    """One cell: a matrix goes through every candidate.

    Attributes:
        section: of the rows.
        case: of the rows.
        candidates: who does it.
        baseline: name of the candidate that ratios refer to.
        stream: bytes an element.
        elements: of the matrix.
        threads: that take part.
        is_right: whether a result of ours is what it should be.
    """

    section: str
    case: Case
    candidates: list[Candidate]
    baseline: str
    stream: Stream
    elements: int
    threads: int
    is_right: Callable[[object], bool]


def run_trip(session: Session, trip: Trip) -> None:
    """Measure a cell, its limit before and after it, and print its table."""
    limits = session.limits
    with threads_of_torch(trip.threads):
        _measure(limits, trip)
        results = take_turns(trip.candidates, session.settings.pace(trip.threads))
        limit, fresh = _measure(limits, trip)
        rows = [
            Row.of(trip.section, trip.case, c.name, c.kind, results[c.name])
            for c in trip.candidates
        ]
        add_ratios(rows, trip.baseline)
        for row, candidate in zip(rows, trip.candidates, strict=True):
            _judge(row, candidate, trip, limit, fresh)
    session.results.rows += rows
    print_cells(session.say, rows)
    session.advance(" ".join(map(str, trip.case.values())))


def _measure(limits: Limits | None, trip: Trip) -> tuple[float, float]:
    """Seconds of the traffic alone, and with the first touch of the pages that are written."""
    if limits is None:
        return 0.0, 0.0
    read = int(trip.elements * trip.stream.read)
    write = int(trip.elements * trip.stream.write)
    mixed = limits.mix_seconds(read, write, trip.threads)
    again = read / limits.read(read, trip.threads) if trip.stream.passes > 1 else 0.0
    limit = stream_limit(trip.stream.passes, again, mixed)
    return limit, limit + limits.touch_seconds(write, trip.threads)


def _judge(row: Row, candidate: Candidate, trip: Trip, limit: float, fresh: float) -> None:
    if not row.timing:
        return
    moved = trip.stream.traffic(trip.elements, write_allocate=False)
    row.values["gweights"] = trip.elements / row.median / 1e9
    row.values["gbytes"] = moved / row.median / 1e9
    if row.kind != "ours":
        return
    if limit > 0:
        row.values |= {"limit": limit, "fraction": limit / row.median, "bound": "memory"}
        row.values["fraction_fresh"] = fresh / row.median
    if candidate.enter is not None:
        candidate.enter()
    row.values["exact"] = trip.is_right(candidate.call())
