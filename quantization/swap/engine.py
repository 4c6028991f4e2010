"""The engine of every replacement: layers of a model for others, all of them or none.

Two phases. First everything that can go wrong: what is to be done with each layer was found by the
caller; here ties are looked at and every new layer is built. Then only assignments, which are taken
back if an interrupt comes between them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quantization.console.progress import Progress, shown
from quantization.layers.arena import lay_out_layers
from quantization.layers.float_layers import is_conv1d
from quantization.layers.quantized_module import QuantizedModule
from quantization.swap import OBSERVERS, walker
from quantization.swap.conversion import Maker, convert, memory_of, share_weights, weight_of
from quantization.swap.report import Candidate, FloatTensor, ReplacementReport
from quantization.swap.walker import Site


@dataclass
class Layer:
    """A layer that a report speaks of, what becomes of it and why.

    Attributes:
        module: the layer, or the module that holds the bare ``parameter``.
        names: all its dotted names.
        status, reason: as in :class:`quantization.swap.report.Candidate`.
        make: how to build what comes in its place, where the status is ``"replaced"``.
        new: what was built.
        parameter: the key of a bare Parameter that this is about instead.
        is_other: it is no linear layer; it is named, and no reason for ``strict`` to refuse.
        method: how its codes are found, for the report.
    """

    module: nn.Module
    names: list[str]
    status: str = "replaced"
    reason: str = ""
    make: Maker | None = None
    new: nn.Module | None = None
    parameter: str = ""
    is_other: bool = False
    method: Any = "rtn"

    @property
    def now(self) -> nn.Module:
        """What stands in its place afterwards."""
        return self.new or self.module


def swap(
    sites: list[Site],
    layers: list[Layer],
    target: type[nn.Module],
    *,
    strict: bool = False,
    untie: bool = False,
    progress: Progress | bool | None = None,
    noun: str = "linear layers",
    **words: Any,
) -> ReplacementReport:
    """Build what the layers of status ``"replaced"`` are to become, put it in, and report.

    Args:
        sites: all places of the model.
        layers: what is to be done, each module once, in the order of the model.
        target: the class of layer that counts as covered in the report.
        strict: raise if a layer would be left.
        untie: replace also what shares its weight with a tensor that stays.
        progress: True for a bar, or a function that is called with (done, total) layers.
        noun: what the layers are called.
        **words: further fields of the report.

    Raises:
        ValueError: with ``strict``, if a layer would be left.
        Exception: whatever building a layer raises. The model is then as it was.
    """
    leave_tied(layers, sites, untie)
    if strict:
        _refuse_left(layers, noun)
    _warn_if_nothing_to_do(layers, noun)
    work = [layer for layer in layers if layer.status == "replaced" and layer.make is not None]
    with shown(progress, "quantizing", work) as told:
        for layer in told:
            layer.new = convert(layer.module, layer.names[0], layer.make)
    share_weights([(layer.module, layer.new) for layer in layers if layer.new is not None])
    made = [m for layer in layers if layer.new is not None for m in layer.new.modules()]
    lay_out_layers(module for module in made if isinstance(module, QuantizedModule))
    swapped = {id(layer.module): layer.new for layer in layers if layer.new is not None}
    report = _report(sites, layers, target, swapped, {"noun": noun} | words)
    assign(stores_of(sites, swapped))
    for observe in OBSERVERS:
        observe(report.model)
    return report


# ---- before anything is built ----------------------------------------------------------------


def leave_tied(layers: list[Layer], sites: list[Site], untie: bool) -> None:
    """Leave those layers whose weight is also a tensor that stays as it is, or say so."""
    replaced = {id(layer.module) for layer in layers if layer.status == "replaced"}
    staying: dict[tuple[int, int, int], str] = {}
    for name, tensor, owner in tensors_of(sites):
        if id(owner) not in replaced:
            staying.setdefault(memory_of(tensor), name)
    for layer in layers:
        if layer.status != "replaced":
            continue
        weight = weight_of(layer.module)
        other = None if weight is None else staying.get(memory_of(weight))
        if other is None:
            continue
        stays = "stays as it is" if isinstance(layer.module, QuantizedModule) else "stays in float"
        if untie:
            layer.reason = f"untied from {other}, which {stays}"
        else:
            layer.status = "left"
            layer.reason = f"tied to {other}, which {stays}; untie=True replaces it all the same"


def tensors_of(sites: Iterable[Site]) -> Iterable[tuple[str, torch.Tensor, nn.Module]]:
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


def _refuse_left(layers: list[Layer], noun: str) -> None:
    left = [layer for layer in layers if layer.status == "left" and not layer.is_other]
    if left:
        lines = [f"  {layer.names[0] or '(the model)'}: {layer.reason}" for layer in left]
        raise ValueError(
            f"strict: {len(left)} {noun} would be left in float, so nothing was changed; "
            "exclude them by name if that is meant\n" + "\n".join(lines)
        )


def _warn_if_nothing_to_do(layers: list[Layer], noun: str) -> None:
    left = [layer for layer in layers if layer.status == "left"]
    if any(layer.status in ("replaced", "already") for layer in layers) or (layers and not left):
        return
    why = f"the model has no {noun}"
    if left:
        why = f"{left[0].names[0] or 'the model'} is {left[0].reason}"
        why += f", and {len(left) - 1} more in the report" if len(left) > 1 else ""
    warnings.warn(f"no layer was replaced: {why}", stacklevel=4)


# ---- the report ------------------------------------------------------------------------------


def _report(
    sites: list[Site],
    layers: list[Layer],
    target: type[nn.Module],
    swapped: dict[int, nn.Module],
    words: dict[str, Any],
) -> ReplacementReport:
    """The report of what is about to be done."""
    after_sites = list(_sites_after(sites, swapped))
    before, after = list(tensors_of(sites)), list(tensors_of(after_sites))
    old_ids = set(swapped)
    new_ids = {id(module) for new in swapped.values() for module in new.modules()}
    quantized = [layer for layer in layers if isinstance(layer.now, target) and not layer.parameter]
    floats = _floats(after, {id(layer.now) for layer in quantized})
    covered = _covered(quantized)
    total = covered + sum(torch.Size(tensor.shape).numel() for tensor in floats)
    return ReplacementReport(
        model=after_sites[0].module,
        target=target,
        candidates=tuple(_candidate(layer) for layer in layers),
        float_tensors=tuple(floats),
        bytes_before=_nbytes(t for _, t, owner in before if id(owner) in old_ids),
        bytes_after=_nbytes(t for _, t, owner in after if id(owner) in new_ids),
        model_bytes_before=_nbytes(tensor for _, tensor, _ in before),
        model_bytes_after=_nbytes(tensor for _, tensor, _ in after),
        coverage=covered / total if total else 0.0,
        **words,
    )


def _sites_after(sites: list[Site], swapped: dict[int, nn.Module]) -> Iterable[Site]:
    """The places of the model with the new modules in, and with what these hold."""
    for site in sites:
        new = swapped.get(id(site.module))
        if new is None:
            yield site
            continue
        for inner in walker.walk(new):
            name = ".".join(filter(None, (site.name, inner.name)))
            yield inner._replace(name=name)


def _floats(
    tensors: Iterable[tuple[str, torch.Tensor, nn.Module]], quantized: set[int]
) -> list[FloatTensor]:
    """Parameters that stay in float, and the biases of quantized layers; the biggest first."""
    floats: dict[tuple[int, int, int], FloatTensor] = {}
    for name, tensor, owner in tensors:
        if id(owner) in quantized:
            counts = name.rpartition(".")[2] == "bias"
        else:
            counts = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
        if counts:
            dtype = str(tensor.dtype).removeprefix("torch.")
            entry = FloatTensor(name, tuple(tensor.shape), dtype, tensor.nbytes)
            floats.setdefault(memory_of(tensor), entry)
    return sorted(floats.values(), key=lambda tensor: -tensor.nbytes)


def _covered(layers: list[Layer]) -> int:
    """Weights that are codes afterwards; one weight of two layers counts once."""
    codes: dict[Any, int] = {}
    for layer in layers:
        is_known = layer.new is not None or isinstance(layer.module, QuantizedModule)
        weight = weight_of(layer.module) if is_known else None
        key = id(layer.module) if weight is None else memory_of(weight)
        codes[key] = _candidate(layer).weights
    return sum(codes.values())


def _nbytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum({memory_of(tensor): tensor.nbytes for tensor in tensors}.values())


def _candidate(layer: Layer) -> Candidate:
    old, now = layer.module, layer.now
    before, after = _tensors_in(layer, old), _tensors_in(layer, now)
    bare = layer.parameter and tuple(old._parameters[layer.parameter].shape)
    scheme = getattr(now, "scheme", None) if isinstance(now, QuantizedModule) else None
    return Candidate(
        name=layer.names[0],
        status=layer.status,
        reason=layer.reason,
        kind=type(old).__name__,
        shape=bare or _shape(old, before),
        bytes_before=_nbytes(before),
        bytes_after=_nbytes(after),
        aliases=tuple(layer.names[1:]),
        scheme="" if scheme is None else str(scheme),
        bits_per_weight=now.bits_per_weight if isinstance(now, QuantizedModule) else None,
        method=layer.method,
    )


def _tensors_in(layer: Layer, module: nn.Module) -> list[torch.Tensor]:
    if layer.parameter:
        return [module._parameters[layer.parameter]]
    return [tensor for _, tensor, _ in tensors_of(walker.walk(module))]


def _shape(module: Any, tensors: list[torch.Tensor]) -> tuple[int, int] | None:
    """(out_features, in_features); None where there is no tensor of two dimensions."""
    if isinstance(module, QuantizedModule):
        return module._weight_shape()
    matrix = next((tuple(tensor.shape) for tensor in tensors if tensor.ndim == 2), None)
    if matrix is None or is_conv1d(module):
        return matrix and (matrix[1], matrix[0])
    sizes = getattr(module, "out_features", None), getattr(module, "in_features", None)
    return matrix if None in sizes else sizes


# ---- phase two: assign -----------------------------------------------------------------------


#: What to write: (mapping, key, new value, old value).
Store = tuple[dict[str, Any], str, Any, Any]


def stores_of(sites: list[Site], swapped: dict[int, nn.Module]) -> list[Store]:
    """What puts new modules, by the id of the old one, in the places of a model."""
    stores: list[Store] = [
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
    new = [swapped[id(child)] for child in module._modules.values() if id(child) in swapped]
    return [child for child in new if type(child) is not nn.Linear]


def _has_weight(module: nn.Module) -> bool:
    """Whether nn.TransformerEncoder can read ``.weight``, without computing one."""
    return hasattr(type(module), "weight") or "weight" in {*module._parameters, *module._buffers}


def _flag(module: nn.Module, name: str, value: Any) -> Store:
    return module.__dict__, name, value, module.__dict__.get(name, value)


def assign(stores: list[Store]) -> None:
    """Write all of it, or, if an interrupt comes in between, none."""
    try:
        for mapping, key, new, _ in stores:
            mapping[key] = new
    except BaseException:
        for mapping, key, _, old in stores:
            mapping[key] = old
        raise
