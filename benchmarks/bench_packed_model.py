"""What each scheme makes of a real language model: bytes, perplexity and speed, in one table.

Each linear layer but the output layer is packed from its float weight, by rounding or by the method
that stands after the colon, whose statistics are those of random tokens: no text is read. The file
of SmolLM2 holds 4 bits in groups of 32 with free zero points: schemes like that would find its grid
again, and are left out here.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from benchmarks.harness import Candidate, Pace, Timing, take_turns
from benchmarks.peers import quiet
from benchmarks.records import Row, add_ratios
from benchmarks.session import Session, any_isa, threads_of_torch
from benchmarks.tables import print_cells
from quantization import PackedLinearLayer, calibrate, quantize_model, set_isa
from quantization.demo import char_model

if TYPE_CHECKING:
    from quantization.demo.model_sources import LoadedModel
    from quantization.demo.quality import Judge

FLOAT = "float"
SCHEMES = (
    "w8", "w6g64a", "w5g64a", "w4g64a", "nf4g64", "w3g64a", "w2g64a", "ternaryg64",
    "nf4g32+dq:lsq", "w3g64af+dq:lsq",
)  # fmt: skip
PROMPT = "The oldest bridge of the city"


def run_packed_model(session: Session) -> None:
    """Measure the section; a missing extra or model is reported, not an error."""
    from quantization.demo.model_sources import ModelError, load_model
    from quantization.demo.quality import judge_for

    settings = session.settings
    text = char_model.HELD_OUT_TEXT.read_text(encoding="utf-8")
    try:
        with quiet():
            loaded = load_model(settings.model)
            judge = judge_for(loaded, text, settings.judged)
    except ModelError as error:
        session.results.absent["packed_model"] = str(error)
        return
    count = len(settings.dtypes) * (len(SCHEMES) + 1)
    with session.progress("packed_model", count), any_isa(), quiet(), torch.no_grad():
        set_isa(settings.isas[0])
        for dtype in settings.dtypes:
            with threads_of_torch(max(settings.threads)):
                rows = _run_dtype(session, loaded, judge, dtype)
            session.results.rows += rows
            print_cells(session.say, rows)


def _run_dtype(session: Session, loaded: LoadedModel, judge: Judge, dtype: str) -> list[Row]:
    settings = session.settings
    floats = copy.deepcopy(loaded.model).to(getattr(torch, dtype)).eval()
    models, figures = {FLOAT: floats}, {}
    known = calibrate(loaded.model, "random", exclude=loaded.exclude)
    for scheme in SCHEMES:
        models[scheme] = copy.deepcopy(floats)
        quantize_model(models[scheme], scheme, exclude=loaded.exclude, statistics=known)
    names = _replaced(models[SCHEMES[0]])
    for name, model in models.items():
        measured = judge.measure(model, lambda done, total: None)
        figures[name] = _size(model, names) | {"perplexity": _perplexity(judge, measured.figure)}
        session.advance(f"{dtype} {name}")
    candidates = [
        Candidate(
            name, FLOAT if name == FLOAT else "ours",
            partial(judge.continue_prompt, model, PROMPT, settings.packed_reply),
        )
        for name, model in models.items()
    ]  # fmt: skip
    pace = Pace(min(5, settings.rounds), 60 * settings.seconds, settings.sample, slow=60)
    results = take_turns(candidates, pace)
    case = {"model": loaded.name, "dtype": dtype, "threads": max(settings.threads)}
    rows = [Row.of("packed_model", case, c.name, c.kind, results[c.name]) for c in candidates]
    for row in rows:
        row.values |= figures[row.candidate]
        if isinstance(row.timing, Timing):
            row.values["tokens_per_second"] = settings.packed_reply / row.median
    add_ratios(rows, FLOAT)
    return rows


def _replaced(model: nn.Module) -> list[str]:
    return [n for n, module in model.named_modules() if isinstance(module, PackedLinearLayer)]


def _size(model: nn.Module, names: list[str]) -> dict[str, float]:
    """Bytes of the layers that are packed, or would be, biases left out; and bits of a weight."""
    layers = [model.get_submodule(name) for name in names]
    size = sum(
        layer.nbytes if isinstance(layer, PackedLinearLayer) else layer.weight.nbytes
        for layer in layers
    )
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    return {"bytes": size, "bits_per_weight": 8 * size / weights}


def _perplexity(judge: Judge, figure: float) -> float:
    """Of a token; the judge of the embedded model counts bits a character."""
    return figure if judge.unit == "perplexity" else 2**figure
