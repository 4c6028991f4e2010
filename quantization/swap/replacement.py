"""Put quantized layers in the place of a model's linear layers: all of them or none.

Here the layers are found; :mod:`quantization.swap.engine` builds the new ones and puts them in.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from quantization.layers.float_layers import looks_linear, plain_classes, why_left
from quantization.layers.quantized_module import QuantizedModule
from quantization.swap import walker
from quantization.swap.conversion import layer_maker
from quantization.swap.engine import Layer, swap
from quantization.swap.patterns import Pattern, match_patterns
from quantization.swap.report import ReplacementReport
from quantization.swap.target import Target, target_class_from
from quantization.swap.walker import Site

__all__ = [
    "ReplacementReport",
    "Target",
    "replace_linear_layers_with_w8a16",
    "target_class_from",
]


def replace_linear_layers_with_w8a16(
    module: nn.Module,
    target_class: Target | type[nn.Module],
    module_names_to_exclude: Pattern | Iterable[Pattern] = (),
    quantize: bool = True,
    *,
    strict: bool = False,
    untie: bool = False,
    nonfinite: str = "raise",
    plain_linear: Any = (),
) -> ReplacementReport:
    """Replace the linear layers of a model by quantized ones, in place, however deep they are.

    Replaced are modules of exactly the type nn.Linear, and transformers' Conv1D. Subclasses
    (out_proj of nn.MultiheadAttention, LoRA layers, ...) and layers whose weight something else
    computes (weight_norm, parametrized, pruned, lazy) are left, each with its reason in the report.
    Hooks, the training flag and attributes of a layer are carried over. A module that hangs in
    several places is converted once and stays shared; layers that share one weight share one set
    of codes. An nn.TransformerEncoderLayer that holds a replaced layer is told not to take the fast
    path that would bypass it (``activation_relu_or_gelu = 0``).

    On any error, an interrupt included, the model is exactly as it was. For that, float weights
    live until all layers are built: at its peak the model takes its bytes before plus after.
    A second call changes nothing.

    Args:
        module: the model, on any device including meta. If it is itself a linear layer, it has no
            parent to change: ``report.model`` is the new layer.
        target_class: ``Target.Linear(cls)``, or the class itself.
        module_names_to_exclude: what to leave in float, with all that it holds: child names
            (``"lm_head"``), dotted names, globs, ``"re:..."`` (searched for in the dotted name),
            module types, predicates(dotted name, module); one of them or several.
        quantize: False builds fresh layers of the same structure, with the biases but without the
            weights, to load a quantized state dict into.
        strict: raise if a layer would be left that no pattern excludes.
        untie: replace also a layer that shares its weight with a tensor that stays in float (a
            head tied to its embedding). The model then grows by the codes; by default such a layer
            is left and stays tied.
        nonfinite: ``"raise"``, or ``"mark"``: a row with a NaN or infinity becomes a row of NaN.
        plain_linear: as for :func:`quantization.quantize_model`.

    Returns:
        A report of every linear layer: replaced, or left and why, and bytes before and after.

    Raises:
        TypeError: if ``module`` is no nn.Module, or the target or a pattern is of a wrong kind.
        ValueError: if a pattern matches no module (with the nearest names), a weight holds a NaN
            or infinity (with its name and index), or, with ``strict``, a layer would be left.

    Example:
        >>> from quantization import QWQALinearLayer
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> report = replace_linear_layers_with_w8a16(model, Target.Linear(QWQALinearLayer), ["2"])
        >>> report
        ReplacementReport by QWQALinearLayer: 1 of 2 linear layers replaced, 1 excluded
        layer  bits  out x in   before   after  what
        0      8.50   64 x 64  16.6 kB  4.6 kB  replaced
        2              8 x 64   2.1 kB  2.1 kB  excluded: by '2'
        replaced layers: 16.6 kB -> 4.6 kB (0.277x)
        whole model: 18.7 kB -> 6.7 kB; 87.5% of its parameters are weights of
          QWQALinearLayer
        biggest tensors left in float: 2.weight [8, 64] float32 2.0 kB, 0.bias [64]
          float32 256 B, 2.bias [8] float32 32 B
    """
    cls = target_class_from(target_class)
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a model (a torch.nn.Module instance), not {module!r}")
    sites = list(walker.walk(module))
    excluded = match_patterns(sites, module_names_to_exclude)
    layers = _find(sites, cls, excluded, plain_classes(plain_linear))
    make = layer_maker(cls, quantize, nonfinite)
    for layer in layers:
        layer.make = make
    return swap(sites, layers, cls, strict=strict, untie=untie, quantized=quantize)


def _find(
    sites: list[Site], cls: type[nn.Module], excluded: dict[int, str], plain: tuple[Any, ...]
) -> list[Layer]:
    """Every linear layer once, in the order of the model."""
    adapters = walker.adapters(sites)
    targets = {id(site.module): "" for site in sites if isinstance(site.module, cls)}
    inside = walker.inherit(sites, targets)
    layers: dict[int, Layer] = {}
    for site in sites:
        key, module = id(site.module), site.module
        if key in layers:
            layers[key].names.append(site.name)
        elif key in targets:
            layers[key] = Layer(module, [site.name], "already")
        elif key in inside or not looks_linear(module):
            continue
        elif key in excluded:
            layers[key] = Layer(module, [site.name], "excluded", f"by {excluded[key]}")
        else:
            reason = adapters.get(key) or _why_left(module, plain) or ""
            layers[key] = Layer(module, [site.name], "left" if reason else "replaced", reason)
    return list(layers.values())


def _why_left(module: nn.Module, plain: tuple[Any, ...]) -> str | None:
    if isinstance(module, QuantizedModule):
        kind = type(module).__name__
        return f"quantized already, as a {kind}: dequantize_model makes it float again"
    return why_left(module, plain)
