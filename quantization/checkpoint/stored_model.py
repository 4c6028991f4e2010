"""A quantized model outside of any module: what files hold, whatever their format.

Layers with packed weights by their dotted names, all other tensors by their keys in a state dict.
Both are lazy: shapes and types are known, numbers are read when ``load`` is called. Readers of a
format make a :class:`StoredModel`, writers take one; :func:`stored_model` makes one of a module,
and :func:`quantization.checkpoint.restore.restore_model` puts one into a module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantization.checkpoint.disk.stored_tensor import StoredTensor, key_of
from quantization.layers.int8_layer import QWQALinearLayer
from quantization.layers.packed_embedding import PackedEmbedding
from quantization.layers.packed_layer import PackedLinearLayer
from quantization.layers.quantized_module import QuantizedModule
from quantization.ops.dtypes import name_of
from quantization.schemes.packed_weights import PackedWeights
from quantization.schemes.scheme import Scheme
from quantization.swap.conversion import memory_of
from quantization.swap.walker import Site, walk

__all__ = [
    "KINDS",
    "StoredLayer",
    "StoredModel",
    "saved_tensors",
    "stored_model",
    "unwrapped",
]

#: Kinds of layers, and the class of each.
KINDS: dict[str, type[QuantizedModule]] = {
    "linear": PackedLinearLayer,
    "int8_linear": QWQALinearLayer,
    "embedding": PackedEmbedding,
}


@dataclass(frozen=True)
class StoredLayer:
    """A layer whose weight is packed; its bias, if any, is a tensor of the model beside it.

    Attributes:
        kind: ``"linear"``, ``"int8_linear"`` (:class:`quantization.QWQALinearLayer`) or
            ``"embedding"``.
        scheme: of its codes; of an int8 layer ``Scheme.int8()``.
        shape: (out_features, in_features), or (num_embeddings, embedding_dim).
        dtype: of the layer's floats, by name.
        load: reads the weight, as torch tensors.
        more: what else a module of the kind needs: ``padding_idx`` of an embedding;
            ``was_conv1d``, if a linear layer came from a Conv1D of transformers.
        method: by which its codes were found, by name; empty where nobody knows.
    """

    kind: str
    scheme: Scheme
    shape: tuple[int, int]
    dtype: str
    load: Callable[[], PackedWeights]
    more: Mapping[str, Any] = field(default_factory=dict)
    method: str = ""

    @classmethod
    def of(cls, packed: PackedWeights, kind: str = "linear", **more: Any) -> StoredLayer:
        """A layer of weights that are there already.

        Example:
            >>> from quantization import pack_matrix
            >>> StoredLayer.of(pack_matrix(torch.eye(8), "w4")).shape
            (8, 8)
        """
        return cls(kind, packed.scheme, packed.shape, packed.dtype, lambda: packed, more)

    def module(self, bias: torch.Tensor | None = None) -> QuantizedModule:
        """The module of that layer, with that bias.

        Example:
            >>> from quantization import pack_matrix
            >>> StoredLayer.of(pack_matrix(torch.eye(8), "w4")).module().out_features
            8
        """
        layer: QuantizedModule
        if self.kind == "embedding":
            layer = PackedEmbedding.from_packed(self.load(), self.more.get("padding_idx"))
        else:
            cls: Any = KINDS[self.kind]
            layer = cls.from_packed(self.load(), bias)
            layer.was_conv1d = "was_conv1d" in self.more
        layer.method = self.method
        return layer


@dataclass(frozen=True)
class StoredModel:
    """Layers and tensors of a model, and what belongs to it.

    Attributes:
        layers: packed layers by dotted name; ``""`` where the model itself is the layer.
        tensors: all other parameters and buffers by their keys in a state dict.
        ties: keys of a state dict that hold the same tensor as another key: later key -> first.
            The keys of packed weights count too. A tied tensor is also among ``tensors``.
        config: the ``config.json`` of transformers as plain values, or None.
        assets: further files that belong to the model (tokenizer, generation settings).
        inner: further files of sub-folders (modules of sentence-transformers) by their names below
            the folder, "/" between.

    Example:
        >>> from quantization import quantize_model
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32))
        >>> _ = quantize_model(model, "w4g32")
        >>> stored = stored_model(model)
        >>> list(stored.layers), list(stored.tensors)
        (['0'], ['0.bias', '1.weight', '1.bias'])
    """

    layers: Mapping[str, StoredLayer]
    tensors: Mapping[str, StoredTensor]
    ties: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    assets: tuple[Path, ...] = ()
    inner: Mapping[str, Path] = field(default_factory=dict)


def stored_model(model: nn.Module, config: Mapping[str, Any] | None = None) -> StoredModel:
    """What a model holds, without copying a tensor.

    Args:
        model: a module; of its tensors those that a state dict has.
        config: what :attr:`StoredModel.config` is to be.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if a module has a state that is more than its dense parameters and buffers, or
            a parameter has no shape yet (a lazy module).

    Example:
        >>> stored_model(QWQALinearLayer(64, 32)).layers[""].kind
        'int8_linear'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model (a torch.nn.Module instance), not {model!r:.60}")
    model = unwrapped(model)
    layers: dict[str, StoredLayer] = {}
    tensors: dict[str, StoredTensor] = {}
    ties: dict[str, str] = {}
    firsts: dict[tuple[Any, ...], str] = {}
    for site in walk(model):
        parts: tuple[str, ...] = ()
        if isinstance(site.module, QuantizedModule):
            layers[site.name] = _layer_of(site.module)
            parts = site.module._weight_names()
        for name, tensor in saved_tensors(site):
            key = key_of(site.name, name)
            if tensor.numel():
                same = (*memory_of(tensor), tensor.shape, tensor.stride(), tensor.dtype)
                first = firsts.setdefault(same, key)
                if first != key:
                    ties[key] = first
            if name not in parts:
                tensors[key] = StoredTensor.of(tensor.detach())
    return StoredModel(layers, tensors, ties, config)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what ``torch.compile`` or data parallelism wraps around one.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> unwrapped(torch.compile(nn.DataParallel(model))) is model
        True
    """
    while True:
        if type(model).__name__ == "OptimizedModule" and "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def saved_tensors(site: Site) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that ``state_dict`` has of one module, not of its children.

    Raises:
        ValueError: for a state that is more than that, a sparse tensor, or one without a shape
            (lazy).
    """
    module = site.module
    _refuse_more(module, site.name or "the model")
    for group in (module._parameters, module._buffers):
        for name, tensor in group.items():
            if tensor is None or name in module._non_persistent_buffers_set:
                continue
            if nn.parameter.is_lazy(tensor):
                raise ValueError(
                    f"{site.name or 'the model'} is lazy: {name} has no shape yet; run the model "
                    "once on an input first"
                )
            if tensor.layout is not torch.strided:
                raise ValueError(
                    f"{site.name or 'the model'}: {name} is {tensor.layout}; only dense tensors "
                    "can be stored"
                )
            yield name, tensor


