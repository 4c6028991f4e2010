"""Layers in a row, as in a model: one token, and weights that no cache holds from call to call.

Each number of this section is taken in a process of its own, by turns: that of this build, and one
of the commit that it is held against (``--against``).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks import builds, machine
from benchmarks.harness import Failure, Timing
from benchmarks.peers import BASELINE
from benchmarks.records import Row, add_ratios
from benchmarks.session import COLD_WEIGHTS, SETTLE, Session, Shape, shape_name
from benchmarks.tables import print_cells

SCHEMES = ("w8a16", "w4g32", "w4g64a", "w4g128")
CACHES = 4  # times the last cache, at least
PROGRAM = Path(__file__).with_name("cold_rows.py")


class WorkerError(Exception):
    """The process of a build ended, or said something else than numbers."""


class Worker:
    """A process that holds a row of layers of one build, and times it on request."""

    def __init__(self, root: Path) -> None:
        env = os.environ | {"PYTHONPATH": str(root), "PYTHONSAFEPATH": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(PROGRAM)], env=env, cwd=root, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to one request of :mod:`benchmarks.cold_rows`."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        except (OSError, ValueError) as error:
            raise WorkerError(f"no answer from the build: {error}") from error
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait()


@dataclass
class Runner:
    """One candidate: a scheme in one of the builds."""

    name: str
    kind: str
    scheme: str
    worker: Worker


def run_in_a_model(session: Session) -> None:
    """Measure the section, and print a table for each shape, dtype and number of threads."""
    settings = session.settings
    cells = [
        (shape, dtype, threads)
        for shape in settings.cold_shapes
        for dtype in settings.dtypes
        for threads in settings.threads
    ]
    with session.progress("in_a_model", len(cells)), contextlib.ExitStack() as stack:
        roots = _builds(session)
        workers = {name: stack.enter_context(Worker(root)) for name, root in roots.items()}
        for shape, dtype, threads in cells:
            _run_cell(session, _runners(workers), shape, dtype, threads)
            for worker in workers.values():
                worker.ask(forget=True)


def _builds(session: Session) -> dict[str, Path]:
    """By what follows a candidate's name: where its build lies."""
    roots, against = {"": builds.ROOT}, session.settings.against
    if against:
        try:
            roots[f" at {against}"] = builds.build(against)
        except builds.BuildError as error:
            session.results.absent[f"build of {against}"] = str(error)
    return roots


def _runners(workers: dict[str, Worker]) -> list[Runner]:
    """The float layer of this build, then each scheme of each."""
    return [Runner(BASELINE, "float", "float", workers[""])] + [
        Runner(f"ours {scheme}{suffix}", "earlier" if suffix else "ours", scheme, worker)
        for scheme in SCHEMES
        for suffix, worker in workers.items()
    ]


def _run_cell(
    session: Session, runners: list[Runner], shape: Shape, dtype: str, threads: int
) -> None:
    count = count_of(session.settings.cold_weights, shape)
    case = {"shape": shape_name(shape), "dtype": dtype, "threads": threads, "layers": count}
    row = {"shape": shape, "count": count, "dtype": dtype, "threads": threads}
    told, results = _take_turns(session, runners, row | {"isa": session.settings.isas[0]})
    rows = [Row.of("in_a_model", case, r.name, r.kind, results[r.name]) for r in runners]
    add_ratios(rows, BASELINE)
    medians = {row.candidate: row.median for row in rows if row.timing}
    for found in rows:
        if found.timing:
            _judge(session, found, told[found.candidate], medians)
    session.results.rows += rows
    print_cells(session.say, rows)
    session.advance(f"{case['shape']} {dtype}")


def count_of(weights: int, shape: Shape) -> int:
    """Layers of a shape: so many weights, and more than caches hold."""
    largest = max(machine.caches().values(), default=0)
    wanted = max(weights, CACHES * largest) if weights >= COLD_WEIGHTS else weights
    return max(4, math.ceil(wanted / (shape[0] * shape[1])))


def _take_turns(
    session: Session, runners: list[Runner], row: dict[str, Any]
) -> tuple[dict[str, dict[str, Any]], dict[str, Timing | Failure]]:
    """What each row is, and its times: one pass each a round; the limit's turn comes last."""
    told: dict[str, dict[str, Any]] = {}
    results: dict[str, Timing | Failure] = {}
    for runner in runners:
        built = runner.worker.ask(build=row | {"scheme": runner.scheme}, name=runner.name)
        told[runner.name] = built
        results[runner.name] = Failure(built["error"]) if "error" in built else Timing()
    running = [runner for runner in runners if isinstance(results[runner.name], Timing)]
    for index in range(session.settings.rounds + 1):
        for runner in running:
            if row["threads"] > 1:
                time.sleep(SETTLE)
            seconds = runner.worker.ask(time=runner.name)["seconds"]
            if index:  # the first round warms up
                results[runner.name].samples.append(seconds)  # type: ignore[union-attr]
        if session.limits:
            session.limits.read(told[runners[0].name]["weights"], row["threads"])
    return told, results


def _judge(session: Session, row: Row, told: dict[str, Any], medians: dict[str, float]) -> None:
    """Rates, the share of a plain read, and times the earlier build."""
    values, case = row.values, row.case
    values["gweights"] = told["weights"] / row.median / 1e9
    values["gbytes"] = told["bytes"] / row.median / 1e9
    values["per_layer"] = row.median / case["layers"]
    if told["pages"]:
        values["pages"] = told["pages"]
    if session.limits:
        limit = session.limits.read(told["weights"], case["threads"])
        values["fraction"] = values["gbytes"] * 1e9 / limit
    earlier = medians.get(f"{row.candidate} at {session.settings.against}")
    if earlier:
        values["of_earlier"] = earlier / row.median
    if row.kind == "ours" and "ours w8a16" in medians:
        values["of_int8"] = medians["ours w8a16"] / row.median
