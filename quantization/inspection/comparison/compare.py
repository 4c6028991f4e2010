"""A model beside the one that it should be like, on inputs of one's own: where they part ways."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

from torch import Tensor, nn

from quantization.calibration.calls import call, masks_of, observed
from quantization.calibration.evaluate import Divergence, OutputSums
from quantization.calibration.plans import loss_of
from quantization.console.progress import Progress
from quantization.console.table import Table, Tabular
from quantization.inspection.comparison.damage import COLUMNS, LayerDamage, LayerSums
from quantization.inspection.comparison.keep import Kept, kept
from quantization.inspection.comparison.lock_step import LockStep
from quantization.layers.quantized_module import QuantizedModule
from quantization.swap.walker import walk

__all__ = ["Comparison", "compare"]

_PAST = 20.0  # dB: an error of a tenth
_NOTHING = "nothing was compared yet: call it with a batch inside its block"


def compare(
    model: nn.Module, reference: nn.Module, *, progress: Progress | bool | None = None
) -> Comparison:
    """Watch where a quantized model parts ways with its reference, on batches of one's own.

    Each call of what this gives runs both models on a batch, in eval mode without gradients, layer
    beside layer: no outputs are kept but those of the layer at hand, only sums. A third time each
    quantized layer runs on what the reference's layer is fed with, which tells its own damage from
    what it inherits. Positions that the batch's ``attention_mask`` marks as padding do not count.

    Args:
        model: the quantized model. Its hooks are gone when the ``with`` block is left, whatever
            happens in it.
        reference: a model with layers of the same names: the float one that it was made of, or one
            under another recipe. A layer that it lacks (a projection of split attention, an expert)
            is compared where both have what holds it.
        progress: of :meth:`Comparison.keep`: True for a bar, or a function called with (done,
            total).

    Returns:
        A :class:`Comparison`: a table of layers in the order in which they run.

    Raises:
        TypeError: if one of them is no nn.Module.
        ValueError: if they share no quantized layer.

    Example:
        >>> import copy
        >>> from quantization import quantize_model
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> reference = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
        >>> model = copy.deepcopy(reference)
        >>> _ = quantize_model(model, {"2": "w2", "*": "w8"})
        >>> with compare(model, reference) as both:
        ...     for _ in range(2):
        ...         _ = both(torch.randn(8, 32))
        >>> both.first(sqnr=30).name, both.sort("own_sqnr")[0].name
        ('2', '2')
        >>> both.keep(max_divergence=1e-5).before({"2": "w2", "*": "w8"})
        {'2': None, '*': 'w8'}
    """
    for what, module in (("model", model), ("reference", reference)):
        if not isinstance(module, nn.Module):
            raise TypeError(f"{what} is {module!r:.60}; expected a torch.nn.Module instance")
    return Comparison(model, reference, _pairs(model, reference), progress)


class Comparison(Tabular[LayerDamage]):
    """Two models compared, and what is known so far; print it, or look at it in a notebook.

    Attributes:
        model: the one that is judged.
        reference: the one that it should be like.
        batches: what they were called with, kept for :meth:`keep`.

    Example:
        >>> import torch
        >>> from quantization import PackedLinearLayer
        >>> linear = nn.Linear(8, 8)
        >>> with compare(PackedLinearLayer.from_float(linear, "w8"), linear) as both:
        ...     _ = both(torch.ones(2, 8))
        >>> len(both), both.rows[0].inherited_sqnr
        (1, inf)
    """

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module,
        pairs: Mapping[str, _Pair],
        progress: Progress | bool | None,
    ) -> None:
        self.model, self.reference, self.batches = model, reference, list[Any]()
        self._pairs, self._progress = pairs, progress
        self._sums: dict[str, LayerSums] = {}
        self._end: OutputSums | None = None
        self._why_no_end = ""
        self._hooks: ExitStack | None = None
        self._run = _Run({}, [])

    def __enter__(self) -> Self:
        if self._hooks is not None:
            raise RuntimeError("this comparison is watching already: leave its block first")
        with ExitStack() as hooks:
            for name, pair in self._pairs.items():
                for module, hook in ((pair.theirs, self._ahead), (pair.ours, self._behind)):
                    called = partial(hook, name)
                    handle = module.register_forward_hook(called, with_kwargs=True)
                    hooks.callback(handle.remove)
            self._hooks = hooks.pop_all()
        return self

    def __exit__(self, *_: Any) -> None:
        hooks, self._hooks = self._hooks, None
        if hooks is not None:
            hooks.close()

    def __call__(self, *batch: Any, **named: Any) -> Any:
        """Run both models on a batch, and add what is found.

        Args:
            batch: a tensor, a tuple or a mapping, as :func:`quantization.divergence` has batches;
                or the model's arguments.
            named: the model's named arguments.

        Returns:
            What the model returns.

        Raises:
            RuntimeError: outside of the ``with`` block.
            ValueError: for outputs of two shapes.
        """
        if self._hooks is None:
            raise RuntimeError("call it inside its block: with compare(...) as both: both(batch)")
        given = _batch_of(batch, named)
        run = self._run = _Run({}, masks_of(given))
        with observed(self.model, self.reference):
            run.steps = steps = LockStep(partial(call, self.reference, given))
            try:
                ours = call(self.model, given)
                theirs = steps.finish()
            finally:
                run.steps = None
                steps.stop()
        self._add_end(given, ours, theirs)
        for name, sums in run.sums.items():
            self._sums.setdefault(name, LayerSums()).merge(sums)
        self.batches.append(given)
        return ours

    def _add_end(self, given: Any, ours: Any, theirs: Any) -> None:
        """The outputs of both; what cannot be compared is told, and the layers still are."""
        end = self._end or OutputSums(self.reference)
        try:
            end.add(given, ours, theirs)
        except TypeError as error:
            self._why_no_end = str(error)
        else:
            self._end = end

    # ---- hooks ---------------------------------------------------------------------------------

    def _ahead(self, name: str, module: nn.Module, args: Any, named: Any, output: Any) -> None:
        run, wanted = self._run, _first_tensor(output)
        if (steps := run.steps) is None or wanted is None:
            return
        run.steps = None  # what is inside of the layer has nothing to hear now
        try:
            own = self._pairs[name].ours.forward(*args, **named)
        finally:
            run.steps = steps
        steps.say(name, (wanted, _first_tensor(own)))

    def _behind(self, name: str, module: nn.Module, args: Any, named: Any, output: Any) -> None:
        run = self._run
        found = _first_tensor(output)
        if run.steps is None or found is None or (said := run.steps.hear(name)) is None:
            return
        outputs = [*said, found]
        if all(output.shape == found.shape for output in outputs):  # else other tokens came here
            sums = run.sums.setdefault(name, LayerSums())
            sums.add(*(_kept_rows(output, run.masks) for output in outputs))

    # ---- what was found ------------------------------------------------------------------------

    @property
    def rows(self) -> tuple[LayerDamage, ...]:
        """The layers, in the order in which they run."""
        return tuple(
            sums.damage(name, self._pairs[name].scheme) for name, sums in self._sums.items()
        )

    def __len__(self) -> int:
        return len(self._sums)

    def __iter__(self) -> Any:
        return iter(self.rows)

    def __getitem__(self, key: Any) -> Any:
        return self.table()[key]

    @property
    def divergence(self) -> Divergence:
        """How far the models' outputs are apart, over all batches so far.

        Raises:
            ValueError: before the first batch, or if the outputs cannot be compared.
        """
        if self._end is None:
            raise ValueError(self._why_no_end or _NOTHING)
        return self._end.result()

    def first(self, sqnr: float = _PAST) -> LayerDamage | None:
        """The first layer, as they run, whose outputs are further off than that; or None.

        Args:
            sqnr: signal to noise in dB; 20 is an error of a tenth.
        """
        return next((row for row in self.rows if not row.sqnr >= sqnr), None)

    def keep(self, max_divergence: float, *, measured: bool = False) -> Kept:
        """A short list of layers which, left in float, bring the models together.

        Layers are taken by their own damage, the worst first, until the model with these layers of
        the reference keeps to the divergence; then those are given back without which it still
        does. Each list is measured on the batches that were seen, and so is the one that is given.
        The model is as it was afterwards.

        Args:
            max_divergence: KL a token, or drift of hidden states, as in
                :func:`quantization.plan_bits`.
            measured: take the layers by what each alone loses at the model's end, which is measured
                first, in as many runs as there are layers. Lists are shorter where layers have
                about the same damage of their own, and the model does not mind it equally.

        Returns:
            Rules ``{layer: None}`` to go before those of a recipe, with what was measured:
            ``quantize_model(model, both.keep(0.01).before("w4g64a"))``.

        Raises:
            ValueError: before the first batch; or if all layers in float do not do, with what they
                come to.
        """
        if self._end is None:
            raise ValueError(self._why_no_end or _NOTHING)
        ranked = sorted(self.rows, key=lambda row: _rank(row.own_sqnr))
        names = [row.name for row in ranked]
        return kept(self.model, self.reference, names, self.batches, max_divergence, self._progress)

    def table(self) -> Table[LayerDamage]:
        """All of it as a table."""
        return Table(COLUMNS, self.rows, self._title(), tuple(self._notes()))

    def _title(self) -> str:
        if self._end is None:
            return f"compare: {self._why_no_end or 'no batch so far'}"
        end = self.divergence
        name, loss = loss_of(end)
        same = "" if end.top1 is None else f", the same best guess for {end.top1:.1%}"
        return f"compare: {name} {loss:.4g} over {end.tokens} positions{same}"

    def _notes(self) -> list[str]:
        if not self._sums:
            return []
        first, rows = self.first(), self.rows
        worst = min(rows, key=lambda row: _rank(row.own_sqnr))
        notes = [f"most damage of its own: {worst.name} ({worst.own_sqnr:.1f} dB)"]
        if first is not None:
            notes.append(f"first below {_PAST:g} dB: {first.name} ({first.sqnr:.1f} dB)")
        unseen = [name for name in self._pairs if name not in self._sums]
        if unseen:
            more = f" and {len(unseen) - 3} others" if len(unseen) > 3 else ""
            notes.append(f"nothing reached {', '.join(unseen[:3])}{more}")
        return notes


@dataclass
class _Run:
    """One batch: its sums so far, its masks, and the reference while it runs."""

    sums: dict[str, LayerSums]
    masks: list[Tensor]
    steps: LockStep | None = field(default=None)


@dataclass(frozen=True)
class _Pair:
    """Modules of one name in both models."""

    ours: nn.Module
    theirs: nn.Module
    scheme: str


def _pairs(model: nn.Module, reference: nn.Module) -> dict[str, _Pair]:
    """Quantized layers, or what holds them, with those of the reference; each module once."""
    found: dict[str, _Pair] = {}
    seen: set[int] = set()
    theirs = {site.name: site.module for site in walk(reference)}
    ours = {site.name: site.module for site in walk(model)}
    for name, module in ours.items():
        if not isinstance(module, QuantizedModule):
            continue
        scheme = str(getattr(module, "scheme", "int8"))
        while name and name not in theirs:
            name = name.rpartition(".")[0]
        if id(ours[name]) not in seen and theirs[name] is not ours[name]:
            seen.add(id(ours[name]))
            found[name] = _Pair(ours[name], theirs[name], scheme)
    for name in [name for name in found if any(outer in found for outer in _outer(name))]:
        del found[name]  # the reference, where it has it, need not call it
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no quantized layer that could be compared with "
            f"{type(reference).__name__}'s: quantize a copy, copy.deepcopy(model), and keep the "
            "float one as reference"
        )
    return found


def _outer(name: str) -> Iterator[str]:
    """Names of what holds a module."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _batch_of(batch: tuple[Any, ...], named: dict[str, Any]) -> Any:
    if named and batch:
        raise TypeError("give a batch, or arguments by position or by name, not both kinds")
    return named or (batch[0] if len(batch) == 1 else batch)


def _first_tensor(output: Any) -> Tensor | None:
    """A layer's output, or the first of several."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    is_floats = isinstance(first, Tensor) and first.is_floating_point()
    return first if is_floats else None


def _kept_rows(output: Tensor, masks: list[Tensor]) -> Tensor:
    """Numbers of the positions that are no padding."""
    for mask in masks:
        if output.ndim > 2 and output.shape[:2] == mask.shape:
            output = output[mask.to(output.device)]
    return output.detach().reshape(-1)


def _rank(sqnr: float) -> float:
    return -math.inf if math.isnan(sqnr) else sqnr
