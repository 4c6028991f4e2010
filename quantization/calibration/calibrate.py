"""Run a float model and learn what its linear layers are fed with."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from quantization.calibration.calls import (
    Batch,
    as_batches,
    call,
    digest_of,
    masks_of,
    observed,
)  # fmt: skip
from quantization.calibration.inputs import made_up
from quantization.calibration.sums import InputSums
from quantization.calibration.unfinished import Unfinished, joined
from quantization.console.progress import Progress, telling
from quantization.layers.float_layers import looks_linear, why_left
from quantization.layers.quantized_module import QuantizedModule
from quantization.methods.statistics import ModelStatistics
from quantization.swap import walker
from quantization.swap.patterns import Pattern, match_patterns

__all__ = ["calibrate"]

KINDS = ("moments", "hessian")
MADE = ("random", "self")


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch] | Batch | str | None = None,
    *,
    statistics: str | Iterable[str] = "moments",
    tokens: tuple[int, int] | None = None,
    seed: int = 0,
    exclude: Pattern | Iterable[Pattern] = (),
    layers_at_once: int | None = None,
    progress: Progress | bool | None = None,
    file: str | os.PathLike[str] | None = None,
) -> ModelStatistics:
    """Run a model on some inputs and keep, for each linear layer, what its inputs were like.

    Needs no data: without ``batches`` a model that takes token ids is fed with ones that are made
    up. For moments these are random ids, which do as well as text; for the Hessian of a causal
    language model they are text that the model writes itself, as random ids make a Hessian worse
    than none there; for Hessians of other models random ids again.

    The model runs in eval mode without gradients, uncompiled, and is afterwards as it was, its
    training flags too, whatever happens. Positions that a batch's ``attention_mask`` [batch,
    sequence] marks as padding do not count, in layers that are fed by position. Fused experts have
    no linear layers to watch: :func:`quantization.unfuse_experts` comes first.

    Args:
        model: the float model; its quantized layers are watched as well.
        batches: an iterable of what the model is called with: tensors, tuples of arguments, or
            dicts of named ones; a single tensor or dict is one batch. None, ``"random"`` or
            ``"self"`` (its own text): made up.
        statistics: ``"moments"``: mean of x^2 a column. ``"hessian"``: mean of x x^T too, with
            8 bytes x in_features^2 of memory a layer while it is summed and 4 afterwards; layers
            that share an input share it. Or a tuple of these words.
        tokens: sequences and tokens a sequence of what is made up; by default 8 x 512 random ids
            for a causal model, 512 x 24 for another, 16 x 256 of own text.
        seed: of what is made up.
        exclude: patterns of layers to leave out, as :func:`quantization.quantize_model` has them.
        layers_at_once: run the model several times, for so many layers each time, to bound the
            memory; with ``file`` those that are done are on the disk and not in memory. Batches
            that come from an iterator are kept for it.
        progress: True for a bar on stderr, or a function that is called with (done, total) batches.
        file: where to write the statistics, in safetensors. A run that was killed goes on from what
            it left beside that file, and gives the same numbers; a finished file is read again.

    Returns:
        Statistics by the layers' dotted names, float32 sums of float64 for Hessians. Its ``unseen``
        names layers that nothing reached, such as experts that no token chose.

    Raises:
        TypeError: if ``model`` is no nn.Module, or a batch or an argument is of a wrong kind.
        ValueError: for unknown words, a model that nothing can be made up for (says what to pass),
            no batches, or inputs with NaN or infinity (names the layer and the batch).
        FileExistsError: if ``file`` holds statistics of another model, or made in another way.

    Example:
        >>> model = nn.Sequential(nn.Embedding(100, 16), nn.Linear(16, 8))
        >>> known = calibrate(model)
        >>> known, known["1"]
        (ModelStatistics(1 layers: random token ids, 8 x 512, seed 0), Statistics(16 columns, \
4096 rows))
    """
    hessian = _check(model, batches, statistics, tokens, layers_at_once)
    layers = _layers(model, exclude)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear layers to calibrate")
    groups = _groups(list(layers), layers_at_once or len(layers))
    kind = batches if batches is None or isinstance(batches, str) else "given"
    work = _work(model, groups, hessian, kind, tokens, seed)
    store = Unfinished(file, work)
    known = store.finished()
    if known is not None:
        return known
    given: Iterable[Any]
    with observed(model), telling(progress, "calibrate", "batches") as show:
        if kind != "given":
            made = store.inputs(lambda: made_up(model, kind, tokens, seed, hessian))
            given, source = made.batches(model), made.source
        else:
            given, source = as_batches(batches), "given batches"
            if len(groups) > 1 and isinstance(given, Iterator):
                given = list(given)
        run = _Run(model, given, hessian, store, show, len(groups))
        done = [run.group(index, group, layers) for index, group in enumerate(groups)]
    first_of = {alias: first for first, (_, aliases) in layers.items() for alias in aliases}
    return store.finish(joined(done, first_of, source))


class _Run:
    """One calibration: the model, its inputs, and what is kept of the work."""

    def __init__(
        self, model: nn.Module, batches: Any, hessian: bool, store: Unfinished,
        show: Progress, groups: int,
    ) -> None:  # fmt: skip
        self.model, self.batches, self.hessian = model, batches, hessian
        self.store, self.show = store, show
        self.per_group = len(batches) if hasattr(batches, "__len__") else 0
        self.total = self.per_group * groups

    def group(
        self, index: int, group: list[str], layers: dict[str, tuple[nn.Module, list[str]]]
    ) -> ModelStatistics:
        """The statistics of some layers, by their first names."""
        known = self.store.group(index)
        if known is None:
            sums = InputSums({name: layers[name][0] for name in group}, self.hessian)
            self._sum(index, sums)
            known = self.store.keep(index, ModelStatistics(sums.statistics()))
        return known

    def _sum(self, index: int, sums: InputSums) -> None:
        skip, expected = self.store.restore(index, sums)
        digest, number = "", 0
        with sums.watching():
            for number, batch in enumerate(self.batches, start=1):
                if self.store.file is not None:
                    digest = hashlib.sha256(digest.encode() + digest_of(batch)).hexdigest()
                if number == skip and digest != expected:
                    raise ValueError(
                        f"the first {skip} batches are not those of the run that was interrupted; "
                        f"give the same ones, or delete {self.store.folder}"
                    )
                if number > skip:
                    self._watch(number, batch, sums)
                    self.store.snapshot(index, number, digest, sums)
                if self.total:
                    self.show(index * self.per_group + number, self.total)
        if number == 0 or number < skip:
            raise ValueError(
                f"batches came to their end after {number}"
                + (f", and the interrupted run had seen {skip}" if skip else ": nothing was seen")
            )

    def _watch(self, number: int, batch: Any, sums: InputSums) -> None:
        sums.masks = masks_of(batch)
        try:
            call(self.model, batch)
            sums.flush()
        except Exception as error:
            error.add_note(f"in batch {number} of the calibration")
            raise


def _check(
    model: Any, batches: Any, statistics: Any, tokens: Any, layers_at_once: int | None
) -> bool:
    """Whether Hessians are wanted; errors where something is of a wrong kind."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model (a torch.nn.Module instance), not {model!r:.60}")
    kinds = (statistics,) if isinstance(statistics, str) else tuple(statistics)
    if not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"statistics is {statistics!r}; known are {', '.join(KINDS)}")
    if isinstance(batches, str) and batches not in MADE:
        raise ValueError(
            f"batches is {batches!r}; what can be made up is {' and '.join(map(repr, MADE))}, and "
            "text of your own is tokenized first"
        )
    if batches is not None and not isinstance(batches, str):
        as_batches(batches)
        if tokens is not None:
            raise ValueError("tokens is for inputs that are made up, and batches are given")
    if tokens is not None and (len(tokens) != 2 or not all(map(_is_number, tokens))):
        raise ValueError(f"tokens is {tokens!r}; expected (sequences, tokens), each 1 or more")
    if layers_at_once is not None and not _is_number(layers_at_once):
        raise ValueError(f"layers_at_once is {layers_at_once!r}; expected 1 or more, or None")
    return "hessian" in kinds


