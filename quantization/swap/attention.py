"""nn.MultiheadAttention cut into linear layers for a swap, and for good where one is swapped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from quantization.layers.attention import LayeredAttention
from quantization.layers.quantized_module import QuantizedModule
from quantization.swap import walker
from quantization.swap.conversion import convert
from quantization.swap.engine import Store, assign

__all__ = ["splitting_attention"]


@contextmanager
def splitting_attention(
    model: nn.Module, wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[None]:
    """Put :class:`LayeredAttention` in the places of attention; take back what nothing came of.

    Left are subclasses, parametrized ones, a model that is one itself, and those of models of
    transformers, which reads and writes them by the names of their tensors.

    Args:
        model: what is changed.
        wanted: whether the attention of that dotted name is to be split.

    Example:
        >>> model = nn.TransformerEncoderLayer(16, 2)
        >>> with splitting_attention(model):
        ...     print(type(model.self_attn).__name__)
        LayeredAttention
        >>> type(model.self_attn).__name__
        'MultiheadAttention'
    """
    sites = list(walker.walk(model))
    named = {id(site.module): "" for site in sites if hasattr(site.module, "_tied_weights_keys")}
    kept = walker.inherit(sites, named)
    made: dict[int, nn.Module] = {}
    stores: list[Store] = []
    parents: list[nn.Module] = []
    for site in sites:
        old = site.module
        if site.parent is None or not _is_plain(old) or id(old) in kept or not wanted(site.name):
            continue
        if id(old) not in made:
            made[id(old)] = convert(old, site.name, _layered)
        stores.append((site.parent._modules, site.key, made[id(old)], old))
        parents.append(site.parent)
    assign(stores)
    try:
        yield
    finally:
        for (mapping, key, new, old), parent in zip(stores, parents, strict=True):
            if not any(isinstance(module, QuantizedModule) for module in new.modules()):
                mapping[key] = old
            elif isinstance(parent, nn.TransformerEncoderLayer):  # its fast path calls no layer
                parent.activation_relu_or_gelu = 0


def _layered(old: Any, name: str) -> nn.Module:
    return LayeredAttention(old)


def _is_plain(module: Any) -> bool:
    return type(module) is nn.MultiheadAttention and not (
        parametrize.is_parametrized(module)
        or parametrize.is_parametrized(module.out_proj)
        or "forward" in vars(module)
        or type(module.out_proj) is not nn.modules.linear.NonDynamicallyQuantizableLinear
    )
