"""How good a model is, and how far it is from another: each figure with its standard error.

Tokens of one sequence are no independent samples, so errors are taken over blocks, and a block is a
sequence: with the sums s_i over n_i tokens of m sequences the mean is R = sum s / sum n, and its
variance m / (m - 1) sum (s_i - R n_i)^2 / (sum n)^2, that of a ratio of means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantization.calibration.calls import Batch, as_batches, call, masks_of, observed, output_of
from quantization.calibration.inputs import batch_of, is_causal, vocabulary_of
from quantization.console.progress import Progress, shown

__all__ = ["Divergence", "OutputSums", "Perplexity", "divergence", "perplexity"]

_NUMBERS = 1 << 19  # of float64 that are looked at at once: tokens times vocabulary


@dataclass(frozen=True)
class Perplexity:
    """How well a language model foresees a text.

    Attributes:
        perplexity: exp of ``loss``.
        loss: mean over tokens of -log of the chance that the model gave to them, in nats.
        error: standard error of ``loss`` over sequences; NaN for one sequence.
        tokens: tokens that were foreseen: all but the first of each sequence.
        blocks: sequences.

    Example:
        >>> Perplexity(perplexity=math.e, loss=1.0, error=0.1, tokens=100, blocks=4).loss
        1.0
    """

    perplexity: float
    loss: float
    error: float
    tokens: int
    blocks: int


@dataclass(frozen=True)
class Divergence:
    """How far a model is from its reference, on the same inputs.

    Of models that give logits: ``kl``, ``top1`` and their errors, and for causal language models
    the perplexities; of models that give hidden states: ``drift``. What does not apply is None.

    Attributes:
        kl: mean over tokens of the Kullback-Leibler divergence KL(reference || model), in nats.
        kl_error: its standard error over sequences; NaN for one sequence.
        top1: share of tokens for which both have the same best guess.
        top1_error: its standard error.
        drift: 1 - mean cosine of the sequences' embeddings: means of the hidden states.
        drift_error: its standard error.
        perplexity: of the model, where tokens are foreseen from those before.
        reference_perplexity: of the reference.
        tokens: positions that were compared.
        blocks: sequences.

    Example:
        >>> layer = nn.Linear(4, 3)
        >>> divergence(layer, layer, [torch.ones(2, 4)]).kl
        0.0
    """

    kl: float | None
    kl_error: float | None
    top1: float | None
    top1_error: float | None
    drift: float | None
    drift_error: float | None
    perplexity: float | None
    reference_perplexity: float | None
    tokens: int
    blocks: int


@dataclass
class _Blocks:
    """Sums over blocks, for a mean and its error."""

    sums: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def add(self, values: Tensor) -> None:
        if values.numel():
            self.sums.append(values.double().sum().item())
            self.counts.append(values.numel())

    def mean(self) -> float | None:
        return math.fsum(self.sums) / sum(self.counts) if self.counts else None

    def error(self) -> float | None:
        mean, blocks = self.mean(), len(self.sums)
        if mean is None or blocks < 2:
            return None if mean is None else math.nan
        pairs = zip(self.sums, self.counts, strict=True)
        spread = math.fsum((total - mean * count) ** 2 for total, count in pairs)
        return math.sqrt(blocks / (blocks - 1) * spread) / sum(self.counts)


def perplexity(
    model: nn.Module,
    batches: Iterable[Batch] | Batch,
    *,
    window: int = 512,
    progress: Progress | bool | None = None,
) -> Perplexity:
    """The perplexity of a causal language model on a text.

    Each sequence is read by itself, its tokens foreseen from those before. The model runs in eval
    mode without gradients and is as it was afterwards. Sums are float64.

    Args:
        model: gives logits [batch, sequence, vocabulary], or an object that has them.
        batches: token ids of a text [tokens], cut into windows; ids [sequences, tokens], read row
            by row; or an iterable of what the model is called with, in which ``attention_mask``
            marks padding.
        window: tokens of a piece of a text.
        progress: True for a bar on stderr, or a function that is called with (done, total).

    Raises:
        TypeError: for batches of a wrong kind, or a model that gives no logits.
        ValueError: if the model is not causal, or nothing is left to foresee.

    Example:
        >>> from torch import nn
        >>> embed, head = nn.Embedding(4, 4), nn.Linear(4, 4)
        >>> _ = nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
        >>> found = perplexity(nn.Sequential(embed, head), torch.arange(8) % 4, window=4)
        >>> round(found.perplexity, 6), found.tokens, found.blocks
        (4.0, 6, 2)
    """
    losses, causal = _Blocks(), None
    given = _batches(model, batches, window)
    with observed(model), shown(progress, "perplexity", given) as told:
        for batch in told:
            logits, _ = output_of(call(model, batch))
            causal = _foresees(model, batch, logits) if causal is None else causal
            places = _Positions.of(batch, logits, causal)
            if not places.causal:
                raise ValueError(
                    f"{type(model).__name__} gives {tuple(logits.shape)} for a batch, and that is "
                    "no causal language model's guess at each next token; divergence() compares "
                    "other models"
                )
            for row, keep in enumerate(places.keep):
                losses.add(_losses(logits[row], keep, places.targets(row)))
    mean, error = losses.mean(), losses.error()
    if mean is None or error is None:
        raise ValueError("no token to foresee: sequences need 2 tokens or more")
    return Perplexity(math.exp(mean), mean, error, sum(losses.counts), len(losses.counts))


def divergence(
    model: nn.Module,
    reference: nn.Module | Callable[..., Any],
    batches: Iterable[Batch] | Batch,
    *,
    window: int = 512,
    progress: Progress | bool | None = None,
) -> Divergence:
    """How far a model is from another that it should be like: a quantized one from its float self.

    Both run on the same inputs, in eval mode without gradients. What is compared follows from what
    they give: ``logits`` (or a tensor) as distributions over the last dimension, at each position
    that is no padding, the last one of a causal model's sequence left out; ``last_hidden_state`` as
    its mean over the positions that are no padding; ``sentence_embedding`` as it is. Sums are
    float64, and no more memory is taken than the outputs of a batch do.

    Args:
        model: the model that is judged.
        reference: the model that it should be like, or anything that can be called with the same
            batches.
        batches: as :func:`perplexity` has them.
        window: tokens of a piece of a text.
        progress: True for a bar on stderr, or a function that is called with (done, total).

    Raises:
        TypeError: for batches of a wrong kind, or outputs that cannot be compared.
        ValueError: for outputs of two shapes, or no positions at all.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4))
        >>> found = divergence(model, model, torch.arange(8) % 4, window=4)
        >>> found.kl, found.top1, found.tokens
        (0.0, 1.0, 6)
    """
    comparison = OutputSums(reference if isinstance(reference, nn.Module) else model)
    given = _batches(model, batches, window)
    with observed(model, reference), shown(progress, "divergence", given) as told:
        for batch in told:
            comparison.add(batch, call(model, batch), call(reference, batch))
    return comparison.result()


class OutputSums:
    """Everything that is summed of the outputs of a model and its reference, over batches."""

    def __init__(self, judge: nn.Module) -> None:
        self.kl, self.top1, self.drift, self.ours, self.theirs = (_Blocks() for _ in range(5))
        self.tokens, self.judge = 0, judge
        self.causal: bool | None = None

    def add(self, batch: Any, ours: Any, theirs: Any) -> None:
        """What both give for a batch."""
        (one, is_hidden), (other, _) = output_of(ours), output_of(theirs)
        if one.shape != other.shape:
            raise ValueError(
                f"the model gives {tuple(one.shape)} and the reference {tuple(other.shape)} for "
                "the same batch"
            )
        if self.causal is None:
            self.causal = not is_hidden and _foresees(self.judge, batch, one)
        places = _Positions.of(batch, one, self.causal)
        for row, keep in enumerate(places.keep):
            if is_hidden and bool(keep.any()):
                mean, wanted = (each[row][keep].double().mean(0) for each in (one, other))
                self.drift.add(1 - torch.cosine_similarity(mean, wanted, dim=0)[None])
                self.tokens += int(keep.sum())
            elif not is_hidden:
                self._add_logits(_pieces(one[row], keep), _pieces(other[row], keep))
                if places.causal:
                    self.ours.add(_losses(one[row], keep, places.targets(row)))
                    self.theirs.add(_losses(other[row], keep, places.targets(row)))

    def _add_logits(self, ours: Iterator[Tensor], theirs: Iterator[Tensor]) -> None:
        found = [_compared(*pair) for pair in zip(ours, theirs, strict=True)]
        if found:
            kl, same = (torch.cat(parts) for parts in zip(*found, strict=True))
            self.kl.add(kl)
            self.top1.add(same)
            self.tokens += len(kl)

    def result(self) -> Divergence:
        """The means so far."""
        if not self.tokens:
            raise ValueError("nothing to compare: no batch has a position that counts")
        losses = [each.mean() for each in (self.ours, self.theirs)]
        ours, theirs = (None if loss is None else math.exp(loss) for loss in losses)
        return Divergence(
            kl=self.kl.mean(),
            kl_error=self.kl.error(),
            top1=self.top1.mean(),
            top1_error=self.top1.error(),
            drift=self.drift.mean(),
            drift_error=self.drift.error(),
            perplexity=ours,
            reference_perplexity=theirs,
            tokens=self.tokens,
            blocks=max(len(self.kl.counts), len(self.drift.counts)),
        )


@dataclass
class _Positions:
    """Which positions of a batch's output count: bool, a row a sequence.

    Attributes:
        keep: [batch, sequence], or [batch, 1] where there is one output a sequence.
        ids: [batch, sequence] of a causal model, whose position i foresees token i + 1.
        causal: whether they are.
    """

    keep: Tensor
    ids: Tensor | None
    causal: bool

    @classmethod
    def of(cls, batch: Any, output: Tensor, causal: bool) -> _Positions:
        """Of an output; ``causal``: whether its model's guesses are for the next token."""
        shape = output.shape[:2] if output.ndim > 2 else output.shape[:1]
        keep = torch.ones(shape, dtype=torch.bool, device=output.device)
        for mask in masks_of(batch):
            if mask.shape == shape:
                keep = mask.to(output.device)
        ids = _ids_of(batch, output) if causal else None
        if ids is not None:
            keep = keep & keep.roll(-1, 1)
            keep[:, -1] = False
        return cls(keep, ids, ids is not None)

    def targets(self, row: int) -> Tensor:
        """The tokens that the kept positions of a row should foresee."""
        assert self.ids is not None
        ids = self.ids[row].to(self.keep.device)
        return ids[self.keep[row].roll(1, 0)]


