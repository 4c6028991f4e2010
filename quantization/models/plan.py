"""What is to become of a model, parameter by parameter, before anything changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from quantization.console.columns import Column, size
from quantization.console.progress import Progress, shown
from quantization.console.table import Table, Tabular
from quantization.layers.quantized_module import QuantizedModule
from quantization.methods.statistics import Statistics
from quantization.models.decisions import PlainLinear, Request, decide
from quantization.models.expected import ROWS
from quantization.models.planned import (
    PlannedParameter,
    RowsOf,
    measured,
    parameters_of,
    scheme_name,
)
from quantization.models.recipe import Recipe
from quantization.swap import walker
from quantization.swap.attention import splitting_attention
from quantization.swap.conversion import memory_of
from quantization.swap.engine import Layer, leave_tied, swap, tensors_of
from quantization.swap.patterns import Pattern
from quantization.swap.report import COLUMNS, ReplacementReport, joined

__all__ = ["ModelPlan", "carry_out", "check_model", "make_plan", "plan"]

_MEASURED = (
    Column("sqnr", "bar", "SQNR dB", ".1f", "expected signal to quantization noise"),
    Column("outliers", "number", help="beyond six standard deviations", extra=True),
    Column("nonfinite", "number", "NaN, inf", extra=True),
    Column("kernel", extra=True),
)
_PLANNED = (Column("called", "name", "parameter"), *COLUMNS[1:-1], *_MEASURED, COLUMNS[-1])


@dataclass(frozen=True, repr=False)
class ModelPlan(Tabular[PlannedParameter], Sequence[PlannedParameter]):
    """What :func:`quantization.quantize_model` would do, parameter by parameter.

    Print it, sort it (:class:`quantization.console.table.Table`), look one up by its name or by
    that of its layer, and do it: :meth:`apply`, or ``quantize_model(model, plan)``.

    Example:
        >>> planned = plan(nn.Sequential(nn.Linear(64, 64, bias=False)), "w4g32a")
        >>> len(planned), planned.bytes_before, planned.bytes_after, planned.coverage
        (1, 16384, 2624, 1.0)

    Attributes:
        model: the model, unchanged.
        request: what was asked for.
        parameters: what becomes of each.
        layers: (dotted name, status, scheme) of each layer that was decided upon.
        other_bytes: of the model's buffers that are none of its layers' weights.
        sampled: what SQNR, outliers and the rest are of, in words.
    """

    model: nn.Module
    request: Request
    parameters: tuple[PlannedParameter, ...]
    layers: tuple[tuple[str, str, str], ...]
    other_bytes: int
    sampled: str = ""

    def apply(self, progress: Progress | bool | None = None) -> ReplacementReport:
        """Do it, all of it or nothing.

        Args:
            progress: as for :func:`quantization.quantize_model`.

        Raises:
            ValueError: if the model is no longer as it was planned, and as
                :func:`quantization.quantize_model` raises it.
        """
        return carry_out(self.model, self.request, progress, self.layers)

    @property
    def bytes_before(self) -> int:
        """Of all parameters and buffers; what is shared counts once."""
        return sum(row.bytes_before for row in self.parameters) + self.other_bytes

    @property
    def bytes_after(self) -> int:
        """The same, afterwards."""
        return sum(row.bytes_after for row in self.parameters) + self.other_bytes

    @property
    def coverage(self) -> float:
        """Share of the model's parameters that are codes afterwards, 0..1."""
        total = sum(row.weights for row in self.parameters if row.bytes_after or not row.shares)
        return sum(row.weights for row in self._codes) / total if total else 0.0

    @property
    def bits_per_weight(self) -> float:
        """Of what is quantized afterwards, scales and all included; 0 if there is nothing."""
        weights = sum(row.weights for row in self._codes)
        bits = sum((row.bits_per_weight or 0) * row.weights for row in self._codes)
        return bits / weights if weights else 0.0

    @property
    def _codes(self) -> list[PlannedParameter]:
        return [row for row in self.parameters if row.status in ("replaced", "already")]

    def __len__(self) -> int:
        return len(self.parameters)

    def __getitem__(self, key: Any) -> Any:
        """A parameter by its place, its name, or the name of its layer; a slice of them."""
        if not isinstance(key, str):
            return self.parameters[key]
        of_layer = [row for row in self.parameters if key == row.layer]
        names = (key, f"{key}.weight")
        named = [row for row in self.parameters if {row.name, *row.aliases} & {*names}]
        decided = [row for row in of_layer if row.status != "stays"]
        for row in (*named, *decided, *of_layer):
            return row
        return self.table()[key]  # says what is near

    def table(self) -> Table[PlannedParameter]:
        """A row for each parameter."""
        return Table(_PLANNED, self.parameters, self._title, tuple(self._notes))

    def to_text(self, width: int | None = None) -> str:
        """As it is printed: a long one joins the parameters of a family."""
        return replace(self.table(), rows=joined(self.parameters)).to_text(width)

    @property
    def _title(self) -> str:
        will = sum(row.replaced for row in self.parameters)
        return f"plan: {will} of {len(self)} parameters will be quantized; nothing is changed yet"

    @property
    def _notes(self) -> list[str]:
        notes = [
            f"whole model: {size(self.bytes_before)} -> {size(self.bytes_after)}; "
            f"{self.coverage:.1%} of its parameters quantized"
            + (f", {self.bits_per_weight:.2f} bits each" if self._codes else "")
        ]
        return notes + ([self.sampled] if self.sampled else [])


