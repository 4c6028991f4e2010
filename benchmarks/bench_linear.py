"""The linear map: every instruction set and every peer, turn by turn, against the limit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.gauge import OURS, Gauge
from benchmarks.harness import Candidate, Failure, take_turns
from benchmarks.peers import BASELINE, Map, Peer, Problem, attempt, installed, quiet
from benchmarks.records import Row, add_ratios
from benchmarks.session import Session, Shape, any_isa, shape_name, threads_of_torch
from benchmarks.tables import print_cells
from quantization import QWQALinearLayer, set_isa


@dataclass
class Contender:
    """A map in the race, with what is known of its speed so far."""

    name: str
    kind: str
    apply: Map
    isa: str = ""
    seconds: float = 0.0  # of its last cell
    tokens: int = 0  # of its last cell

    def expected(self, tokens: int) -> float:
        """Seconds of a call, from the last cell; a long call is taken to grow with the tokens."""
        return self.seconds * tokens / self.tokens if self.tokens else 0.0

    def candidate(self, x: torch.Tensor) -> Candidate:
        """Its turn on an input."""
        enter = partial(set_isa, self.isa) if self.isa else None
        return Candidate(self.name, self.kind, partial(self.apply, x), enter)


@dataclass
class Race:
    """All contenders for one weight and dtype, with the truth that they are held against."""

    problem: Problem
    layer: QWQALinearLayer
    inputs: torch.Tensor
    truth: torch.Tensor  # float64, of the float weight
    of_codes: torch.Tensor  # float64, of our codes and scales


def run_linear(session: Session) -> None:
    """Measure the section, and print a table for each weight, dtype and number of threads."""
    settings = session.settings
    peers, absent = installed()
    session.results.absent |= absent
    cells = len(settings.shapes) * len(settings.dtypes) * len(settings.threads)
    count = cells * len(settings.tokens)
    with session.progress("linear", count), any_isa(), quiet(), torch.no_grad():
        for shape in settings.shapes:
            for dtype in settings.dtypes:
                _run_weight(session, peers, shape, dtype)


def _run_weight(session: Session, peers: list[Peer], shape: Shape, dtype: str) -> None:
    race = _race(shape, dtype, max(session.settings.tokens))
    shared: dict[str, Contender | Failure] = {}
    for threads in session.settings.threads:
        with threads_of_torch(threads):
            contenders, failures = _contenders(session, peers, race, threads, shared)
            rows = list(_run_threads(session, race, contenders, failures, threads))
        session.results.rows += rows
        print_cells(session.say, rows)
    if session.limits:
        session.limits.forget_buffers()


def _race(shape: Shape, dtype: str, tokens: int) -> Race:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) / shape[1] ** 0.5
    problem = Problem(weight, dtype)
    inputs = torch.randn(tokens, shape[1], generator=generator).to(problem.torch_dtype)
    layer = QWQALinearLayer.from_float(problem.linear())
    wide = inputs.double()
    truth = wide @ weight.double().T
    of_codes = wide @ layer.int8_weights.double().T * layer.scales.double()
    return Race(problem, layer, inputs, truth, of_codes)


def _contenders(
    session: Session, peers: list[Peer], race: Race, threads: int, shared: dict
) -> tuple[list[Contender], dict[str, tuple[str, str]]]:
    """Ours and the peers' maps, and for the others (kind, reason)."""
    ours = [Contender(OURS + isa, "ours", race.layer, isa) for isa in session.settings.isas]
    failures: dict[str, tuple[str, str]] = {}
    found: list[Contender] = []
    for peer in peers:
        if (reason := peer.why_not(race.problem)) is not None:
            failures[peer.name] = (peer.kind, reason)
            continue
        key = peer.name if not peer.per_threads else f"{peer.name} {threads}"
        if key not in shared:
            shared[key] = attempt(peer, race.problem, threads)
        built = shared[key]
        if isinstance(built, Failure):
            failures[peer.name] = (peer.kind, built.reason)
        else:
            found.append(Contender(peer.name, peer.kind, built))
    return found[:1] + ours + found[1:], failures


def _run_threads(
    session: Session,
    race: Race,
    contenders: list[Contender],
    failures: dict[str, tuple[str, str]],
    threads: int,
) -> Iterator[Row]:
    """Rows of all cells of a weight on a number of threads; the limits are the best of them all."""
    settings, rows = session.settings, []
    gauge = Gauge(session.limits, race.layer, race.problem.dtype, threads, settings.isas)
    for tokens in settings.tokens:
        gauge.measure()
        rows += _cell(session, race, contenders, failures, threads, tokens)
        session.advance(f"{race.problem.dtype} M={tokens}")
    gauge.measure()
    for row in rows:
        gauge.judge(row)
        yield row


def _cell(
    session: Session,
    race: Race,
    contenders: list[Contender],
    failures: dict[str, tuple[str, str]],
    threads: int,
    tokens: int,
) -> list[Row]:
    case = {"shape": shape_name(race.problem.weight.shape), "dtype": race.problem.dtype}
    case |= {"threads": threads, "tokens": tokens}
    longest, x = session.settings.longest, race.inputs[:tokens]
    fit = [c for c in contenders if c.expected(tokens) <= longest or c.name == BASELINE]
    results = take_turns([c.candidate(x) for c in fit], session.settings.pace(threads))
    rows = []
    for contender in contenders:
        result = results.get(contender.name) or _too_slow(contender, tokens)
        row = Row.of("linear", case, contender.name, contender.kind, result)
        if row.timing:
            contender.seconds, contender.tokens = row.median, tokens
            _judge_output(row, contender, race, tokens)
        else:
            row.values["expected"] = contender.expected(tokens)
        rows.append(row)
    add_ratios(rows, BASELINE)
    return rows + [
        Row("linear", case, name, kind, None, {}, reason)
        for name, (kind, reason) in failures.items()
    ]


def _too_slow(contender: Contender, tokens: int) -> Failure:
    expected = contender.expected(tokens)
    return Failure(f"not run: about {expected:.0f} s a call, judging by {contender.tokens} tokens")


def _judge_output(row: Row, contender: Contender, race: Race, tokens: int) -> None:
    """Errors, and the rates that need no limit."""
    if contender.isa:
        set_isa(contender.isa)
    out = contender.apply(race.inputs[:tokens]).double()
    row.values["error"] = relative(out, race.truth[:tokens])
    if row.kind == "ours":
        row.values["rounding"] = relative(out, race.of_codes[:tokens])
    weights = race.problem.weight.numel()
    row.values["gweights"] = weights / row.median / 1e9
    row.values["gflops"] = 2 * tokens * weights / row.median / 1e9


def relative(out: torch.Tensor, truth: torch.Tensor) -> float:
    """Norm of the difference over the norm of the truth."""
    return float((out - truth).norm() / truth.norm())
