"""Quantize the layers of a model by a recipe, and bring them back to float: whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from torch import nn

from quantization.console.progress import Progress
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
from quantization.swap.attention import splitting_attention
from quantization.swap.conversion import memory_of, weight_of
from quantization.swap.engine import Layer, swap
from quantization.swap.experts import bare_experts, left_experts
from quantization.swap.other_layers import why_other
from quantization.swap.patterns import Pattern, match_patterns
from quantization.swap.report import ReplacementReport
from quantization.swap.walker import Site

#: Classes, or their names, that :func:`quantization.layers.float_layers.is_plain_linear` is told.
Plain = tuple[str | type[nn.Module], ...]
PlainLinear = str | type[nn.Module] | Iterable[str | type[nn.Module]]

__all__ = ["dequantize_model", "form_of", "make_layer", "quantize_model"]


def quantize_model(
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
) -> ReplacementReport:
    """Put packed layers in the place of a model's layers, in place, each by the scheme of its rule.

    Linear layers: modules of exactly the type nn.Linear, subclasses that are known to compute the
    same (``plain_linear``), and transformers' Conv1D. Which others
    are left and why, what is carried over and what shared modules become is as
    :func:`quantization.replace_linear_layers_with_w8a16` has it, and the report says it all.

    Embeddings: those that a rule names, by a pattern that matches the embedding itself, or by the
    type nn.Embedding; a pattern of what holds them, or ``"*"``, does not. A head that is tied to
    its embedding shares its codes if both have the same scheme; if only one of them is to be
    quantized, it is left and stays tied.

    Quantized layers, int8 ones included, stay as they are, so a second call changes nothing; a rule
    for their type asks for another scheme: ``{PackedLinearLayer: "w4g64a"}``.

    Bare Parameters of three dimensions (the fused experts of transformers' mixtures) are reported
    as left; :func:`quantization.unfuse_experts` makes linear layers of those it knows. So are other
    layers that hold matrices: convolutions of kernel 1, bilinear and recurrent ones. They are
    named with their share of the parameters, and are no reason for ``strict`` to refuse.

    On any error, an interrupt included, the model is exactly as it was.

    Args:
        model: the model, on any device including meta. If it is itself a layer, it has no parent to
            change: ``report.model`` is the new layer.
        recipe: a :class:`quantization.Scheme` or its short name, for all linear layers, with the
            method that finds the codes (``"w4g32a:lsq"``, :class:`quantization.Rule`); or ordered
            rules ``{pattern: scheme or None}``, of which a layer follows the first that matches it
            or something that holds it. ``"w8a16"`` in the place of a scheme makes int8 layers,
            :class:`quantization.QWQALinearLayer`. None leaves a layer in float; one that no rule
            matches is left and reported. Patterns are child names (``"lm_head"``), dotted names,
            globs, ``"re:..."`` (searched for in the dotted name), module types, predicates(dotted
            name, module).
        exclude: patterns of what to leave in float before any rule is looked at.
        strict: raise if a layer would be left that neither a pattern excludes nor a rule with None.
        untie: quantize also a layer that shares its weight with a tensor that stays in float. The
            model then grows by the codes.
        nonfinite: ``"raise"``, or ``"mark"``: a group with a NaN or infinity becomes NaN.
        statistics: of the inputs of layers by dotted name, of this model in float:
            :func:`quantization.calibrate`. For methods that use them; a layer without them is
            fitted as if its columns counted the same, and the report says so.
        progress: True for a bar on stderr, or a function that is called with (done, total) layers.
        plain_linear: subclasses of nn.Linear, or their names, that compute ``x W^T + bias`` and
            nothing else, as nobody but you can know of your own. They become the same layers.
            :data:`quantization.PLAIN_LINEAR` has those that are known without (Falcon's).
        split_attention: False leaves nn.MultiheadAttention in float. By default it becomes a
            :class:`quantization.layers.attention.LayeredAttention` with the layers q_proj, k_proj,
            v_proj and out_proj, which follow the rules as others do; where none is quantized, it
            stays what it was. Those of transformers' models stay in float.

    Returns:
        A report of every layer: its scheme and bits a weight, or why it was left; bytes before and
        after.

    Raises:
        TypeError: if ``model`` is no nn.Module, or the recipe or a pattern is of a wrong kind.
        ValueError: if a pattern matches no module (with the nearest names), the recipe has no
            rules, a name is that of no scheme, a weight holds a NaN or infinity (with its name and
            index), or, with ``strict``, a layer would be left.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8), nn.Linear(8, 8))
        >>> quantize_model(model, {"2": "w8", "3": None, "*": "w4g32a"})
        ReplacementReport by quantize_model: 2 of 3 layers replaced, 1 excluded
        layer  scheme  bits  out x in   before   after  what
        0      w4g32a  5.12   64 x 64  16.6 kB  2.9 kB  replaced
        2      w8      8.50    8 x 64   2.1 kB   576 B  replaced
        3                       8 x 8    288 B   288 B  excluded: by the rule '3'
        replaced layers: 18.7 kB -> 3.5 kB (0.185x)
        whole model: 19.0 kB -> 3.7 kB; 97.0% of its parameters are quantized weights,
          5.50 bits each
        biggest tensors left in float: 0.bias [64] float32 256 B, 3.weight [8, 8]
          float32 256 B, 2.bias [8] float32 32 B
    """
    _check_model(model)
    with splitting_attention(model, lambda name: split_attention):
        sites = list(walker.walk(model))
        rules = Rules(recipe, sites)
        excluded, plain = match_patterns(sites, exclude), plain_classes(plain_linear)
        layers = _find(sites, rules, excluded, nonfinite, plain)
        _hand_out(layers, statistics)
        return swap(
            sites,
            layers,
            QuantizedModule,
            strict=strict,
            untie=untie,
            progress=progress,
            noun="layers",
            caller="quantize_model",
        )


def dequantize_model(model: nn.Module) -> ReplacementReport:
    """Make float layers of a model's quantized ones, in place: all of them or none.

    Packed and int8 linear layers become nn.Linear, packed embeddings nn.Embedding, of the numbers
    that their codes stand for and of their dtype. Hooks, the training flag and attributes are
    carried over, what is shared stays shared, and layers that share codes come to share a
    Parameter. What was lost by quantizing stays lost. A layer that came from transformers' Conv1D
    becomes an nn.Linear too; an nn.TransformerEncoderLayer goes on without its fast path.

    Args:
        model: the model. If it is itself a layer, ``report.model`` is the new one.

    Returns:
        A report of every layer that was quantized. Its candidates are float now, so their bytes
        after are more than before.

    Raises:
        TypeError: if ``model`` is no nn.Module.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Embedding(16, 64))
        >>> _ = quantize_model(model, {"0": "w4g64a", nn.Embedding: "w8"})
        >>> len(dequantize_model(model).replaced), model
        (2, Sequential(
          (0): Linear(in_features=64, out_features=64, bias=True)
          (1): Embedding(16, 64)
        ))
    """
    _check_model(model)
    sites = list(walker.walk(model))
    layers: dict[int, Layer] = {}
    for site in sites:
        if id(site.module) in layers:
            layers[id(site.module)].names.append(site.name)
        elif isinstance(site.module, QuantizedModule):
            was = getattr(site.module, "scheme", "int8")
            layers[id(site.module)] = Layer(
                site.module, [site.name], reason=f"was {was}", make=_dequantized
            )
    found = list(layers.values())
    return swap(sites, found, QuantizedModule, noun="quantized layers", caller="dequantize_model")


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model (a torch.nn.Module instance), not {model!r:.60}")


def _dequantized(old: Any, name: str) -> nn.Module:
    return old.dequantize()


# ---- what becomes of each layer --------------------------------------------------------------

_REPORTED = (QuantizedModule, nn.Embedding)


def _find(
    sites: list[Site], rules: Rules, excluded: dict[int, str], nonfinite: str, plain: Plain
) -> list[Layer]:
    """Every layer that the report is to speak of once, in the order of the model."""
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
