"""What a call costs when there is next to nothing to compute: a layer of 16x32, four tokens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn

from benchmarks.harness import Candidate, take_turns
from benchmarks.peers import BASELINE
from benchmarks.records import Row, add_ratios
from benchmarks.session import Session, any_isa, threads_of_torch
from benchmarks.tables import print_cells
from quantization import QWQALinearLayer, quantized_forward, set_isa

IN_FEATURES, OUT_FEATURES, TOKENS = 16, 32, 4
CONTEXTS: dict[str, Callable[[], AbstractContextManager]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "grad": torch.enable_grad,
}


def run_overhead(session: Session) -> None:
    """Measure the section, and print a table for each dtype and context."""
    settings = session.settings
    with session.progress("overhead", len(settings.dtypes) * len(CONTEXTS)), any_isa():
        set_isa(settings.isas[0])
        with threads_of_torch(settings.threads[-1]):
            for dtype in settings.dtypes:
                for context in CONTEXTS:
                    _run_cell(session, dtype, context)


def _run_cell(session: Session, dtype: str, context: str) -> None:
    threads = session.settings.threads[-1]
    with CONTEXTS[context]():
        candidates = _candidates(getattr(torch, dtype), is_grad=context == "grad")
        results = take_turns(candidates, session.settings.pace(1))
    case = {"shape": f"{OUT_FEATURES}x{IN_FEATURES}", "tokens": TOKENS, "dtype": dtype}
    case |= {"context": context, "threads": threads}
    rows = [Row.of("overhead", case, c.name, c.kind, results[c.name]) for c in candidates]
    add_ratios(rows, BASELINE)
    session.results.rows += rows
    print_cells(session.say, rows)
    session.advance(f"{dtype} {context}")


def _candidates(dtype: torch.dtype, is_grad: bool) -> list[Candidate]:
    """The float layer and ours; with gradients also on an input that asks for one."""
    linear = nn.Linear(IN_FEATURES, OUT_FEATURES, dtype=dtype)
    layer = QWQALinearLayer.from_float(linear)
    x = torch.randn(TOKENS, IN_FEATURES).to(dtype)
    codes, scales, bias = layer.int8_weights, layer.scales, layer.bias.detach()
    found = [
        Candidate(BASELINE, "float", lambda: linear(x)),
        Candidate("ours layer", "ours", lambda: layer(x)),
        Candidate(
            "ours quantized_forward", "ours", lambda: quantized_forward(codes, x, scales, bias)
        ),
    ]
    if is_grad:
        wanting = torch.randn(TOKENS, IN_FEATURES).to(dtype).requires_grad_()
        found += [
            Candidate(f"{BASELINE}, input with grad", "float", lambda: linear(wanting)),
            Candidate("ours layer, input with grad", "ours", lambda: layer(wanting)),
        ]
    return found
