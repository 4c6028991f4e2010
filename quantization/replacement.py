"""Put quantized layers in the place of a model's linear layers: all of them or none.

Two phases. First everything that can go wrong: find the layers, check patterns, build every new
layer. Then only assignments, which are taken back if an interrupt comes between them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from quantization import module_walker
from quantization.conversion import convert, memory_of, share_codes
from quantization.module_walker import Pattern, Site
from quantization.report import Candidate, FloatTensor, ReplacementReport
from quantization.target import Target, target_class_from

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
          layer  out x in   before   after  what
          0       64 x 64  16.6 kB  4.6 kB  replaced
          2        8 x 64   2.1 kB  2.1 kB  excluded: by '2'
        replaced layers: 16.6 kB -> 4.6 kB (0.277x)
        whole model: 18.7 kB -> 6.7 kB; 87.5% of its parameters are weights of QWQALinearLayer
        biggest tensors left in float: 2.weight [8, 64] float32 2.0 kB, 0.bias [64] float32 256 B, \
2.bias [8] float32 32 B
    """
    cls = target_class_from(target_class)
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a model (a torch.nn.Module instance), not {module!r}")
    sites = list(module_walker.walk(module))
    found = _find(sites, cls, module_walker.match_patterns(sites, module_names_to_exclude))
    _leave_tied(found, sites, untie)
    if strict:
        _refuse_left(found)
    _warn_if_nothing_to_do(found)
    for layer in found:
        if layer.status == "replaced":
            layer.new = convert(layer.module, layer.names[0], cls, quantize, nonfinite)
    share_codes([(layer.module, layer.new) for layer in found if layer.new is not None])
    swapped = {id(layer.module): layer.new for layer in found if layer.new is not None}
    report = _report(sites, found, cls, swapped, quantize)
    _assign(_stores(sites, swapped))
    return report


# ---- phase one: find -------------------------------------------------------------------------


@dataclass
class _Layer:
    """A linear layer, what becomes of it and why."""

    module: nn.Module
    names: list[str]
    status: str = "replaced"
    reason: str = ""
    new: nn.Module | None = None
    ties: list[str] = field(default_factory=list)


def _find(sites: list[Site], cls: type[nn.Module], excluded: dict[int, str]) -> list[_Layer]:
    """Every linear layer once, in the order of the model."""
    adapters = module_walker.adapters(sites)
    targets = {id(site.module): "" for site in sites if isinstance(site.module, cls)}
    inside = module_walker.inherit(sites, targets)
    layers: dict[int, _Layer] = {}
    for site in sites:
        key, module = id(site.module), site.module
        if key in layers:
            layers[key].names.append(site.name)
        elif key in targets:
            layers[key] = _Layer(module, [site.name], "already")
        elif key in inside or not module_walker.looks_linear(module):
            continue
        elif key in excluded:
            layers[key] = _Layer(module, [site.name], "excluded", f"by {excluded[key]}")
        else:
            reason = adapters.get(key) or module_walker.why_left(module) or ""
            layers[key] = _Layer(module, [site.name], "left" if reason else "replaced", reason)
    return list(layers.values())


def _leave_tied(layers: list[_Layer], sites: list[Site], untie: bool) -> None:
    """Leave those layers whose weight is also a tensor that stays in float, or say so."""
    replaced = {id(layer.module) for layer in layers if layer.status == "replaced"}
    staying: dict[tuple[int, int, int], str] = {}
    for name, tensor, owner in _tensors(sites):
        if id(owner) not in replaced:
            staying.setdefault(memory_of(tensor), name)
    for layer in layers:
        if layer.status != "replaced":
            continue
        other = staying.get(memory_of(layer.module.weight))
        if other is None:
            continue
        if untie:
            layer.reason = f"untied from {other}, which stays in float"
        else:
            layer.status = "left"
            layer.reason = (
                f"tied to {other}, which stays in float; untie=True replaces it all the same"
            )


def _tensors(sites: list[Site]) -> Iterable[tuple[str, torch.Tensor, nn.Module]]:
    """Parameters and buffers with their names and owners, those of a module once."""
    seen: set[int] = set()
    for site in sites:
        if id(site.module) in seen:
            continue
        seen.add(id(site.module))
        prefix = site.name + "." if site.name else ""
        for group in (site.module._parameters, site.module._buffers):
            for key, tensor in group.items():
                if tensor is not None and not nn.parameter.is_lazy(tensor):
                    yield prefix + key, tensor, site.module


def _refuse_left(layers: list[_Layer]) -> None:
    left = [layer for layer in layers if layer.status == "left"]
    if left:
        lines = [f"  {layer.names[0] or '(the model)'}: {layer.reason}" for layer in left]
        raise ValueError(
            f"strict: {len(left)} linear layers would be left in float, so nothing was changed; "
            "exclude them by name if that is meant\n" + "\n".join(lines)
        )


def _warn_if_nothing_to_do(layers: list[_Layer]) -> None:
    if any(layer.status != "left" for layer in layers):
        return
    why = "the model has no linear layer"
    if layers:
        why = f"{layers[0].names[0] or 'the model'} is {layers[0].reason}"
        why += f", and {len(layers) - 1} more in the report" if len(layers) > 1 else ""
    warnings.warn(f"no layer was replaced: {why}", stacklevel=3)


# ---- the report ------------------------------------------------------------------------------


