"""Bits where they matter: how much each layer loses is measured, and a budget spread by that."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from quantization.calibration.allocation import Allocation, hull
from quantization.calibration.calls import Batch, as_batches, observed, recorded
from quantization.calibration.evaluate import Divergence, divergence
from quantization.calibration.inputs import is_causal, made_up, vocabulary_of
from quantization.calibration.plans import (
    BitPlan,
    PlannedLayer,
    allocated,
    bytes_for,
    check_budget,
    chosen,
    curves,
    figures,
    loss_of,
    recipe_of,
)
from quantization.console.progress import Progress, shown
from quantization.layers.float_layers import is_conv1d
from quantization.methods.statistics import Statistics
from quantization.models.quantizer import make_layer, quantize_model
from quantization.models.recipe import Rule
from quantization.schemes.scheme import Scheme
from quantization.swap.conversion import memory_of, weight_of
from quantization.swap.patterns import Pattern, exact_pattern

__all__ = ["plan_bits"]

#: What a layer may become, if nothing else is said.
CHOICES = ("w2g32af+dq:lsq", "w3g32af+dq:lsq", "w4g32af+dq:lsq", "w6g32af+dq:lsq", "w8g32af+dq:lsq")
_CAUSAL, _OTHER = (8, 256), (96, 24)  # sequences x tokens to measure on
_TRIES = 8


def plan_bits(
    model: nn.Module,
    *,
    target_bits: float | None = None,
    max_bytes: int | None = None,
    max_divergence: float | None = None,
    choices: Sequence[Scheme | str | Rule] = CHOICES,
    statistics: Mapping[str, Statistics] | None = None,
    batches: Iterable[Batch] | Batch | None = None,
    exclude: Pattern | Iterable[Pattern] = (),
    seed: int = 0,
    progress: Progress | bool | None = None,
) -> BitPlan:
    """Choose for each linear layer out of some schemes, so that a budget loses least.

    Each layer alone is quantized under each choice, and the divergence of the model's output from
    its float self is measured; the sum over layers is made least under the budget, exactly
    (:func:`quantization.calibration.allocation.allocate`). Then the model is measured once more
    with all choices together. Nothing is changed: the result is a recipe.

    Args:
        model: the float model, which runs in eval mode and is left as it was.
        target_bits: bits a weight of the planned layers, all their tensors counted.
        max_bytes: of all tensors of the model.
        max_divergence: KL a token, or drift of hidden states, of the model as it is measured with
            all choices together; the smallest plan is taken. One of these three is given.
        choices: schemes, with methods as in ``"w3g32af+dq:lsq"``, in any order, two or more.
        statistics: of layers' inputs, for methods that use them: :func:`quantization.calibrate`.
        batches: what to measure on, as :func:`quantization.divergence` has it; it is gone through
            often, so give a list. None: a language model writes a text (8 x 256 tokens), another
            model of token ids gets random ones (96 x 24).
        exclude: patterns of what stays in float, as for :func:`quantization.quantize_model`.
        seed: of made-up inputs.
        progress: True for a bar, or a function called with (done, total) measurements.

    Raises:
        TypeError: for a recipe, pattern or batches of a wrong kind.
        ValueError: for no budget or two; one that no choices keep to, with the least that they do;
            fewer than two choices; no layer to plan; or inputs that cannot be made up.

    Returns:
        The plan, after layers x choices runs of the model over the batches. It fails where layers
        make up for each other's errors, which a sum does not know: compare ``predicted`` with
        ``measured``. A proxy by gradients did worse than the same bits for all, so it is measured.

    Source: measured sensitivities and their sum as in HAWQ, Z. Dong et al. (2019), and HIGGS, V.
    Malinovskii et al. (2024).

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> plan = plan_bits(model, target_bits=4, batches=[torch.randn(16, 64)])
        >>> plan.bits <= 4, list(plan.recipe)
        (True, ['0', '2', '*'])
    """
    check_budget(target_bits, max_bytes, max_divergence)
    rules = [choice if isinstance(choice, Rule) else Rule(choice) for choice in choices]
    if len({str(rule) for rule in rules}) < max(2, len(rules)):
        raise ValueError(f"choices are two or more different schemes, not {list(map(str, rules))}")
    units = _units(model, rules, exclude)
    other = _nbytes_of(model) - sum(_weight(unit).nbytes for unit in units)
    sizes = [_sized(unit, rules) for unit in units]
    budget = bytes_for(sizes, other, target_bits, max_bytes)
    allocated(sizes, budget, None)  # or raise before anything is measured
    with observed(model):
        trial = _Trial(model, units, rules, statistics or {}, _inputs(model, batches, seed))
        layers = trial.losses(sizes, progress)
        found, measured = trial.settle(layers, budget, max_divergence)
    planned = chosen(layers, rules, found)
    recipe = recipe_of([exact_pattern(model, layer.name) for layer in planned], planned)
    more: dict[str, Any] = {"measured": measured, "measure": loss_of(measured)[0]}
    return BitPlan(
        planned, tuple(rules), recipe, **figures(planned, found), **more,
        frontier=tuple(hull(*curves(planned))), other_bytes=other,
    )  # fmt: skip


# ---- layers ----------------------------------------------------------------------------------

#: Layers that share a weight, by name.
Unit = dict[str, nn.Module]


def _units(
    model: nn.Module,
    rules: list[Rule],
    exclude: Pattern | Iterable[Pattern],
) -> list[Unit]:
    """Layers to plan with their names, those of one weight together."""
    reports = [quantize_model(_outline(model), rule, exclude=exclude) for rule in rules]
    names = [{layer.name for layer in report.replaced} for report in reports]
    planned = [layer.name for layer in reports[0].replaced if all(layer.name in n for n in names)]
    modules = {name: model.get_submodule(name) for name in planned}
    ours = {id(module) for module in modules.values()}
    elsewhere = {
        memory_of(tensor)
        for module in model.modules()
        if id(module) not in ours
        for tensor in module.parameters(recurse=False)
    }
    units: dict[Any, Unit] = {}
    for name, module in modules.items():
        key = memory_of(_weight({name: module}))
        if key not in elsewhere:  # a tied head stays with its embedding
            units.setdefault(key, {})[name] = module
    if not units:
        raise ValueError("the model has no linear layer to plan; quantize_model's report says why")
    return list(units.values())


def _outline(model: nn.Module) -> nn.Module:
    """The model on meta: its modules copied, none of its numbers."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = tensor.detach().to("meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(model, memo)


