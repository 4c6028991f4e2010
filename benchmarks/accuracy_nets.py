"""The models whose accuracy is measured, and the inputs that they are judged by."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import quantization
from benchmarks.accuracy_texts import lines
from quantization.demo.model_download import cache_folder
from quantization.demo.model_sources import load_model

NAMES = ("minilm", "smollm2")
WINDOW = 512
CALIBRATED = 4096  # tokens of text for calibrating


@dataclass
class Net:
    """A model in float32, and what it is judged by.

    Attributes:
        name: out of `NAMES`.
        kind: ``"causal"`` or ``"sentences"``.
        model: the float model.
        tokenizer: of transformers.
        exclude: layers that stay in float.
        batches: that it is judged by.
        key: says which model this is, rescaling and all.
        known: statistics by calibration, as they are collected.
    """

    name: str
    kind: str
    model: nn.Module
    tokenizer: Any
    exclude: list[str]
    batches: list[dict[str, torch.Tensor]]
    key: str
    known: dict[str, quantization.ModelStatistics] = field(default_factory=dict)
    recorded: list[Any] = field(default_factory=list)

    def judge(self, model: nn.Module) -> quantization.Divergence:
        """How far another model is from this one, whose outputs are computed once."""
        if not self.recorded:
            with torch.no_grad():
                self.recorded = [self.model(**batch) for batch in self.batches]
        replies = iter(self.recorded)
        return quantization.divergence(model, lambda **batch: next(replies), self.batches)

    def statistics(self, calibration: str) -> quantization.ModelStatistics:
        """Those of `accuracy_cells.Cell.calibration`, kept in the cache of models."""
        if calibration not in self.known:
            words = calibration.split(":")
            source = words[-1]
            kinds = ("moments", "hessian") if words[0] == "hessian" else ("moments",)
            file = cache_folder() / "statistics" / f"{self.key}-{'-'.join(words)}.safetensors"
            self.known[calibration] = quantization.calibrate(
                self.model,
                self._text() if source == "text" else source,
                statistics=kinds,
                exclude=self.exclude,
                file=file,
                progress=sys.stderr.isatty(),
            )
        return self.known[calibration]

    def _text(self) -> list[dict[str, torch.Tensor]]:
        if self.kind == "causal":
            return windows(self.tokenizer, lines("causal", "calibrate"), CALIBRATED // WINDOW)
        return sentences(self.tokenizer, lines("sentences", "calibrate"), 512)

    def layers(self) -> Iterator[tuple[str, nn.Linear]]:
        """The linear layers that are quantized."""
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear) and name not in self.exclude:
                yield name, module


def load(name: str, use: str, count: int, rescale: float = 0.25, seed: int = 0) -> Net:
    """A model with its inputs: windows of `WINDOW` tokens of a causal one, sentences of another.

    Args:
        name: out of `NAMES`.
        use: ``"report"`` or ``"tune"``, the text.
        count: windows; of sentences 64 times as many.
        rescale: of the causal one, see :func:`rescaled`.
        seed: of the rescaling.

    Raises:
        ModelError, TextError: if something cannot be had.
    """
    loaded = load_model(name)
    loaded.model.requires_grad_(False)
    found, key = lines(loaded.kind, use), name
    if loaded.kind == "causal":
        loaded.model.config.use_cache = False
        rescaled(loaded.model, rescale, seed)
        batches, key = windows(loaded.tokenizer, found, count), f"{name}-{rescale}-{seed}"
    else:
        batches = sentences(loaded.tokenizer, found, 64 * count)
    return Net(name, loaded.kind, loaded.model, loaded.tokenizer, loaded.exclude, batches, key)


def windows(tokenizer: Any, paragraphs: list[str], count: int) -> list[dict[str, torch.Tensor]]:
    """The first windows of a text, each a batch.

    Paragraphs are taken evenly from the whole set, so that neighbours have different subjects.
    """
    step = max(1, len(paragraphs) // (8 * count))
    text = "\n\n".join(paragraphs[::step])
    ids = torch.tensor(tokenizer(text[: 16 * WINDOW * count])["input_ids"])
    if len(ids) < count * WINDOW:
        raise ValueError(f"the text has {len(ids)} tokens, too few for {count} windows")
    return [{"input_ids": part[None]} for part in ids[: count * WINDOW].split(WINDOW)]


def sentences(tokenizer: Any, found: list[str], count: int) -> list[dict[str, torch.Tensor]]:
    """Batches of 16 sentences with their masks."""
    starts = range(0, min(count, len(found)), 16)
    options = {"padding": True, "truncation": True, "max_length": 256, "return_tensors": "pt"}
    return [dict(tokenizer(found[start : start + 16], **options)) for start in starts]


@torch.no_grad()
def rescaled(model: nn.Module, strength: float, seed: int = 0) -> None:
    """Change the weights of a Llama and not its function, in place.

    The weights of SmolLM2's file lie on a grid of 4 bits already, which a fit would find again. So
    each input channel of a layer is multiplied by exp(u), |u| <= `strength`, and what makes the
    channel is divided by it: the gain of the norm, or the row of v or up.
    """
    generator = torch.Generator().manual_seed(seed)
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        width = attention.head_dim
        sharing = attention.o_proj.in_features // attention.v_proj.out_features
        groups = (
            (block.input_layernorm, 1, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, 1, (mlp.gate_proj, mlp.up_proj)),
            (attention.v_proj, sharing, (attention.o_proj,)),
            (mlp.up_proj, 1, (mlp.down_proj,)),
        )
        for source, repeats, layers in groups:
            size = source.weight.shape[0]
            factor = ((2 * torch.rand(size, generator=generator) - 1) * strength).exp()
            source.weight /= factor if source.weight.ndim == 1 else factor[:, None]
            columns = factor.view(-1, 1, width) if repeats > 1 else factor
            if repeats > 1:  # heads that share a value head see the same rows of v
                columns = columns.expand(-1, repeats, -1).reshape(-1)
            for layer in layers:
                layer.weight *= columns


def copied(net: Net) -> nn.Module:
    """A copy of the float model to be quantized."""
    return deepcopy(net.model)
