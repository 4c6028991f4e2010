"""What a recipe makes of each layer of a model, and why: decided once, for plans and for deeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from quantization.layers.float_layers import (
    as_linear,
    looks_linear,
    plain_classes,
    why_embedding_left,
    why_left,
)
from quantization.layers.int8_layer import QWQALinearLayer
from quantization.layers.packed_embedding import PackedEmbedding
from quantization.layers.packed_layer import PackedLinearLayer
from quantization.layers.quantized_module import QuantizedModule
from quantization.methods.registry import Method
from quantization.methods.statistics import Statistics
from quantization.models.recipe import W8A16, Line, Recipe, Rules, converts_quantized
from quantization.schemes.scheme import Scheme
from quantization.swap import walker
from quantization.swap.conversion import memory_of, weight_of
from quantization.swap.engine import Layer
from quantization.swap.experts import bare_experts, left_experts
from quantization.swap.other_layers import why_other
from quantization.swap.patterns import Pattern, match_patterns
from quantization.swap.walker import Site

#: Classes, or their names, that :func:`quantization.layers.float_layers.is_plain_linear` is told.
Plain = tuple[str | type[nn.Module], ...]
PlainLinear = str | type[nn.Module] | Iterable[str | type[nn.Module]]

__all__ = ["PlainLinear", "Request", "decide", "form_of", "make_layer"]


@dataclass(frozen=True)
class Request:
    """What is asked for of a whole model; fields as :func:`quantization.quantize_model` has them.

    Example:
        >>> Request("w4").untie
        False
    """

    recipe: Recipe
    exclude: Pattern | Iterable[Pattern] = ()
    strict: bool = False
    untie: bool = False
    nonfinite: str = "raise"
    statistics: Mapping[str, Statistics] | None = None
    plain_linear: PlainLinear = ()
    split_attention: bool = True


def decide(request: Request, sites: list[Site]) -> list[Layer]:
    """Every layer that a report is to speak of once, in the order of the model.

    Args:
        request: what is asked for.
        sites: all places of the model, attention split as it is to be.

    Raises:
        TypeError, ValueError: as :func:`quantization.quantize_model` raises them.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
        >>> layers = decide(Request({"1": None, "*": "w4"}), list(walker.walk(model)))
        >>> [(layer.names[0], layer.status) for layer in layers]
        [('0', 'replaced'), ('1', 'excluded')]
    """
    rules = Rules(request.recipe, sites)
    excluded = match_patterns(sites, request.exclude)
    layers = _find(sites, rules, excluded, request.nonfinite, plain_classes(request.plain_linear))
    _hand_out(layers, request.statistics)
    return layers


_REPORTED = (QuantizedModule, nn.Embedding)


def _find(
    sites: list[Site], rules: Rules, excluded: dict[int, str], nonfinite: str, plain: Plain
) -> list[Layer]:
    adapters = walker.adapters(sites)
    bare, others = bare_experts(sites), why_other(sites)
    layers: dict[tuple[int, str], Layer] = {}
    for site in sites:
        module, key = site.module, (id(site.module), "")
        for parameter in bare.get(id(module), ()):
            own = (id(module), parameter)
            layers.setdefault(own, Layer(module, [], "left", parameter=parameter))
            layers[own].names.append(f"{site.name}.{parameter}" if site.name else parameter)
        if key in layers:
            layers[key].names.append(site.name)
        elif isinstance(module, _REPORTED) or looks_linear(module):
            layer = Layer(module, [site.name])
            if _decide(layer, rules, excluded, adapters, nonfinite, plain):
                layers[key] = layer
        elif id(module) in others:
            layers[key] = Layer(module, [site.name], "left", others[id(module)], is_other=True)
    found = list(layers.values())
    left_experts(found, sites)
    _exclude(found, rules, excluded)
    _note_untied(found)
    return found


def _decide(
    layer: Layer,
    rules: Rules,
    excluded: dict[int, str],
    adapters: dict[int, str],
    nonfinite: str,
    plain: Plain,
) -> bool:
    """What becomes of a layer and why; False where there is nothing to say of it."""
    module = layer.module
    is_embedding = isinstance(module, nn.Embedding)
    rule = rules.for_embedding(module) if is_embedding else rules.for_linear(module)
    if isinstance(module, QuantizedModule):
        _decide_quantized(layer, module, rule)
    elif is_embedding and rule is None:
        return False
    elif id(module) in excluded:
        layer.status, layer.reason = "excluded", f"by {excluded[id(module)]}"
    elif rule is not None and rule.scheme is None:
        layer.status, layer.reason = "excluded", f"by the rule {rule}"
    else:
        reason = adapters.get(id(module)) or (
            why_embedding_left(module) if is_embedding else why_left(module, plain)
        )
        if rule is None:
            reason = reason or "no rule of the recipe matches it"
        layer.status, layer.reason = ("left", reason) if reason else ("replaced", "")
    if layer.status == "replaced":
        if is_embedding and rule.scheme == W8A16:
            raise ValueError(
                f"the rule {rule} matches the embedding {layer.names[0]}, and {W8A16} is a linear "
                "layer: give embeddings a scheme, such as 'w8'"
            )
        method = rule.rule.method
        layer.make = partial(make_layer, scheme=rule.scheme, nonfinite=nonfinite, method=method)
        layer.method = method
    return True


def _hand_out(layers: list[Layer], statistics: Mapping[str, Statistics] | None) -> None:
    """Give each layer that is to be fitted what is known of its inputs."""
    if statistics is None:
        return
    for layer in layers:
        if layer.status != "replaced" or isinstance(layer.module, nn.Embedding):
            continue
        known = next((name for name in layer.names if name in statistics), None)
        if known is not None:
            layer.make = partial(layer.make, statistics=partial(statistics.__getitem__, known))
        elif layer.method != "rtn":
            layer.reason = layer.reason or "fitted without statistics: there are none of it"


def _decide_quantized(layer: Layer, module: QuantizedModule, rule: Line | None) -> None:
    """A layer that is quantized already stays, unless a rule asks for layers of its type."""
    form = form_of(module)
    wanted = form if rule is None or rule.scheme is None else rule.scheme
    if wanted != form and converts_quantized(rule):
        return
    layer.status = "already"
    if wanted != form:
        layer.reason = f"a rule for the type {type(module).__name__} would make it {wanted}"


def _exclude(layers: list[Layer], rules: Rules, excluded: dict[int, str]) -> None:
    """Bare Parameters and other layers are left, or excluded as the module that holds them is."""
    for layer in layers:
        if not (layer.parameter or layer.is_other):
            continue
        rule = rules.for_linear(layer.module)
        if id(layer.module) in excluded:
            layer.status, layer.reason = "excluded", f"by {excluded[id(layer.module)]}"
        elif rule is not None and rule.scheme is None:
            layer.status, layer.reason = "excluded", f"by the rule {rule}"


def make_layer(
    old: nn.Module,
    name: str,
    *,
    scheme: Scheme | str,
    nonfinite: str = "raise",
    method: str | Method = "rtn",
    statistics: Callable[[], Statistics] | None = None,
) -> nn.Module:
    """What a layer becomes under a scheme; it is left as it is.

    Args:
        old: a linear layer, an embedding, or a quantized one.
        name: what error messages call its weight.
        scheme: a Scheme, or :data:`quantization.models.recipe.W8A16` for the int8 layer.
        nonfinite: as for :func:`quantize_model`.
        method: how the codes of a float layer are found.
        statistics: reads what is known of its inputs.

    Raises:
        TypeError, ValueError: if it cannot become that; the message says why.

    Example:
        >>> make_layer(nn.Linear(64, 8), "weight", scheme="w8a16").in_features
        64
    """
    if scheme == W8A16:
        if isinstance(old, PackedLinearLayer):
            return old.to_int8()
        return QWQALinearLayer.from_float(as_linear(old), nonfinite=nonfinite, name=name)
    if isinstance(old, QuantizedModule):
        return old.to_scheme(scheme)
    cls = PackedEmbedding if isinstance(old, nn.Embedding) else PackedLinearLayer
    fitting: dict[str, Any] = {"method": method}
    if statistics is not None:
        fitting["statistics"] = statistics()
    return cls.from_float(as_linear(old), scheme, nonfinite=nonfinite, name=name, **fitting)


def form_of(layer: QuantizedModule) -> Scheme | str | None:
    """What a rule says for such a layer: its scheme, or ``"w8a16"`` for the int8 layer.

    Example:
        >>> form_of(QWQALinearLayer(64, 8))
        'w8a16'
    """
    return W8A16 if isinstance(layer, QWQALinearLayer) else getattr(layer, "scheme", None)


def _note_untied(layers: list[Layer]) -> None:
    """Say where layers of one weight get codes of their own, as their schemes differ."""
    firsts: dict[Any, Layer] = {}
    for layer in layers:
        weight = weight_of(layer.module) if layer.status == "replaced" else None
        if weight is None:
            continue
        first = firsts.setdefault(memory_of(weight), layer)
        mine, theirs = layer.make.keywords["scheme"], first.make.keywords["scheme"]
        if mine != theirs:
            layer.reason = f"untied from {first.names[0]}, which becomes {theirs}"
