"""Packed weights: every width and grid beside nn.Linear, our int8 layer and the 4-bit peers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.gauge import OURS, Gauge
from benchmarks.peers import Peer, installed, quiet
from benchmarks.peers_4bit import FOUR_BIT_PEERS
from benchmarks.race import Contender, Race, exact
from benchmarks.session import Session, Settings, Shape, any_isa, threads_of_torch
from benchmarks.tables import print_cells
from quantization import PackedLinearLayer, QWQALinearLayer

INT8 = "int8"
MAIN = ("w4g128", "w4g64a", "nf4g64")  # that run in every cell
WIDTHS = (
    "w1g64a", "binaryg64", "w2g64", "w3g64", "w4g64", "w5g64", "w6g64", "w7g64", "ternaryg64",
)  # fmt: skip


@dataclass
class Form:
    """A weight as one of our layers holds it.

    Attributes:
        scheme: short name.
        layer: that holds it.
        of_codes: float64 outputs of its codes and scales for all inputs of its cells.
        cells: numbers of tokens that it runs at.
    """

    scheme: str
    layer: PackedLinearLayer | QWQALinearLayer
    of_codes: torch.Tensor
    cells: tuple[int, ...]


def run_packed(session: Session) -> None:
    """Measure the section, and print a table for each weight, dtype and number of threads."""
    settings = session.settings
    peers, absent = installed(FOUR_BIT_PEERS)
    session.results.absent |= absent
    cells = len(settings.packed_shapes) * len(settings.dtypes) * len(settings.threads)
    count = cells * len(settings.packed_tokens)
    with session.progress("packed", count), any_isa(), quiet(), torch.no_grad():
        for shape in settings.packed_shapes:
            for dtype in settings.dtypes:
                _run_weight(session, peers, shape, dtype)


def packed_isas(settings: Settings) -> tuple[str, ...]:
    """The best instruction set and AVX2; every one where the shapes are small."""
    if settings.are_small:
        return settings.isas
    return tuple(isa for isa in settings.isas if isa in (settings.isas[0], "avx2"))


def _run_weight(session: Session, peers: list[Peer], shape: Shape, dtype: str) -> None:
    settings = session.settings
    race = Race.of("packed", shape, dtype, max(settings.packed_tokens))
    forms = _forms(race, settings)
    shared: dict = {}
    for threads in settings.threads:
        ours = [
            contender for form in forms for contender in _contenders(session, form, dtype, threads)
        ]
        with threads_of_torch(threads):
            found, failures = race.peers(peers, threads, shared)
            contenders = found[:1] + ours + found[1:]
            rows = race.run(session, contenders, failures, threads, settings.packed_tokens)
        session.results.rows += rows
        print_cells(session.say, rows)
    if session.limits:
        session.limits.forget_buffers()


def _forms(race: Race, settings: Settings) -> list[Form]:
    """The int8 layer, the schemes of every cell, and those of the other widths."""
    linear, every = race.problem.linear(), settings.packed_tokens
    layer = QWQALinearLayer.from_float(linear)
    of_codes = exact(race.inputs, layer.int8_weights) * layer.scales.double()
    forms = [Form(INT8, layer, of_codes, every)]
    some = tuple(tokens for tokens in every if tokens in settings.width_tokens)
    for scheme, cells in [(name, every) for name in MAIN] + [(name, some) for name in WIDTHS]:
        if cells:
            packed = PackedLinearLayer.from_float(linear, scheme)
            inputs = race.inputs[: max(cells)]
            weight = packed.packed().dequantize("float32")
            forms.append(Form(scheme, packed, exact(inputs, weight), cells))
    return forms


def _contenders(session: Session, form: Form, dtype: str, threads: int) -> list[Contender]:
    """A form on each instruction set; they share what is known of its limit."""
    isas = packed_isas(session.settings)
    gauge = Gauge(session.limits, form.layer, dtype, threads, isas)
    return [
        Contender(
            f"{OURS}{isa} {form.scheme}", "ours", form.layer, isa, form.of_codes, gauge, form.cells
        )
        for isa in isas
    ]
