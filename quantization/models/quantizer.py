"""Quantize the layers of a model by a recipe, and bring them back to float: whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from quantization.console.progress import Progress
from quantization.layers.quantized_module import QuantizedModule
from quantization.methods.statistics import Statistics
from quantization.models.decisions import PlainLinear, Request, form_of, make_layer
from quantization.models.plan import ModelPlan, carry_out, check_model
from quantization.models.recipe import Recipe
from quantization.swap import walker
from quantization.swap.engine import Layer, swap
from quantization.swap.patterns import Pattern
from quantization.swap.report import ReplacementReport

__all__ = ["dequantize_model", "form_of", "make_layer", "quantize_model"]


def quantize_model(
    model: nn.Module,
    recipe: Recipe | ModelPlan,
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
            name, module). Or a :func:`quantization.plan` of this model, which knows all the rest.
        exclude: patterns of what to leave in float before any rule is looked at.
        strict: raise if a layer would be left that neither a pattern excludes nor a rule with None.
        untie: quantize also a layer that shares its weight with a tensor that stays in float. The
            model then grows by the codes.
        nonfinite: ``"raise"``, or ``"mark"``: a group with a NaN or infinity becomes NaN.
        statistics: of the inputs of layers by dotted name, of this model in float:
            :func:`quantization.calibrate`. For methods that use them; a layer without them is
            fitted as if its columns counted the same, and the report says so.
        progress: True for a bar on stderr, False for none, or a function that is called with (done,
            total) layers; None: a bar on a terminal or in a notebook, if it lasts over a second.
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
    if isinstance(recipe, ModelPlan):
        given = (exclude, strict, untie, nonfinite, statistics, plain_linear, split_attention)
        if given != ((), False, False, "raise", None, (), True):
            raise TypeError("a plan knows its options: give them to plan(), and only progress here")
        if recipe.model is not model:
            raise ValueError("this is the plan of another model: plan(model, recipe) makes one")
        return recipe.apply(progress=progress)
    request = Request(
        recipe, exclude, strict, untie, nonfinite, statistics, plain_linear, split_attention
    )
    return carry_out(model, request, progress)


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
    check_model(model)
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


def _dequantized(old: Any, name: str) -> nn.Module:
    return old.dequantize()
