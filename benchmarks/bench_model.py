"""A real language model under transformers' generate, and how much of its time is not ours.

Beside the float models and their quantized forms runs the same model with linears that cost
nothing: what it reaches, no kernel can surpass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from benchmarks.harness import Candidate, Pace, take_turns
from benchmarks.peers import quiet
from benchmarks.records import Row, add_ratios
from benchmarks.session import Session, any_isa, threads_of_torch
from benchmarks.tables import print_cells
from quantization import QWQALinearLayer, Target, replace_linear_layers_with_w8a16, set_isa

MODEL = "smollm2"
FLOAT, QUANTIZED, ZERO = "", "W8A16 ", "zero-cost "
PROMPT = "The oldest bridge of the city"


class ZeroLinear(nn.Module):
    """Stands for a linear layer and does no work: zeros of the right shape, made once."""

    def __init__(self, out_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.dtype = out_features, dtype
        self._made: dict[torch.Size, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        shape = x.shape[:-1]
        if shape not in self._made:
            self._made[shape] = torch.zeros(*shape, self.out_features, dtype=self.dtype)
        return self._made[shape]


def run_model(session: Session) -> None:
    """Measure the section; a missing extra or model is reported, not an error."""
    from quantization.demo.model_sources import ModelError, load_model

    settings = session.settings
    if not settings.reply:
        return
    try:
        with quiet():
            loaded = load_model(MODEL)
    except ModelError as error:
        session.results.absent["model"] = str(error)
        return
    models = _variants(loaded.model, loaded.exclude, settings.dtypes)
    prompt = loaded.tokenizer(PROMPT, return_tensors="pt").input_ids
    long = torch.randint(
        100, 10000, (1, settings.prompt), generator=torch.Generator().manual_seed(0)
    )
    jobs: dict[str, tuple[int, Callable]] = {
        f"greedy, {settings.reply} tokens": (
            settings.reply, lambda model: partial(_reply, model, prompt, settings.reply),
        ),
        f"prefill, {settings.prompt} tokens": (
            settings.prompt, lambda model: partial(model, long, logits_to_keep=1),
        ),
    }  # fmt: skip
    count = len(settings.threads) * len(jobs)
    with session.progress("model", count), any_isa(), quiet(), torch.no_grad():
        set_isa(settings.isas[0])
        for threads in settings.threads:
            for what, (tokens, make) in jobs.items():
                calls = {name: make(model) for name, model in models.items()}
                _run_job(session, what, tokens, calls, threads)


def _variants(
    model: nn.Module, exclude: list[str], dtypes: tuple[str, ...]
) -> dict[str, nn.Module]:
    """The model in each dtype: as it is, quantized, and with linears that cost nothing."""
    found: dict[str, nn.Module] = {}
    for dtype in dtypes:
        wanted = getattr(torch, dtype)
        found[FLOAT + dtype] = copy.deepcopy(model).to(wanted).eval()
        quantized = copy.deepcopy(model).to(wanted).eval()
        replace_linear_layers_with_w8a16(quantized, Target.Linear(QWQALinearLayer), exclude)
        found[QUANTIZED + dtype] = quantized
        found[ZERO + dtype] = _without_linears(copy.deepcopy(quantized))
    return found


def _without_linears(model: nn.Module) -> nn.Module:
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, QWQALinearLayer)]
    for name, layer in layers:
        model.set_submodule(name, ZeroLinear(layer.out_features, layer.scales.dtype))
    return model


def _reply(model: nn.Module, prompt: torch.Tensor, tokens: int) -> torch.Tensor:
    mask = torch.ones_like(prompt)
    return model.generate(
        prompt, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens,
        do_sample=False, use_cache=True, pad_token_id=0,
    )  # fmt: skip


def _run_job(
    session: Session, what: str, tokens: int, calls: dict[str, Callable], threads: int
) -> None:
    kinds = {QUANTIZED: "ours", ZERO: "zero-cost"}
    candidates = [
        Candidate(name, kinds.get(name[: name.rfind(" ") + 1], "float"), call)
        for name, call in calls.items()
    ]
    pace = Pace(rounds=5, seconds=30 * session.settings.seconds, slow=60)
    with threads_of_torch(threads):
        results = take_turns(candidates, pace)
    case = {"model": MODEL, "what": what, "threads": threads}
    rows = [Row.of("model", case, c.name, c.kind, results[c.name]) for c in candidates]
    add_ratios(rows, rows[0].candidate)
    medians = {row.candidate: row.median for row in rows}
    for row in rows:
        if row.timing:
            row.values["tokens_per_second"] = tokens / row.median
        if row.kind == "ours" and row.timing:
            dtype = row.candidate.removeprefix(QUANTIZED)
            row.values["of_zero_cost"] = medians[ZERO + dtype] / row.median
            row.values["of_float"] = medians[FLOAT + dtype] / row.median
    session.results.rows += rows
    print_cells(session.say, rows)
    session.advance(what)