def _report(
    sites: list[Site],
    layers: list[_Layer],
    cls: type[nn.Module],
    swapped: dict[int, nn.Module],
    quantize: bool,
) -> ReplacementReport:
    """The report of what is about to be done."""
    after_sites = [
        site._replace(module=swapped.get(id(site.module), site.module)) for site in sites
    ]
    before, after = list(_tensors(sites)), list(_tensors(after_sites))
    kept = {id(layer.module) for layer in layers if layer.status == "already"}
    old_ids, new_ids = set(swapped), {id(new) for new in swapped.values()}
    floats = _floats(after, kept | new_ids)
    covered = _covered(layers)
    total = covered + sum(_numel(tensor) for tensor in floats)
    return ReplacementReport(
        model=after_sites[0].module,
        target=cls,
        candidates=tuple(_candidate(layer) for layer in layers),
        float_tensors=tuple(floats),
        bytes_before=_nbytes(t for _, t, owner in before if id(owner) in old_ids),
        bytes_after=_nbytes(t for _, t, owner in after if id(owner) in new_ids),
        model_bytes_before=_nbytes(tensor for _, tensor, _ in before),
        model_bytes_after=_nbytes(tensor for _, tensor, _ in after),
        coverage=covered / total if total else 0.0,
        quantized=quantize,
    )


def _floats(
    tensors: Iterable[tuple[str, torch.Tensor, nn.Module]], targets: set[int]
) -> list[FloatTensor]:
    """Parameters that stay in float, and the biases of quantized layers; the biggest first."""
    floats: dict[tuple[int, int, int], FloatTensor] = {}
    for name, tensor, owner in tensors:
        if id(owner) in targets:
            counts = name.rpartition(".")[2] == "bias"
        else:
            counts = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
        if counts:
            dtype = str(tensor.dtype).removeprefix("torch.")
            entry = FloatTensor(name, tuple(tensor.shape), dtype, tensor.nbytes)
            floats.setdefault(memory_of(tensor), entry)
    return sorted(floats.values(), key=lambda tensor: -tensor.nbytes)


def _numel(tensor: FloatTensor) -> int:
    return torch.Size(tensor.shape).numel()


def _covered(layers: list[_Layer]) -> int:
    """Weights that are codes afterwards; one weight of two layers counts once."""
    codes: dict[Any, int] = {}
    for layer in layers:
        if layer.status in ("replaced", "already"):
            is_new = layer.new is not None
            key = memory_of(layer.module.weight) if is_new else id(layer.module)
            codes[key] = _candidate(layer).weights
    return sum(codes.values())


def _nbytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum({memory_of(tensor): tensor.nbytes for tensor in tensors}.values())


def _candidate(layer: _Layer) -> Candidate:
    old, now = layer.module, layer.new or layer.module
    before = [t for _, t, _ in _tensors([Site("", None, "", old)])]
    after = [t for _, t, _ in _tensors([Site("", None, "", now)])]
    return Candidate(
        name=layer.names[0],
        status=layer.status,
        reason=layer.reason,
        kind=type(old).__name__,
        shape=_shape(old, before),
        bytes_before=_nbytes(before),
        bytes_after=_nbytes(after),
        aliases=tuple(layer.names[1:]),
    )


def _shape(module: Any, tensors: list[torch.Tensor]) -> tuple[int, int] | None:
    """(out_features, in_features); None where there is no tensor of two dimensions."""
    matrix = next((tuple(tensor.shape) for tensor in tensors if tensor.ndim == 2), None)
    if matrix is None or module_walker.is_conv1d(module):
        return matrix and (matrix[1], matrix[0])
    sizes = getattr(module, "out_features", None), getattr(module, "in_features", None)
    return matrix if None in sizes else sizes


# ---- phase two: assign -----------------------------------------------------------------------


def _stores(sites: list[Site], swapped: dict[int, nn.Module]) -> list[tuple[dict, str, Any, Any]]:
    """What to write: (dict, key, new value, old value)."""
    stores: list[tuple[dict, str, Any, Any]] = [
        (site.parent._modules, site.key, swapped[id(site.module)], site.module)
        for site in sites
        if site.parent is not None and id(site.module) in swapped
    ]
    for site in sites:
        module: Any = site.module
        if isinstance(module, nn.TransformerEncoderLayer) and _new_children(module, swapped):
            stores.append(_flag(module, "activation_relu_or_gelu", 0))
        if isinstance(module, nn.TransformerEncoder):
            new = [child for layer in module.layers for child in _new_children(layer, swapped)]
            if not all(_has_weight(child) for child in new):
                stores.append(_flag(module, "use_nested_tensor", False))
    return stores


def _new_children(module: nn.Module, swapped: dict[int, nn.Module]) -> list[nn.Module]:
    return [swapped[id(child)] for child in module._modules.values() if id(child) in swapped]


def _has_weight(module: nn.Module) -> bool:
    """Whether nn.TransformerEncoder can read ``.weight``, without computing one."""
    return hasattr(type(module), "weight") or "weight" in {*module._parameters, *module._buffers}


def _flag(module: nn.Module, name: str, value: Any) -> tuple[dict, str, Any, Any]:
    return module.__dict__, name, value, module.__dict__.get(name, value)


def _assign(stores: list[tuple[dict, str, Any, Any]]) -> None:
    try:
        for mapping, key, new, _ in stores:
            mapping[key] = new
    except BaseException:
        for mapping, key, _, old in stores:
            mapping[key] = old
        raise