def _refuse_more(module: nn.Module, name: str) -> None:
    """A state dict may have what is neither parameter nor buffer; nothing is lost in silence."""
    if type(module).get_extra_state is not nn.Module.get_extra_state:
        raise ValueError(
            f"{name} ({type(module).__name__}) has an extra state, which is no tensor and cannot "
            "be stored"
        )
    if type(module)._save_to_state_dict is not nn.Module._save_to_state_dict:
        state: dict[str, Any] = {}
        module._save_to_state_dict(state, "", True)
        more = state.keys() - module._parameters.keys() - module._buffers.keys()
        if more:
            raise ValueError(
                f"{name} ({type(module).__name__}) puts more into a state dict than its parameters "
                f"and buffers, which cannot be stored: {', '.join(sorted(more))}"
            )


def _layer_of(module: QuantizedModule) -> StoredLayer:
    more: dict[str, Any] = {}
    if module.was_conv1d:
        more["was_conv1d"] = True
    if isinstance(module, PackedEmbedding):
        more["padding_idx"] = module.padding_idx
    kind = next(kind for kind, cls in KINDS.items() if isinstance(module, cls))
    shape, dtype = module._weight_shape(), name_of(module.dtype)
    scheme = getattr(module, "scheme", Scheme.int8())
    return StoredLayer(kind, scheme, shape, dtype, module.packed, more, module.method)
