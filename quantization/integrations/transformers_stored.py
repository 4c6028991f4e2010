"""Codes that transformers saves and reads: which tensors there are, and whether they fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import str_to_torch_dtype

from quantization.integrations.transformers_config import QuantizationConfig, rules_of
from quantization.integrations.transformers_ties import share_tensors
from quantization.layers.packed_module import PackedModule
from quantization.layers.quantized_module import QuantizedModule, check_incoming, placeholder
from quantization.models.quantizer import form_of, quantize_model
from quantization.schemes.column_order import COLUMN_PARTS, check_columns
from quantization.swap.experts import bare_experts, unfuse_experts
from quantization.swap.report import ReplacementReport
from quantization.swap.walker import walk

__all__ = ["StoredWeights", "state_dict_of"]

_SHOWN = 5


def state_dict_of(model: nn.Module, config: QuantizationConfig) -> dict[str, torch.Tensor]:
    """What is saved of a model: each code once, and a placeholder for each float weight.

    Args:
        model: a model of transformers.
        config: it describes the model.

    Example:
        >>> from quantization import PackedLinearLayer
        >>> model = nn.Sequential(PackedLinearLayer(8, 8, bias=False, scheme="w4"))
        >>> [*state_dict_of(model, QuantizationConfig.of(model))]
        ['0.packed_weights', '0.scales', '0.weight']
    """
    state = model.state_dict()
    for key in config.ties:
        state.pop(key, None)
    for name in config.layers or ():
        state[f"{name}.weight"] = placeholder()
    return state


class StoredWeights:
    """The quantized layers of a model that is being read, and which of their tensors came.

    Args:
        model: a model of transformers on meta; the layers of the config become quantized ones.
        config: what ``config.json`` says.

    Raises:
        ValueError: if the config has no layers, none that the model has, or one that cannot be
            quantized in this model.
    """

    def __init__(self, model: Any, config: QuantizationConfig) -> None:
        if config.layers is None:
            raise ValueError(
                "config.json has a quantization_config without 'layers': the model beside it was "
                "not saved by this package; delete the entry to load it as a float model"
            )
        is_strange = any(_place(model, name) is None for name in config.layers)
        if config.unfuse_experts or (is_strange and bare_experts(list(walk(model)))):
            unfuse_experts(model)
        names = _names_in(model, config.layers)
        forms = {own: config.layers[name] for name, own in names.items()}
        self.report: ReplacementReport | None = None
        if forms:
            kinds = {type(model.get_submodule(name)) for name in forms}
            plain = [kind for kind in kinds if issubclass(kind, nn.Linear)]
            recipe = rules_of(forms)
            self.report = quantize_model(model, recipe, untie=True, plain_linear=plain)
        layers = {name: model.get_submodule(name) for name in forms}
        _check_layers(layers, forms)
        self._ties = _ties_in(model, config.ties, names)
        self._tensors: dict[str, tuple[Any, str]] = {}
        for name, layer in layers.items():
            layer._is_hf_initialized = True
            for key in layer.state_dict():
                if f"{name}.{key}" in self._ties:
                    layer._non_persistent_buffers_set.add(key)  # until all is loaded
                else:
                    self._tensors[f"{name}.{key}"] = layer, key
        self._unseen = dict.fromkeys(self._tensors)
        ignored = {rf"(^|\.){_any_number(name)}\.weight$" for name in config.layers}
        known = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*known, *ignored}

    def checked_dtype(self, key: str, stored: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Whether a tensor that is about to be read fits; the dtype to cast it to, if floats.

        Args:
            key: its name in the model.
            stored: a tensor, or the slice of a safetensors file.
            dtype: what transformers would cast it to.

        Raises:
            ValueError: for another shape than the layer's.
            TypeError: for floats in the place of codes, or other codes.
        """
        if key not in self._tensors:
            return dtype
        layer, name = self._tensors[key]
        own = layer.state_dict()[name]
        codes = None if own.is_floating_point() else own.dtype
        try:
            check_incoming(_outline(stored), key, tuple(own.shape), codes)
        except ValueError as error:
            raise ValueError(f"{error} of scheme {form_of(layer)}") from None
        self._unseen.pop(key, None)
        is_fixed = isinstance(layer, PackedModule) and name in layer._weight_names()
        return own.dtype if is_fixed and name not in layer._floats else dtype

    def finish(self, model: Any) -> None:
        """See that everything came, and share what is shared.

        Raises:
            ValueError: if tensors of quantized layers are not in the checkpoint, an order of
                columns lacks one, or a multiplier is not finite.
        """
        if self._unseen:
            keys = list(self._unseen)
            more = ", ..." if len(keys) > _SHOWN else ""
            raise ValueError(
                f"{len(keys)} tensors of quantized layers are not in the checkpoint: "
                f"{', '.join(keys[:_SHOWN])}{more}"
            )
        for key, (layer, part) in self._tensors.items():
            if part in COLUMN_PARTS:
                check_columns({key: getattr(layer, part)}, key.removesuffix(part))
        for key in self._ties:
            name, _, part = key.rpartition(".")
            model.get_submodule(name)._non_persistent_buffers_set.discard(part)
        share_tensors(model, self._ties)


def _names_in(model: Any, layers: Mapping[str, str]) -> dict[str, str]:
    """Stored names of layers -> those of the model, which may be the body of the stored one."""
    places = {name: _place(model, name) for name in layers}
    names = {name: place for name, place in places.items() if place is not None}
    if layers and not names:
        raise ValueError(
            f"none of the {len(layers)} quantized layers of config.json is in "
            f"{type(model).__name__}, such as {next(iter(layers))}"
        )
    return names


def _place(model: Any, name: str) -> str | None:
    """The name of a stored module in a model; one of both may be the body of the other."""
    prefix = f"{model.base_model_prefix}."
    for own in (name, prefix + name, name.removeprefix(prefix)):
        try:
            model.get_submodule(own)
        except AttributeError:
            continue
        return own
    return None


def _ties_in(model: Any, ties: Mapping[str, str], names: Mapping[str, str]) -> dict[str, str]:
    """Stored ties -> those of the model; none where both ends are in one module."""
    found = {}
    for key, first in ties.items():
        name, _, part = key.rpartition(".")
        owner, _, source = first.rpartition(".")
        own = names.get(owner) or _place(model, owner)
        if name in names and own is not None:
            ends = model.get_submodule(names[name]), model.get_submodule(own)
            if ends[0] is not ends[1]:  # one module that hangs in two places is one already
                found[f"{names[name]}.{part}"] = f"{own}.{source}"
    return found


def _check_layers(layers: Mapping[str, nn.Module], forms: Mapping[str, str]) -> None:
    for name, layer in layers.items():
        if not isinstance(layer, QuantizedModule) or str(form_of(layer)) != forms[name]:
            raise ValueError(
                f"config.json has a layer {name} of scheme {forms[name]}; that of this model, a "
                f"{type(layer).__name__}, cannot be one"
            )


def _any_number(name: str) -> str:
    """A pattern of a name with any numbers: layers have many names that differ in those."""
    return re.sub(r"\d+", r"\\d+", re.escape(name))


def _outline(stored: Any) -> torch.Tensor:
    """Shape and dtype of what is stored, without its numbers."""
    if isinstance(stored, torch.Tensor):
        return stored
    dtype = str_to_torch_dtype[stored.get_dtype()]
    return torch.empty(stored.get_shape(), dtype=dtype, device="meta")