def _ids_of(batch: Any, output: Tensor) -> Tensor | None:
    """The token ids of a batch, if the output [batch, sequence, ...] says something of each."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    ids = next(iter(ids), None) if isinstance(ids, tuple | list) else ids
    if not isinstance(ids, Tensor) or ids.is_floating_point() or output.ndim != 3:
        return None
    return ids if ids.shape == output.shape[:2] else None


def _foresees(model: nn.Module, batch: Any, output: Tensor) -> bool:
    """Whether a model's outputs are guesses at next tokens, from those before alone."""
    vocabulary = vocabulary_of(model)
    if vocabulary is None or _ids_of(batch, output) is None or output.shape[-1] < vocabulary:
        return False
    return is_causal(model, vocabulary)


def _batches(model: nn.Module, given: Any, window: int) -> Iterable[Any]:
    """Token ids in pieces that are read one by one; other batches as they are."""
    if type(window) is not int or window < 2:
        raise ValueError(f"window is {window!r}; expected 2 tokens or more")
    if isinstance(given, Tensor) and not given.is_floating_point() and given.ndim in (1, 2):
        rows = given.split(window) if given.ndim == 1 else given.unbind(0)
        return [batch_of(model, row[None]) for row in rows if len(row) > 1]
    return as_batches(given)