def _is_number(value: Any) -> bool:
    return type(value) is int and value >= 1


def _layers(model: nn.Module, exclude: Any) -> dict[str, tuple[nn.Module, list[str]]]:
    """By first name: each linear layer that can be quantized, or is, and all its names."""
    sites = list(walker.walk(model))
    excluded = match_patterns(sites, exclude)
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for site in sites:
        module = site.module
        if id(module) in found:
            found[id(module)][1].append(site.name)
        elif id(module) not in excluded and _is_watched(module):
            found[id(module)] = (module, [site.name])
    return {names[0]: (module, names) for module, names in found.values()}


def _is_watched(module: nn.Module) -> bool:
    is_convertible = isinstance(module, QuantizedModule) or why_left(module) is None
    return looks_linear(module) and is_convertible


def _groups(names: list[str], size: int) -> list[list[str]]:
    return [names[start : start + size] for start in range(0, len(names), size)]


def _work(
    model: nn.Module, groups: list[list[str]], hessian: bool, kind: Any, tokens: Any, seed: int
) -> str:
    """What is calibrated and how: the same text for the same work; looks at some numbers a tensor.

    They tell models apart that differ in training; nothing reads the whole of a large model.
    """
    seen = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        seen.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if not tensor.is_meta:
            flat = tensor.detach().reshape(-1)
            seen.update(digest_of(flat[:: max(1, flat.numel() // 64)][:64]))
    plain = [groups, hessian, kind, tokens, seed if kind != "given" else 0, seen.hexdigest()]
    return json.dumps(plain)
