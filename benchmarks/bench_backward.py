"""The gradient of the input, through autograd, as training a low-rank adapter asks for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.gauge import OURS, Gauge
from benchmarks.harness import Candidate, Failure, first_line, take_turns
from benchmarks.peers import BASELINE, PEERS, Map, Peer, Problem, attempt, installed, quiet
from benchmarks.race import relative
from benchmarks.records import Row, add_ratios
from benchmarks.session import Session, Shape, any_isa, shape_name, threads_of_torch
from benchmarks.tables import print_cells
from quantization import QWQALinearLayer, set_isa

PASSING = (BASELINE, "cast whole weight", "torchao", "quanto", "bitsandbytes")


def run_backward(session: Session) -> None:
    """Measure the section, and print a table for each weight, dtype and number of threads."""
    settings = session.settings
    cells = len(settings.shapes) * len(settings.dtypes) * len(settings.threads)
    peers = [peer for peer in installed(PEERS)[0] if peer.name in PASSING]
    count = cells * len(settings.backward_tokens)
    with session.progress("backward", count), any_isa(), quiet(), torch.enable_grad():
        for shape in settings.shapes:
            for dtype in settings.dtypes:
                _run_weight(session, peers, shape, dtype)


def _run_weight(session: Session, peers: list[Peer], shape: Shape, dtype: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) / shape[1] ** 0.5
    problem = Problem(weight, dtype)
    layer = QWQALinearLayer.from_float(problem.linear())
    maps = {p.name: (p.kind, attempt(p, problem, 1)) for p in peers if not p.why_not(problem)}
    for threads in session.settings.threads:
        gauge = Gauge(
            session.limits, layer, dtype, threads, session.settings.isas, is_backward=True
        )
        rows: list[Row] = []
        with threads_of_torch(threads):
            for tokens in session.settings.backward_tokens:
                gauge.measure()
                rows += _cell(session, problem, layer, maps, threads, tokens)
                session.advance(f"{dtype} M={tokens}")
            gauge.measure()
        for row in rows:
            gauge.judge(row)
        session.results.rows += rows
        print_cells(session.say, rows)


def _cell(
    session: Session,
    problem: Problem,
    layer: QWQALinearLayer,
    maps: dict[str, tuple[str, Map | Failure]],
    threads: int,
    tokens: int,
) -> list[Row]:
    out_features, in_features = problem.weight.shape
    generator = torch.Generator().manual_seed(tokens)
    grad = torch.randn(tokens, out_features, generator=generator).to(problem.torch_dtype)
    truth = grad.double() @ problem.weight.double()
    case = {"shape": shape_name((out_features, in_features)), "dtype": problem.dtype}
    case |= {"threads": threads, "tokens": tokens}
    candidates, failures = [], []
    for name, (kind, apply) in maps.items():
        try:
            if isinstance(apply, Failure):
                raise RuntimeError(apply.reason)
            candidates.append(Candidate(name, kind, _gradient(apply, problem, grad)))
        except Exception as error:  # a peer may raise anything
            failures.append(Row.of("backward", case, name, kind, Failure(first_line(error))))
    call = _gradient(layer, problem, grad)
    ours = [
        Candidate(OURS + isa, "ours", call, partial(set_isa, isa)) for isa in session.settings.isas
    ]
    candidates[1:1] = ours
    results = take_turns(candidates, session.settings.pace(threads))
    rows = []
    for candidate in candidates:
        row = Row.of("backward", case, candidate.name, candidate.kind, results[candidate.name])
        if row.timing:
            if candidate.enter:
                candidate.enter()
            row.values["error"] = relative(candidate.call()[0].double(), truth)
            row.values["gflops"] = 2 * tokens * problem.weight.numel() / row.median / 1e9
        rows.append(row)
    add_ratios(rows, BASELINE)
    return rows + failures


def _gradient(apply: Callable, problem: Problem, grad: torch.Tensor) -> Callable[[], tuple]:
    """The backward pass alone: the graph is made once, here."""
    x = torch.ones(grad.shape[0], problem.weight.shape[1], dtype=problem.torch_dtype)
    x.requires_grad_()
    y = apply(x)
    return partial(torch.autograd.grad, y, x, grad, retain_graph=True)
