"""Put what is stored into the module that it belongs to: all of it or nothing."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from quantization.checkpoint.disk.stored_tensor import key_of
from quantization.checkpoint.stored_model import StoredLayer, StoredModel, saved_tensors, unwrapped
from quantization.layers.float_layers import is_conv1d, why_embedding_left, why_left
from quantization.layers.quantized_module import QuantizedModule
from quantization.ops.dtypes import SOURCES, name_of
from quantization.swap import OBSERVERS
from quantization.swap.attention import splitting_attention
from quantization.swap.conversion import convert
from quantization.swap.engine import Store, assign, stores_of, tensors_of
from quantization.swap.experts import UnfusedExperts, bare_experts, why_fused
from quantization.swap.walker import Site, walk

__all__ = ["RestoreError", "restore_model"]

_SHOWN = 5


class RestoreError(ValueError):
    """What is stored does not fit the model."""


def restore_model(stored: StoredModel, model: nn.Module) -> nn.Module:
    """Give a model the layers and tensors that are stored; it is changed in place.

    Tensors are assigned, not copied: where the stored ones are views of a file, so are the model's
    afterwards. Layers of the stored names become quantized ones, with hooks, training flag and
    attributes of those that were there; dtypes are those stored; Parameters stay Parameters, and
    ``requires_grad`` stays. What is tied in the stored model is tied afterwards. Fused experts
    whose layers are stored one by one are unfused, as :func:`quantization.unfuse_experts` does.

    Args:
        stored: of a reader, or of :func:`quantization.checkpoint.stored_model.stored_model`.
        model: float or quantized, with or without numbers (meta).

    Returns:
        ``model``; or, where the model itself is a layer that is replaced, the new one.

    Raises:
        TypeError: if ``model`` is no module.
        RestoreError: if a layer or tensor is missing, one too many, or has another shape, or a
            buffer that no file has would stay on meta. The model is then as it was.

    Example:
        >>> from quantization import quantize_model
        >>> from quantization.checkpoint.stored_model import stored_model
        >>> model, other = nn.Sequential(nn.Linear(64, 32)), nn.Sequential(nn.Linear(64, 32))
        >>> _ = quantize_model(model, "w4g32")
        >>> x = torch.randn(2, 64)
        >>> torch.equal(restore_model(stored_model(model), other)(x), model(x))
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model (a torch.nn.Module instance), not {model!r:.60}")
    inner = unwrapped(model)
    split = {name.rpartition(".")[0] for name in stored.layers}
    with splitting_attention(inner, split.__contains__):
        unfused = _unfused(stored, list(walk(inner)))
        assign(unfused)
        try:
            sites = list(walk(inner))
            made = _layers(stored, sites)
            stores = _tensor_stores(stored, sites, made)
            _refuse_meta(sites, made, stores)
        except BaseException:
            assign([(mapping, name, old, new) for mapping, name, new, old in unfused])
            raise
        assign(stores + stores_of(sites, made))
    restored = made.get(id(inner), model)
    for observe in OBSERVERS:
        observe(restored)
    return restored


def _unfused(stored: StoredModel, sites: list[Site]) -> list[Store]:
    """What gives experts, fused in the model, the linear layers that are stored for them."""
    keys = (key.split(".") for key in (*stored.layers, *stored.tensors))
    paths = {".".join(key[:i]) for key in keys for i, part in enumerate(key) if part == "0"}
    bare = bare_experts(sites)
    made: dict[int, nn.Module] = {}
    for site in sites:
        here = id(site.module)
        if here in bare and here not in made and site.name in paths and not why_fused(site.module):
            made[here] = UnfusedExperts(site.module)
    return stores_of(sites, made)


def _layers(stored: StoredModel, sites: list[Site]) -> dict[int, nn.Module]:
    """The new layers, by the id of the module that each takes the place of."""
    modules = {site.name: site.module for site in sites}
    unknown = [name for name in stored.layers if name not in modules]
    if unknown:
        raise RestoreError(
            f"{len(unknown)} stored layers are none of the model's: {_some(unknown)}"
            f"{_nearest(unknown[0], modules)}"
        )
    made: dict[int, nn.Module] = {}
    for name, layer in stored.layers.items():
        old = modules[name]
        if id(old) not in made:
            bias = stored.tensors.get(key := key_of(name, "bias"))
            _check_layer(name, layer, old, bias is not None)
            if bias is not None and bias.dtype not in SOURCES:
                raise RestoreError(
                    f"{key} is stored as {bias.dtype}; a bias is one of {', '.join(SOURCES)}: "
                    "convert it in the files first"
                )
            make = partial(_module, stored=layer, bias=None if bias is None else bias.load())
            made[id(old)] = convert(old, name, make)
    return made


def _module(old: nn.Module, name: str, *, stored: StoredLayer, bias: Any) -> nn.Module:
    trained = old._parameters.get("bias") if isinstance(old, QuantizedModule) else None
    if bias is not None and trained is not None:
        bias = nn.Parameter(bias, trained.requires_grad)
    return stored.module(bias)


