"""The linear map: every instruction set and every peer, turn by turn, against the limit."""

from __future__ import annotations

import torch

from benchmarks.gauge import OURS, Gauge
from benchmarks.peers import PEERS, Peer, installed, quiet
from benchmarks.race import Contender, Race, exact
from benchmarks.session import Session, Shape, any_isa, threads_of_torch
from benchmarks.tables import print_cells
from quantization import QWQALinearLayer


def run_linear(session: Session) -> None:
    """Measure the section, and print a table for each weight, dtype and number of threads."""
    settings = session.settings
    peers, absent = installed(PEERS)
    session.results.absent |= absent
    cells = len(settings.shapes) * len(settings.dtypes) * len(settings.threads)
    count = cells * len(settings.tokens)
    with session.progress("linear", count), any_isa(), quiet(), torch.no_grad():
        for shape in settings.shapes:
            for dtype in settings.dtypes:
                _run_weight(session, peers, shape, dtype)


def _run_weight(session: Session, peers: list[Peer], shape: Shape, dtype: str) -> None:
    settings = session.settings
    race = Race.of("linear", shape, dtype, max(settings.tokens))
    layer = QWQALinearLayer.from_float(race.problem.linear())
    of_codes = exact(race.inputs, layer.int8_weights) * layer.scales.double()
    shared: dict = {}
    for threads in settings.threads:
        gauge = Gauge(session.limits, layer, dtype, threads, settings.isas)
        ours = [Contender(OURS + isa, "ours", layer, isa, of_codes, gauge) for isa in settings.isas]
        with threads_of_torch(threads):
            found, failures = race.peers(peers, threads, shared)
            contenders = found[:1] + ours + found[1:]
            rows = race.run(session, contenders, failures, threads, settings.tokens)
        session.results.rows += rows
        print_cells(session.say, rows)
    if session.limits:
        session.limits.forget_buffers()