def plan(
    model: nn.Module,
    recipe: Recipe,
    *,
    exclude: Pattern | Iterable[Pattern] = (),
    strict: bool = False,
    untie: bool = False,
    nonfinite: str = "raise",
    statistics: Mapping[str, Statistics] | None = None,
    progress: Progress | bool | None = None,
    plain_linear: PlainLinear = (),
    split_attention: bool = True,
) -> ModelPlan:
    """What :func:`quantization.quantize_model` would do with the same arguments; nothing changes.

    For each parameter: what will happen and why, or why not; its bytes before and after, bits a
    weight, the instruction set that would run, with whom it is shared. Of what would be quantized
    also the signal to noise to be expected, of some rows rounded to nearest, and, in the whole
    weight, outliers and numbers that are none. A model on meta has no numbers to look at.

    Args:
        model: as for :func:`quantization.quantize_model`, like all that follow.
        recipe: schemes, or rules.
        exclude: patterns of what to leave in float.
        strict: for the deed: raise if a layer would be left.
        untie: quantize also what shares its weight with a tensor that stays.
        nonfinite: for the deed: ``"raise"`` or ``"mark"``.
        statistics: of the inputs of layers.
        progress: True for a bar, or a function that is called with (done, total) parameters.
        plain_linear: further classes of linear layers.
        split_attention: False leaves nn.MultiheadAttention in float.

    Raises:
        TypeError, ValueError: as :func:`quantization.quantize_model` for the model, the recipe and
            its patterns.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.LayerNorm(64))
        >>> planned = plan(model, "w4g32a")
        >>> planned["0"].what, planned["0"].bytes_after, planned["1.bias"].what
        ('quantize', 2624, 'stays: bias')
        >>> report = planned.apply()
        >>> type(model[0]).__name__, report.model_bytes_after == planned.bytes_after
        ('PackedLinearLayer', True)
    """
    request = Request(
        recipe, exclude, strict, untie, nonfinite, statistics, plain_linear, split_attention
    )
    return make_plan(model, request, progress=progress)


def make_plan(
    model: nn.Module,
    request: Request,
    rows_of: RowsOf | None = None,
    progress: Progress | bool | None = None,
) -> ModelPlan:
    """A plan; with ``rows_of`` its figures are of rows that are read from elsewhere."""
    check_model(model)
    with splitting_attention(model, lambda name: request.split_attention):
        sites = list(walker.walk(model))
        layers = decide(request, sites)
        leave_tied(layers, sites, request.untie)
        found = parameters_of(sites, layers)
        with shown(progress, "measuring", found) as told:
            rows = tuple(measured(row, tensor, layer, rows_of) for row, tensor, layer in told)
        owned = {id(layer.module) for layer in layers if isinstance(layer.module, QuantizedModule)}
        other = {
            memory_of(tensor): tensor.nbytes
            for _, tensor, owner in tensors_of(sites)
            if not (isinstance(tensor, nn.Parameter) or id(owner) in owned)
        }
    said = ""
    if any(row.sqnr is not None for row in rows):
        where = "of those rows" if rows_of else "of all numbers"
        said = f"SQNR: {ROWS} rows of each weight, rounded to nearest, whatever the method; "
        said += f"outliers and NaN: {where}"
    return ModelPlan(model, request, rows, _decided(layers), sum(other.values()), said)


def carry_out(
    model: nn.Module,
    request: Request,
    progress: Progress | bool | None = None,
    planned: tuple[tuple[str, str, str], ...] | None = None,
) -> ReplacementReport:
    """Do what is asked for, all of it or nothing.

    Raises:
        ValueError: if what is to be done is not what was ``planned``.
    """
    check_model(model)
    with splitting_attention(model, lambda name: request.split_attention):
        sites = list(walker.walk(model))
        layers = decide(request, sites)
        if planned is not None:
            leave_tied(layers, sites, request.untie)
            _refuse_changed(_decided(layers), planned)
        return swap(
            sites,
            layers,
            QuantizedModule,
            strict=request.strict,
            untie=request.untie,
            progress=progress,
            noun="layers",
            caller="quantize_model",
        )


def check_model(model: Any) -> None:
    """Raise TypeError unless it is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model (a torch.nn.Module instance), not {model!r:.60}")


def _decided(layers: list[Layer]) -> tuple[tuple[str, str, str], ...]:
    return tuple((layer.names[0], layer.status, scheme_name(layer)) for layer in layers)


def _refuse_changed(now: Sequence[Any], planned: Sequence[Any]) -> None:
    if tuple(now) != tuple(planned):
        odd = next((pair for pair in zip(now, planned, strict=False) if pair[0] != pair[1]), None)
        where = f": {odd[1][0] or 'the model'} was {odd[1][1]}, and is {odd[0][1]}" if odd else ""
        raise ValueError(
            f"the model has changed since it was planned{where}, so nothing was done; plan it again"
        )
