"""What is looked at: quantized layers of a module, folder or stored model, and float weights."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quantization.checkpoint.disk.stored_tensor import key_of
from quantization.checkpoint.format import FILE
from quantization.checkpoint.reading import read_checkpoint
from quantization.checkpoint.source.float_source import open_source
from quantization.checkpoint.stored_model import StoredModel, unwrapped
from quantization.layers.float_layers import is_conv1d, looks_linear
from quantization.layers.quantized_module import QuantizedModule
from quantization.swap.attention import splitting_attention
from quantization.swap.conversion import memory_of, weight_of
from quantization.swap.walker import walk

__all__ = ["Looked", "Model", "layers_of", "matching", "reference_weights"]

#: What can be looked at.
Model = nn.Module | StoredModel | str | os.PathLike[str]

#: The float weight ``[out, in]`` of a layer by its dotted name; None where there is none.
Weights = Callable[[str], torch.Tensor | None]


@dataclass(frozen=True)
class Looked:
    """A quantized layer of a model, and all its names; those of one set of codes are one."""

    name: str
    aliases: tuple[str, ...]
    module: QuantizedModule


def layers_of(model: Model) -> list[Looked]:
    """The quantized layers, in the order of the model.

    Args:
        model: a module, a folder of ``save_quantized``, or what a reader of a format gives.

    Raises:
        TypeError: if it is nothing of that kind.
        FileNotFoundError, CheckpointError: for a folder that is none.

    Example:
        >>> from quantization import PackedLinearLayer
        >>> [layer.name for layer in layers_of(nn.Sequential(PackedLinearLayer(4, 4)))]
        ['0']
    """
    if isinstance(model, str | os.PathLike):
        model = read_checkpoint(model)
    if isinstance(model, StoredModel):
        return _merged((name, _module(model, name)) for name in model.layers)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"expected a model (a torch.nn.Module instance) or a folder of one, not {model!r:.60}"
        )
    sites = walk(unwrapped(model))
    return _merged((s.name, s.module) for s in sites if isinstance(s.module, QuantizedModule))


def _module(stored: StoredModel, name: str) -> QuantizedModule:
    bias = stored.tensors.get(key_of(name, "bias"))
    return stored.layers[name].module(None if bias is None else bias.load())


def _merged(pairs: Iterable[tuple[str, QuantizedModule]]) -> list[Looked]:
    found: dict[Any, list[Any]] = {}
    for name, module in pairs:
        codes = weight_of(module)
        assert codes is not None
        key = memory_of(codes) if codes.numel() else id(module)
        found.setdefault(key, [module]).append(name)
    return [Looked(names[0], tuple(names[1:]), module) for module, *names in found.values()]


def reference_weights(reference: Model) -> Weights:
    """Float weights of a model by the names of its layers.

    Args:
        reference: a module, float or not; or a folder, float or quantized.

    Raises:
        TypeError, FileNotFoundError, CheckpointError: as :func:`layers_of` raises them.
    """
    if isinstance(reference, str | os.PathLike) and not os.path.isfile(
        os.path.join(reference, FILE)
    ):
        return _of_float_folder(reference)
    if not isinstance(reference, nn.Module):
        known = {
            name: layer.module
            for layer in layers_of(reference)
            for name in (layer.name, *layer.aliases)
        }
        return lambda name: known[name].weight if name in known else None
    found: dict[str, torch.Tensor] = {}
    inner = unwrapped(reference)
    with splitting_attention(inner):
        for site in walk(inner):
            weight = _weight(site.module)
            if weight is not None:
                found[site.name] = weight
    return found.get


def _weight(module: nn.Module) -> torch.Tensor | None:
    if isinstance(module, QuantizedModule):
        return module.weight
    if not (looks_linear(module) or isinstance(module, nn.Embedding)):
        return None
    weight: Any = getattr(module, "weight", None)
    if weight is None or nn.parameter.is_lazy(weight) or weight.ndim != 2:
        return None
    matrix: torch.Tensor = weight.detach()
    return matrix.t() if is_conv1d(module) else matrix


def _of_float_folder(folder: str | os.PathLike[str]) -> Weights:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # most have no fused experts
        source = open_source(folder, {"*": None}, unfuse_experts=True)
    turned = {site.name for site in walk(source.report.model) if is_conv1d(site.module)}

    def weight(name: str) -> torch.Tensor | None:
        tensor = source.stored.tensors.get(key_of(name, "weight"))
        if tensor is None:
            return None
        return tensor.load().t() if name in turned else tensor.load()

    return weight


def matching(layer: Looked, weights: Weights) -> torch.Tensor:
    """The float weight of a layer, under whichever of its names it has one.

    Raises:
        ValueError: if there is none, or one of another shape.
    """
    names = (layer.name, *layer.aliases)
    weight = next((found for name in names if (found := weights(name)) is not None), None)
    if weight is None:
        raise ValueError(
            f"the reference has no float layer {layer.name or 'at its root'}: give the model from "
            "which this one was quantized"
        )
    shape = layer.module._weight_shape()
    if tuple(weight.shape) != tuple(shape):
        raise ValueError(
            f"the reference's {layer.name or 'layer'} has shape {tuple(weight.shape)}; that of the "
            f"quantized layer is {tuple(shape)}"
        )
    return weight