def _weight(unit: Unit) -> torch.Tensor:
    weight = weight_of(next(iter(unit.values())))
    assert weight is not None
    return weight


def _nbytes_of(model: nn.Module) -> int:
    tensors = {memory_of(each): each for each in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def _sized(unit: Unit, rules: list[Rule]) -> PlannedLayer:
    """A layer with the bytes of its choices, nothing measured yet."""
    (name, module), *_ = unit.items()
    weight = _weight(unit)
    rows, cols = weight.shape[::-1] if is_conv1d(module) else weight.shape
    nbytes = {str(rule): _scheme(rule).nbytes((rows, cols), weight.dtype) for rule in rules}
    return PlannedLayer(name, (rows, cols), rules[0], nbytes, dict.fromkeys(nbytes, 0.0))


def _scheme(rule: Rule) -> Scheme:
    return rule.scheme if isinstance(rule.scheme, Scheme) else Scheme.int8()


# ---- measuring -------------------------------------------------------------------------------


def _inputs(model: nn.Module, batches: Any, seed: int) -> list[Any]:
    if isinstance(batches, torch.Tensor) and not batches.is_floating_point():
        return list(batches.split(512)) if batches.ndim == 1 else [row[None] for row in batches]
    if batches is not None:
        return list(as_batches(batches))
    vocabulary = vocabulary_of(model)
    causal = vocabulary is not None and is_causal(model, vocabulary)
    made = made_up(model, None, _CAUSAL if causal else _OTHER, seed, hessian=True)
    return made.batches(model)


class _Trial:
    """A model, what its layers may become, what it is measured on, and what it said in float."""

    def __init__(
        self,
        model: nn.Module,
        units: list[Unit],
        rules: list[Rule],
        statistics: Mapping[str, Statistics],
        batches: list[Any],
    ) -> None:
        self._model, self._units, self._rules = model, units, rules
        self._statistics, self._batches = statistics, batches
        self._is_float, self._rounds = False, recorded(self._in_float)

    def losses(
        self, sizes: list[PlannedLayer], progress: Progress | bool | None
    ) -> list[PlannedLayer]:
        """The layers with what each choice of each alone loses."""
        found: list[dict[str, float]] = [{} for _ in sizes]
        pairs = list(itertools.product(range(len(sizes)), range(len(self._rules))))
        with shown(progress, "measuring layers", pairs) as told:
            for unit, choice in told:
                measured = self._measured({unit: choice})
                found[unit][str(self._rules[choice])] = loss_of(measured)[1]
        return [replace(size, losses=lost) for size, lost in zip(sizes, found, strict=True)]

    def settle(
        self, layers: list[PlannedLayer], budget: int | None, most: float | None
    ) -> tuple[Allocation, Divergence]:
        """The choices of a budget, measured together; tightened until they keep to ``most``."""
        aim, loss = most, math.inf
        for _ in range(_TRIES):
            found = allocated(layers, budget, aim)
            measured = self._measured(dict(enumerate(found.choices)))
            loss = loss_of(measured)[1]
            if most is None or loss <= most:
                return found, measured
            aim = min(aim or 0.0, found.loss) * min(0.95, most / loss)
        raise ValueError(
            f"max_divergence is {most:.5g}, and choices that were expected to keep to it lose "
            f"{loss:.5g} together: raise it, or add larger choices"
        )

    def _measured(self, choices: dict[int, int]) -> Divergence:
        """The divergence of the model with these choices of these units."""
        with self._standing_in(choices):
            return divergence(self._model, self._rounds(), self._batches)

    @contextmanager
    def _standing_in(self, choices: dict[int, int]) -> Iterator[None]:
        """Quantized layers answer in the place of float ones, but for the float model's turn."""
        with ExitStack() as hooks:
            for unit, choice in choices.items():
                for name, module in self._units[unit].items():
                    new = self._made(self._rules[choice], name, module)
                    hook = module.register_forward_hook(self._answering(new), with_kwargs=True)
                    hooks.callback(hook.remove)
            yield

    def _made(self, rule: Rule, name: str, module: nn.Module) -> nn.Module:
        known = None
        if name in self._statistics:
            known = partial(self._statistics.__getitem__, name)
        assert rule.scheme is not None
        return make_layer(
            module, name, scheme=rule.scheme, method=rule.method, statistics=known
        ).eval()

    def _answering(self, new: nn.Module) -> Callable[..., Any]:
        def answer(module: nn.Module, args: Any, named: Any, output: Any) -> Any:
            return output if self._is_float else new(*args, **named)

        return answer

    def _in_float(self, *args: Any, **named: Any) -> Any:
        """What the float model says."""
        self._is_float = True
        try:
            return self._model(*args, **named)
        finally:
            self._is_float = False
