"""Maps of one weight against each other: ours and the peers', turn by turn, beside the truth."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.gauge import Gauge
from benchmarks.harness import Candidate, Failure, take_turns
from benchmarks.peers import BASELINE, Map, Peer, Problem, attempt
from benchmarks.records import Row, add_ratios
from benchmarks.session import Session, Shape, shape_name
from quantization import set_isa

CROWD = 16  # candidates that the seconds of a cell are meant for; more of them get more
PIECE = 4096  # rows that are widened to float64 at a time


@dataclass
class Contender:
    """A map in the race, with what is known of its speed so far.

    Attributes:
        name: as tables show it.
        kind: see :class:`benchmarks.harness.Candidate`.
        apply: the map.
        isa: that is forced before each turn; empty: none.
        of_codes: float64 outputs of our codes and scales for all inputs, or None.
        gauge: knows the limit of its weight; None: it is held to no limit.
        cells: numbers of tokens that it runs at; None: all.
        note: what a reader should know of it.
        seconds: of its last cell.
        tokens: of its last cell.
    """

    name: str
    kind: str
    apply: Map
    isa: str = ""
    of_codes: torch.Tensor | None = None
    gauge: Gauge | None = None
    cells: tuple[int, ...] | None = None
    note: str = ""
    seconds: float = 0.0
    tokens: int = 0

    def expected(self, tokens: int) -> float:
        """Seconds of a call, from the last cell; a long call is taken to grow with the tokens."""
        return self.seconds * tokens / self.tokens if self.tokens else 0.0

    def candidate(self, x: torch.Tensor) -> Candidate:
        """Its turn on an input."""
        enter = partial(set_isa, self.isa) if self.isa else None
        return Candidate(self.name, self.kind, partial(self.apply, x), enter)


Failures = dict[str, tuple[str, str]]  # by name of a peer: (kind, reason)


@dataclass
class Race:
    """One weight and dtype, with the inputs and what a perfect map makes of them.

    Attributes:
        section: that its rows belong to.
        problem: the weight.
        inputs: of the dtype, one row for each token of the longest cell.
        truth: float64, of the float weight.
    """

    section: str
    problem: Problem
    inputs: torch.Tensor
    truth: torch.Tensor

    @classmethod
    def of(cls, section: str, shape: Shape, dtype: str, tokens: int) -> Race:
        """A race over noise, the same for everyone."""
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(shape, generator=generator) / shape[1] ** 0.5
        problem = Problem(weight, dtype)
        inputs = torch.randn(tokens, shape[1], generator=generator).to(problem.torch_dtype)
        return cls(section, problem, inputs, exact(inputs, weight))

    def peers(
        self, peers: list[Peer], threads: int, shared: dict[str, Map | Failure]
    ) -> tuple[list[Contender], Failures]:
        """The peers' maps, built once unless they fix the threads, and why the others have none."""
        found: list[Contender] = []
        failures: Failures = {}
        for peer in peers:
            if (reason := peer.why_not(self.problem)) is not None:
                failures[peer.name] = (peer.kind, reason)
                continue
            key = peer.name if not peer.per_threads else f"{peer.name} {threads}"
            if key not in shared:
                shared[key] = attempt(peer, self.problem, threads)
            built = shared[key]
            if isinstance(built, Failure):
                failures[peer.name] = (peer.kind, built.reason)
            else:
                note = peer.note(self.problem)
                found.append(Contender(peer.name, peer.kind, built, note=note))
        return found, failures

    def run(
        self,
        session: Session,
        contenders: list[Contender],
        failures: Failures,
        threads: int,
        cells: tuple[int, ...],
    ) -> list[Row]:
        """Rows of all cells on a number of threads; the limits are the best of them all."""
        rows: list[Row] = []
        for tokens in cells:
            due = [c for c in contenders if c.cells is None or tokens in c.cells]
            _measure(due)
            rows += self._cell(session, due, failures, threads, tokens)
            session.advance(f"{self.problem.dtype} M={tokens}")
        _measure(contenders)
        gauges = {c.name: c.gauge for c in contenders if c.gauge}
        for row in rows:
            if row.candidate in gauges:
                gauges[row.candidate].judge(row)
        return rows

    def _cell(
        self,
        session: Session,
        contenders: list[Contender],
        failures: Failures,
        threads: int,
        tokens: int,
    ) -> list[Row]:
        case = {"shape": shape_name(self.problem.weight.shape), "dtype": self.problem.dtype}
        case |= {"threads": threads, "tokens": tokens}
        longest, x = session.settings.longest, self.inputs[:tokens]
        fit = [c for c in contenders if c.expected(tokens) <= longest or c.name == BASELINE]
        pace = session.settings.pace(threads, share=max(1.0, len(fit) / CROWD))
        results = take_turns([c.candidate(x) for c in fit], pace)
        rows = []
        for contender in contenders:
            result = results.get(contender.name) or _too_slow(contender, tokens)
            row = Row.of(self.section, case, contender.name, contender.kind, result)
            if row.timing:
                contender.seconds, contender.tokens = row.median, tokens
                row.reason = contender.note
                self._judge_output(row, contender, tokens)
            else:
                row.values["expected"] = contender.expected(tokens)
            rows.append(row)
        add_ratios(rows, BASELINE)
        return rows + [
            Row(self.section, case, name, kind, None, {}, reason)
            for name, (kind, reason) in failures.items()
        ]

    def _judge_output(self, row: Row, contender: Contender, tokens: int) -> None:
        """Errors, and the rates that need no limit."""
        if contender.isa:
            set_isa(contender.isa)
        out = contender.apply(self.inputs[:tokens]).double()
        row.values["error"] = relative(out, self.truth[:tokens])
        if contender.of_codes is not None:
            row.values["rounding"] = relative(out, contender.of_codes[:tokens])
        weights = self.problem.weight.numel()
        row.values["gweights"] = weights / row.median / 1e9
        row.values["gflops"] = 2 * tokens * weights / row.median / 1e9


def exact(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``inputs @ weight.T`` in float64, some rows of the weight at a time."""
    wide = inputs.double()
    return torch.cat([wide @ rows.double().T for rows in weight.split(PIECE)], 1)


def relative(out: torch.Tensor, truth: torch.Tensor) -> float:
    """Norm of the difference over the norm of the truth."""
    return float((out - truth).norm() / truth.norm())


def _measure(contenders: list[Contender]) -> None:
    """Sharpen what is known of each weight, once."""
    for gauge in {id(c.gauge): c.gauge for c in contenders if c.gauge}.values():
        gauge.measure()


def _too_slow(contender: Contender, tokens: int) -> Failure:
    expected = contender.expected(tokens)
    return Failure(f"not run: about {expected:.0f} s a call, judging by {contender.tokens} tokens")
