"""What a model is worth: the same measures taken before and after its layers are replaced.

A judge holds the text and knows one kind of model; `judge_for` picks it. Its `measure` is called on
the float model and on the quantized one, its `change` compares the two.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from quantization.console.progress import Progress
from quantization.demo import char_model
from quantization.demo.model_sources import LoadedModel, ModelError


@dataclass
class Measured:
    """One run over the text.

    Attributes:
        figure: the measure, None where only a comparison means something.
        tokens: tokens (for the embedded model characters) that were read.
        seconds: wall time of the run.
        losses: loss of each predicted token in nats, float32 [tokens], where there are any.
        vectors: sentence embeddings of unit length, [sentences, width], where there are any.
    """

    figure: float | None
    tokens: int
    seconds: float
    losses: Tensor | None = field(default=None, repr=False)
    vectors: Tensor | None = field(default=None, repr=False)


@dataclass
class Change:
    """How far two runs are apart.

    Attributes:
        name: of the measure, with its unit.
        value: must not exceed `bound`.
        bound: what is allowed.
        error: standard error of `value` over the tokens, where it is known.
    """

    name: str
    value: float
    bound: float
    error: float | None = None


class CharacterJudge:
    """Bits a character of the embedded model, and a sampled continuation."""

    unit, token = "bits a character", "character"

    def __init__(self, loaded: LoadedModel, text: str, limit: int | None) -> None:
        self.text = text[: limit or len(text)]
        _require(len(self.text) > loaded.model.context, len(self.text), loaded.model.context + 1)
        read = (len(self.text) - 1) // loaded.model.context * loaded.model.context
        self.covered = len(self.text[:read].encode())

    def measure(self, model: nn.Module, progress: Progress) -> Measured:
        """Read the text in pieces, so that progress can be shown."""
        piece = 32 * model.context
        starts = range(0, len(self.text) - model.context, piece)
        started, bits, read = time.perf_counter(), 0.0, 0
        for start in starts:
            part = self.text[start : start + piece + 1]
            count = (len(part) - 1) // model.context * model.context
            bits += char_model.bits_per_character(model, part) * count
            read += count
            progress(min(start + piece, len(self.text)), len(self.text))
        return Measured(bits / read, read, time.perf_counter() - started)

    def change(self, before: Measured, after: Measured) -> Change:
        """Relative change, in percent."""
        return _growth(self.unit, before, after)

    def continue_prompt(self, model: nn.Module, prompt: str, tokens: int) -> str:
        """Sampled with a fixed seed."""
        return char_model.continue_text(model, prompt, tokens)


class CausalJudge:
    """Perplexity of a language model of transformers, and a greedy continuation."""

    unit, token = "perplexity", "token"
    window = 512

    def __init__(self, loaded: LoadedModel, text: str, limit: int | None) -> None:
        self.tokenizer = loaded.tokenizer
        encoded = self.tokenizer(text, return_offsets_mapping=self.tokenizer.is_fast)
        ids = encoded["input_ids"][: limit or len(encoded["input_ids"])]
        longest = getattr(loaded.model.config, "max_position_embeddings", None) or self.window
        width = min(self.window, longest)
        _require(len(ids) > 1, len(ids), 2)
        self.windows = [part for part in torch.tensor(ids).split(width) if len(part) > 1]
        self.read = sum(map(len, self.windows))
        if self.tokenizer.is_fast:
            self.covered = len(text[: encoded["offset_mapping"][self.read - 1][1]].encode())
        else:
            self.covered = round(len(text.encode()) * self.read / len(encoded["input_ids"]))

    @torch.inference_mode()
    def measure(self, model: nn.Module, progress: Progress) -> Measured:
        """Exp of the mean loss over windows that do not overlap."""
        started, parts = time.perf_counter(), []
        for index, ids in enumerate(self.windows):
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
            parts.append(functional.cross_entropy(logits, ids[1:], reduction="none"))
            progress(index + 1, len(self.windows))
        losses = torch.cat(parts)
        figure = losses.double().mean().exp().item()
        return Measured(figure, self.read, time.perf_counter() - started, losses)

    def change(self, before: Measured, after: Measured) -> Change:
        """Relative change, in percent, with the standard error of the paired losses."""
        change = _growth(self.unit, before, after)
        spread = (after.losses - before.losses).double().std().item()
        change.error = 100 * spread / math.sqrt(len(before.losses))
        return change

    @torch.inference_mode()
    def continue_prompt(self, model: Any, prompt: str, tokens: int) -> str:
        """Greedy, with a key-value cache."""
        ids = self.tokenizer(prompt, return_tensors="pt")
        start = ids["input_ids"].shape[1]
        grown = model.generate(**ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        return self.tokenizer.decode(grown[0, start:], skip_special_tokens=True)


class SentenceJudge:
    """Drift of mean-pooled sentence embeddings: one minus the mean cosine to the float model's."""

    unit, token = "embedding drift", "token"
    batch = 16

    def __init__(self, loaded: LoadedModel, text: str, limit: int | None) -> None:
        self.tokenizer = loaded.tokenizer
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        lines, self.sentences, tokens = text.splitlines(), [], 0
        longest = min(256, getattr(loaded.model.config, "max_position_embeddings", 256))
        self.options = {"truncation": True, "max_length": longest}
        self.covered = 0
        for line in filter(None, map(str.strip, lines)):
            tokens += len(self.tokenizer(line, **self.options)["input_ids"])
            if limit is not None and tokens > limit:
                break
            self.sentences.append(line)
            self.covered += len(line.encode())
        _require(bool(self.sentences), 0, 1)

    @torch.inference_mode()
    def measure(self, model: nn.Module, progress: Progress) -> Measured:
        """Embed every sentence."""
        started, vectors, tokens = time.perf_counter(), [], 0
        for start in range(0, len(self.sentences), self.batch):
            part = self.sentences[start : start + self.batch]
            ids = self.tokenizer(part, padding=True, return_tensors="pt", **self.options)
            hidden = model(**ids).last_hidden_state.float()
            mask = ids["attention_mask"][..., None]
            vectors.append(functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
            tokens += int(mask.sum())
            progress(start + len(part), len(self.sentences))
        seconds = time.perf_counter() - started
        return Measured(None, tokens, seconds, vectors=torch.cat(vectors))

    def change(self, before: Measured, after: Measured) -> Change:
        """The drift itself; measured values for 8 bits a row are about 0.0004 (MiniLM)."""
        cosine = (before.vectors * after.vectors).sum(-1)
        return Change(self.unit, 1 - cosine.mean().item(), 0.001)

    continue_prompt = None


Judge = CharacterJudge | CausalJudge | SentenceJudge

_JUDGES = {"characters": CharacterJudge, "causal": CausalJudge, "sentences": SentenceJudge}


def judge_for(loaded: LoadedModel, text: str, limit: int | None = None) -> Judge:
    """The judge of a model over a text, of which at most `limit` tokens are read.

    Raises:
        ModelError: the text is too short.

    Example:
        >>> from quantization.demo.model_sources import load_model
        >>> text = char_model.HELD_OUT_TEXT.read_text()
        >>> loaded = load_model()
        >>> judge_for(loaded, text, 1000).measure(loaded.model, lambda *_: None).tokens
        960
    """
    return _JUDGES[loaded.kind](loaded, text, limit)


def time_linear(layers: list[tuple[nn.Module, int]], tokens: int, dtype: torch.dtype) -> float:
    """Seconds for every layer once on `tokens` rows of noise: the best of 5 rounds.

    Args:
        layers: modules with their in_features.
        tokens: rows of the noise.
        dtype: of the noise.

    Example:
        >>> time_linear([(nn.Linear(8, 8), 8)], 1, torch.float32) > 0
        True
    """
    generator = torch.Generator().manual_seed(0)
    widths = {width for _, width in layers}
    noise = {width: torch.randn(tokens, width, generator=generator).to(dtype) for width in widths}
    rounds = []
    with torch.inference_mode():
        for _ in range(6):
            started = time.perf_counter()
            for layer, width in layers:
                layer(noise[width])
            rounds.append(time.perf_counter() - started)
    return min(rounds[1:])


def _growth(unit: str, before: Measured, after: Measured) -> Change:
    percent = 100 * abs(after.figure / before.figure - 1)
    return Change(f"{unit}, change in percent", percent, 0.5)


def _require(enough: bool, given: int, needed: int) -> None:
    if not enough:
        raise ModelError(f"the text gives {given} tokens; at least {needed} are needed (--text)")