def _pieces(logits: Tensor, keep: Tensor) -> Iterator[Tensor]:
    """Rows [tokens, classes] of what is kept, so many at once that float64 copies stay small."""
    if keep.ndim == 0:
        logits, keep = logits[None], keep[None]
    if logits.numel():
        count = max(1, _NUMBERS // logits[0].numel())
        for part, kept in zip(logits.split(count), keep.split(count), strict=True):
            yield part[kept].reshape(-1, logits.shape[-1])


def _losses(logits: Tensor, keep: Tensor, targets: Tensor) -> Tensor:
    """-log of the chance of each target, float64."""
    parts, start = [torch.zeros(0, dtype=torch.float64)], 0
    for piece in _pieces(logits, keep):
        wanted = targets[start : start + len(piece), None]
        start += len(piece)
        parts.append(-piece.double().log_softmax(-1).gather(-1, wanted)[:, 0].cpu())
    return torch.cat(parts)


def _compared(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """KL(theirs || ours) of each row, and whether both have one best guess; float64."""
    q, p = (each.double().log_softmax(-1) for each in (ours.to(theirs.device), theirs))
    terms = torch.where(p > -math.inf, p.exp() * (p - q), 0.0)
    return terms.sum(-1).cpu(), (p.argmax(-1) == q.argmax(-1)).double().cpu()
