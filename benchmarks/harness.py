"""Turn by turn: every candidate runs once a round, so that what disturbs one disturbs all.

A sample is one call, or as many as make a millisecond; before it comes an untimed call, so that
weights stand in the cache level that can hold them, for every candidate alike.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

MIN_ROUNDS, SLOW_ROUNDS = 3, 2
WARM_BELOW = 0.1  # seconds; a longer call is its own warm-up


@dataclass
class Candidate:
    """Something to be timed.

    Attributes:
        name: as tables show it.
        kind: "ours", "float", "W8A16", "W4A16", "W8A8" or "expression": what it may be compared
            with.
        call: what is timed.
        enter: runs before each turn, untimed (to choose an instruction set).
    """

    name: str
    kind: str
    call: Callable[[], object]
    enter: Callable[[], object] | None = None


@dataclass
class Timing:
    """Seconds a call, one number a sample.

    Attributes:
        samples: in the order they were taken.
        calls: calls in one sample.
    """

    samples: list[float] = field(default_factory=list)
    calls: int = 1

    def quantile(self, share: float) -> float:
        """The sample below which `share` of them lie, interpolated."""
        return float(np.quantile(self.samples, share))

    @property
    def median(self) -> float:
        """Half of the samples lie below."""
        return self.quantile(0.5)

    @property
    def p10(self) -> float:
        """A tenth of the samples lies below."""
        return self.quantile(0.1)

    @property
    def p90(self) -> float:
        """Nine tenths of the samples lie below."""
        return self.quantile(0.9)


@dataclass(frozen=True)
class Failure:
    """Why there is no timing."""

    reason: str


@dataclass(frozen=True)
class Pace:
    """How much time a cell may take.

    Attributes:
        rounds: at most so many samples of a candidate.
        seconds: that all candidates of a cell should stay within; each has an equal share.
        sample: seconds that one sample lasts at least, in calls.
        slow: a candidate whose call takes longer gets two samples only.
        settle: seconds of rest before a turn, in which another's threads stop spinning.
    """

    rounds: int = 15
    seconds: float = 2.0
    sample: float = 1e-3
    slow: float = 1.0
    settle: float = 0.0


def take_turns(candidates: list[Candidate], pace: Pace) -> dict[str, Timing | Failure]:
    """Time the candidates, one sample each a round, the first of a round the last of the next.

    A long call gets fewer samples than a short one, spread evenly over the rounds. A candidate that
    raises is reported with its error; the others go on.
    """
    results: dict[str, Timing | Failure] = {}
    wanted: dict[str, int] = {}
    running: list[Candidate] = []
    with _no_collections():
        for candidate in candidates:
            try:
                results[candidate.name], cost = _try_out(candidate, pace)
                wanted[candidate.name] = _samples(cost, pace, len(candidates))
                running.append(candidate)
            except Exception as error:  # a peer may raise anything
                results[candidate.name] = Failure(first_line(error))
        rounds = max(wanted.values(), default=0)
        for index in range(rounds):
            shift = index % len(running)
            for candidate in running[shift:] + running[:shift]:
                timing, share = results[candidate.name], wanted[candidate.name]
                is_due = (index + 1) * share // rounds > index * share // rounds
                if is_due and len(timing.samples) < share:
                    _sample(candidate, timing, pace)
    return results


def _try_out(candidate: Candidate, pace: Pace) -> tuple[Timing, float]:
    """A timing with its number of calls, and the seconds of one turn.

    It has a sample already where a call is long: the second one, or the first if that was slow.
    """
    _begin(candidate, pace)
    once = _time(candidate.call, 1)
    if once > pace.slow:
        return Timing([once]), once
    once, calls = _time(candidate.call, 1), 1
    if once > WARM_BELOW:
        return Timing([once]), once
    while once * calls < pace.sample:
        calls = max(calls + 1, math.ceil(pace.sample / max(once, 1e-9)))
        once = _time(candidate.call, calls)
    return Timing(calls=calls), once * (calls + 1) + pace.settle


def _samples(cost: float, pace: Pace, candidates: int) -> int:
    """How many samples of a turn's cost fit into a candidate's share of the seconds."""
    if cost > pace.slow:
        return min(SLOW_ROUNDS, pace.rounds)
    fitting = int(pace.seconds / candidates / max(cost, 1e-9))
    return min(pace.rounds, max(MIN_ROUNDS, fitting))


def _sample(candidate: Candidate, timing: Timing, pace: Pace) -> None:
    _begin(candidate, pace)
    if not timing.samples or timing.samples[-1] < WARM_BELOW:
        candidate.call()
    timing.samples.append(_time(candidate.call, timing.calls))


def _begin(candidate: Candidate, pace: Pace) -> None:
    if candidate.enter is not None:
        candidate.enter()
    if pace.settle:
        time.sleep(pace.settle)


def _time(call: Callable[[], object], calls: int) -> float:
    """Seconds a call."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def first_line(error: BaseException) -> str:
    """Kind and first line of an error, for a table."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


@contextmanager
def _no_collections() -> Iterator[None]:
    """Keep the garbage collector out of the samples."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