def _check_layer(name: str, layer: StoredLayer, old: nn.Module, has_bias: bool) -> None:
    is_table = layer.kind == "embedding"
    if not isinstance(old, QuantizedModule):
        reason = why_embedding_left(old) if is_table else why_left(old, {type(old)})
        if reason:
            raise RestoreError(f"{name or 'the model'} cannot become a quantized layer: {reason}")
    elif isinstance(old, nn.Embedding) != is_table:
        kind = "an embedding" if is_table else "a linear layer"
        raise RestoreError(f"{name} is stored as {kind}; the model's is {type(old).__name__}")
    shape = old._weight_shape() if isinstance(old, QuantizedModule) else tuple(old.weight.shape)
    shape = shape[::-1] if is_conv1d(old) else shape
    if shape != layer.shape:
        raise RestoreError(
            f"{name or 'the model'} is stored with shape {layer.shape}; the model's is {shape}"
        )
    if has_bias != (getattr(old, "bias", None) is not None):
        found = ("without", "with") if has_bias else ("with", "without")
        raise RestoreError(
            f"{name or 'the model'} is stored {found[1]} a bias; the model's is {found[0]} one"
        )


# ---- all other tensors -----------------------------------------------------------------------


def _tensor_stores(
    stored: StoredModel, sites: list[Site], made: dict[int, nn.Module]
) -> list[Store]:
    """What gives the tensors that no new layer holds to the modules of the model."""
    wanted = _needed_tensors(sites, made)
    keys = {id(old): key for key, _, _, old in reversed(wanted) if key in stored.tensors}
    missing = [key for key, _, _, old in wanted if id(old) not in keys]
    used = {key for key, *_ in wanted} | {key_of(name, "bias") for name in stored.layers}
    _refuse_keys(missing, [key for key in stored.tensors if key not in used], wanted)
    stores: list[Store] = []
    given: dict[tuple[str, Any], torch.Tensor] = {}
    for key, mapping, name, old in wanted:
        source = key if key in stored.tensors else keys[id(old)]
        _check_tensor(key, stored.tensors[source], old)
        kind = old.requires_grad if isinstance(old, nn.Parameter) else None
        same = (stored.ties.get(source, source), kind)
        if same not in given:
            tensor = stored.tensors[source].load()
            given[same] = tensor if kind is None else nn.Parameter(tensor, kind)
        stores.append((mapping, name, given[same], old))
    return stores


def _needed_tensors(
    sites: Iterable[Site], made: dict[int, nn.Module]
) -> list[tuple[str, dict[str, Any], str, torch.Tensor]]:
    """(key, mapping, name, tensor) of what a state dict has beside the new layers."""
    wanted = []
    for site in sites:
        module = site.module
        for name, tensor in saved_tensors(site) if id(module) not in made else ():
            mapping = module._parameters if name in module._parameters else module._buffers
            wanted.append((key_of(site.name, name), mapping, name, tensor))
    return wanted


def _refuse_keys(missing: list[str], extra: list[str], wanted: Collection[Any]) -> None:
    if missing:
        raise RestoreError(f"{len(missing)} tensors of the model are not stored: {_some(missing)}")
    if extra:
        raise RestoreError(
            f"{len(extra)} stored tensors are none of the model's: {_some(extra)}"
            f"{_nearest(extra[0], [key for key, *_ in wanted])}"
        )


def _check_tensor(key: str, stored: Any, old: torch.Tensor) -> None:
    if tuple(old.shape) != stored.shape:
        raise RestoreError(
            f"{key} is stored with shape {stored.shape}; the model's is {tuple(old.shape)}"
        )
    is_float = getattr(torch, stored.dtype).is_floating_point
    is_counter = key.endswith("num_batches_tracked")  # which transformers may load as a float
    if is_float != old.is_floating_point() and not is_counter:
        raise RestoreError(
            f"{key} is stored as {stored.dtype}; the model's is {name_of(old.dtype)}"
        )


def _refuse_meta(sites: list[Site], made: dict[int, nn.Module], stores: list[Store]) -> None:
    """Buffers that no state dict has need numbers of their own."""
    given = {(id(mapping), name) for mapping, name, _, _ in stores}
    bare = []
    for key, tensor, owner in tensors_of(sites):
        name = key.rpartition(".")[2]
        places = ((id(owner._parameters), name), (id(owner._buffers), name))
        if tensor.is_meta and id(owner) not in made and not given.intersection(places):
            bare.append(key)
    if bare:
        raise RestoreError(
            f"{len(bare)} tensors of the model are on meta and not stored, as they are not "
            f"persistent: {_some(bare)}. Build the model with its parameters on meta only, by "
            "accelerate.init_empty_weights(include_buffers=False)"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names)[:5000], n=1)
    return f"; the nearest name of the model is {near[0]}" if near else ""
