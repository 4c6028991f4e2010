"""Float weights that become codes as transformers reads them, one after the other."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps

from quantization.integrations.transformers_config import QuantizationConfig
from quantization.integrations.transformers_init import mark_as_initialized
from quantization.integrations.transformers_missing import (
    is_drawn,
    leave_in_float,
    refuse_left,
)
from quantization.integrations.transformers_ties import parameter_of, tie_parameters
from quantization.layers.quantized_module import QuantizedModule
from quantization.models.quantizer import form_of, make_layer, quantize_model
from quantization.models.recipe import Rule
from quantization.swap.conversion import Maker, convert
from quantization.swap.engine import assign, stores_of
from quantization.swap.experts import UnfusedExperts, unfuse_experts
from quantization.swap.report import Candidate, ReplacementReport
from quantization.swap.walker import walk

__all__ = ["FloatWeights"]


@dataclass
class _PendingLayer:
    """A float module of the model, on meta, until its weights are there.

    Attributes:
        name: its dotted name.
        module: itself; its weights are on meta again after ``make``.
        make: builds what comes in its place.
        bytes_per_number: of what comes in its place.
        keys: names of the Parameters that ``make`` needs.
        given: those of them that came.
        new: what came in its place.
    """

    name: str
    module: nn.Module
    make: Maker
    bytes_per_number: float
    keys: tuple[str, ...]
    given: set[str] = field(default_factory=set)
    new: nn.Module | None = None


class FloatWeights:
    """Which weights of a model become codes, decided before any is read, and how.

    The decision is that of :func:`quantization.quantize_model` on a copy of the model without
    numbers, so that it is one decision for the whole model, with ties and reasons.

    Attributes:
        report: what is to become of each layer; it has no ``model``.

    Args:
        model: a model of transformers on meta; pairs of tied weights that both become codes are
            taken off its list.
        config: what to do.
        dtype: that transformers casts weights to while it reads them.

    Raises:
        TypeError, ValueError: as quantize_model does.
    """

    def __init__(self, model: Any, config: QuantizationConfig, dtype: torch.dtype) -> None:
        self._config = config
        self._error: Exception | None = None
        self._missing: set[str] = set()
        self._sites = list(walk(model))
        self._pending: dict[str, _PendingLayer] = {}
        twin = copy.deepcopy(model)
        tie_parameters(twin)
        if config.unfuse_experts:
            unfuse_experts(twin)
        report = config.quantize(twin)
        self.report: ReplacementReport = replace(report, model=None)  # which would hold the twin
        self._planned = {name for c in report.replaced for name in (c.name, *c.aliases)}
        self._plans = list(self._plan(model, twin, {c.name: c for c in report.replaced}))
        for waiting in self._plans:
            if all(model.get_parameter(key).dtype == dtype for key in waiting.keys):
                self._pending |= dict.fromkeys(waiting.keys, waiting)
        self._taken: dict[str, str] = {}
        self._tied_keys: dict[str, str] = model.all_tied_weights_keys
        self._tied = {key for pair in model.all_tied_weights_keys.items() for key in pair}
        self._groups = self._claim_ties(model)

    def _plan(self, model: Any, twin: nn.Module, layers: dict[str, Candidate]) -> Any:
        """What waits for weights: layers under each of their names, and modules of experts."""
        nonfinite, known = self._config.nonfinite, self._config.statistics or {}
        for path, experts in twin.named_modules():
            if isinstance(experts, UnfusedExperts):
                start = f"{path}."
                inner = {
                    name.removeprefix(start): Rule(form_of(twin.get_submodule(name)), c.method)
                    for name, c in layers.items()
                    if name.startswith(start)
                }
                own_known = {
                    name.removeprefix(start): known[name]
                    for name in layers
                    if name.startswith(start) and name in known
                }
                ways = {"nonfinite": nonfinite, "statistics": own_known or None}
                make = partial(_quantized_experts, layers=inner, **ways)
                old = model.get_submodule(path)
                keys = [name for name, value in old._parameters.items() if value is not None]
                yield _pending_layer(path, old, make, experts, *keys)
        for name, c in layers.items():
            new: Any = twin.get_submodule(name)
            make = partial(make_layer, scheme=form_of(new), nonfinite=nonfinite, method=c.method)
            if name in known:
                make = partial(make, statistics=partial(known.__getitem__, name))
            for own in (name, *c.aliases):
                if _has(model, own):
                    yield _pending_layer(own, model.get_submodule(own), make, new, "weight")

    def _claim_ties(self, model: Any) -> dict[str, set[str]]:
        """Groups of keys of one weight that all become codes, by each of the keys.

        Of a pair that stays apart, the end that becomes codes is left until all is loaded and tied.
        """
        pairs = list(model.all_tied_weights_keys.items())
        for pair in pairs * len(pairs):  # what one pair leaves may part another
            if sum(key in self._pending for key in pair) == 1:
                self._pending = {key: w for key, w in self._pending.items() if key not in pair}
        groups: dict[str, set[str]] = {}
        for target, source in pairs:
            if target in self._pending:
                self._taken[target] = model.all_tied_weights_keys.pop(target)
                groups[target] = groups.setdefault(source, {source})
                groups[target].add(target)
        return groups

    def __contains__(self, key: object) -> bool:
        return key in self._pending

    def fits(self, key: str, weight: torch.Tensor) -> bool:
        """Whether a weight has the shape of its layer; if not, that layer is not waited for.

        transformers then refuses it, or draws another one where that was asked for.
        """
        waiting = self._pending[key]
        own = waiting.module._parameters[key.rpartition(".")[2]]
        if own.shape == weight.shape or not own.is_meta:
            return True
        group = {each for k in waiting.keys for each in self._groups.get(k, {k})}
        self._pending = {k: w for k, w in self._pending.items() if k not in group}
        freed = {target for target in self._taken if target in group}
        self._tied_keys |= {target: self._taken.pop(target) for target in freed}
        return False

    def bytes_per_number(self, key: str) -> float:
        """Of the codes that come in the place of a weight, scales and all."""
        return self._pending[key].bytes_per_number

    def operation(self) -> ConversionOps:
        """What transformers is to call with weights that it has read."""
        return _QuantizeWeights(self)

    # ---- each weight -------------------------------------------------------------------------

    def receive(self, key: str, weight: torch.Tensor, missing: set[str]) -> None:
        """Make the layers that wait for a weight, and put them into the model.

        The first error is kept for :meth:`finish`: transformers would make a line of a log of it.
        """
        group = self._groups.get(key, {key})
        missing.difference_update(group)
        if self._error is not None:
            return
        try:
            for other in sorted(group, key=lambda each: each != key):
                if other == key or self._pending[other].new is None:
                    self._fill_in(other, weight, group)
        except Exception as error:
            self._error = error

    def _fill_in(self, key: str, weight: torch.Tensor, group: set[str]) -> None:
        waiting = self._pending[key]
        parameters = waiting.module._parameters
        parameters[key.rpartition(".")[2]] = nn.Parameter(weight)
        waiting.given.add(key)
        if len(waiting.given) < len(waiting.keys):
            return
        new = convert(waiting.module, waiting.name, waiting.make)
        for name in (each.rpartition(".")[2] for each in waiting.keys):
            parameters[name] = nn.Parameter(torch.empty_like(parameters[name], device="meta"))
        for other in group - {key}:
            _share_if_equal(new, self._pending[other].new)
        if f"{waiting.name}.bias" in self._tied:
            new.bias = nn.Parameter(new._buffers.pop("bias"))  # until transformers has tied it
        mark_as_initialized(new)
        assign(stores_of(self._sites, {id(waiting.module): new}))
        waiting.new = new

    # ---- afterwards --------------------------------------------------------------------------

    def finish(self, model: Any) -> ReplacementReport:
        """Quantize what had no weight of its own in the checkpoint, and see that all is done.

        What the checkpoint has no weight for, not even a tied one, stays in float.

        Raises:
            Exception: the first that a weight gave rise to.
            ValueError: if a layer could not be quantized.
        """
        if self._error is not None:
            raise self._error
        self._tie_what_stays(model)
        self._leave_what_is_missing(model)
        if not self._is_done(model):
            if self._config.unfuse_experts:
                unfuse_experts(model)
            self._config.quantize(model, self._missing)
        left = sorted(name for name in self._planned if not _is_quantized(model, name))
        if left:
            raise ValueError(
                f"{len(left)} layers were to be quantized and have no weight that could be: "
                f"{', '.join(left[:3])}; load the model without a device_map of several devices"
            )
        for name in self._planned:
            _bias_to_buffer(model.get_submodule(name))
        if self._missing:
            self.report = leave_in_float(self.report, self._missing, model)
        return self.report

    def _tie_what_stays(self, model: Any) -> None:
        """Put ties back on the list; transformers has not tied what was to share codes."""
        model.all_tied_weights_keys |= self._taken  # restrict_ties takes codes off for good
        for target, source in self._taken.items():
            weight = parameter_of(model, source)
            if weight is not None and parameter_of(model, target) is not None:
                owner, _, name = target.rpartition(".")
                model.get_submodule(owner)._parameters[name] = weight

    def _leave_what_is_missing(self, model: Any) -> None:
        """Take what the checkpoint has no weight for off the plan."""
        for waiting in self._plans:
            if waiting.new is None and is_drawn(map(partial(parameter_of, model), waiting.keys)):
                inner = {n for n in self._planned if n.startswith(f"{waiting.name}.")}
                self._missing |= ({waiting.name} & self._planned) | inner
        self._planned -= self._missing
        if self._config.strict:
            refuse_left(self._missing)

    def _is_done(self, model: nn.Module) -> bool:
        return all(_is_quantized(model, name) for name in self._planned)


class _QuantizeWeights(ConversionOps):
    """The step of transformers' loading that makes codes of weights."""

    def __init__(self, weights: FloatWeights) -> None:
        self._weights = weights

    def convert(
        self, input_dict: dict[str, Any], missing_keys: Any = None, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        rest = {}
        for key in list(input_dict):
            value = input_dict.pop(key)
            weight = value[0] if isinstance(value, list) else value
            if key in self._weights and self._weights.fits(key, weight):
                self._weights.receive(key, weight, set() if missing_keys is None else missing_keys)
            else:
                rest[key] = weight
        return rest


# ---- parts -------------------------------------------------------------------------------------


def _pending_layer(
    name: str, old: nn.Module, make: Maker, new: nn.Module, *keys: str
) -> _PendingLayer:
    """What waits for Parameters ``keys`` of ``old``, which become ``new``, here without numbers."""
    numbers = sum(old._parameters[key].numel() for key in keys)
    size = sum(tensor.nbytes for tensor in new.state_dict().values())
    return _PendingLayer(
        name, old, make, size / max(numbers, 1), tuple(f"{name}.{key}" for key in keys)
    )


def _quantized_experts(
    old: nn.Module, name: str, *, layers: dict[str, Rule], nonfinite: str, statistics: Any
) -> nn.Module:
    """Experts with linear layers of their own, those in ``layers`` quantized."""
    new = UnfusedExperts(old)
    recipe = {"re:^" + re.escape(path) + "$": rule for path, rule in layers.items()}
    quantize_model(new, recipe, nonfinite=nonfinite, statistics=statistics)
    for module in new.modules():
        if type(module) is nn.Linear:  # a view of the fused weight, which is to go
            module.weight = nn.Parameter(module.weight.detach().clone())
    return new


def _share_if_equal(new: Any, other: Any) -> None:
    """Let a layer hold the codes of another one if they are the same."""
    if other is None or form_of(new) != form_of(other):
        return
    mine, theirs = new._buffers, other._buffers
    names = [name for name in new._weight_names() if mine[name] is not None]
    if all(torch.equal(mine[name], theirs[name]) for name in names):
        for name in names:
            mine[name] = theirs[name]


def _bias_to_buffer(layer: nn.Module) -> None:
    """Make a buffer again of a bias that was to be tied."""
    if layer._parameters.get("bias") is not None:
        bias = layer._parameters.pop("bias")
        layer.register_buffer("bias", bias.detach())


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _is_quantized(model: nn.Module, name: str) -> bool:
    return _has(model, name) and isinstance(model.get_submodule(name), QuantizedModule)
