"""PEFT: LoRA over quantized layers, which trains, is saved and loaded, and merges.

Importing this module is all that is needed, and the first swap of layers does it where PEFT is in
use. From then on every ``LoraConfig`` puts the layers of this module over quantized ones. They do
what PEFT's own do, but merging: the sum of the weight and the adapter is quantized anew, under the
scheme of the layer, which adds the error that quantizing has; what the layer was before is kept, so
that unmerging brings it back bit for bit. For a merge without that error make the model float first
(:func:`quantization.dequantize_model`), and load the adapter over it.

A quantized module in ``modules_to_save``, which is to be trained itself, is trained as a float copy
of its numbers; that copy is what is saved, and what stands in its place after a merge.

Other adapters than LoRA train over quantized layers too; where one would be merged, an error says
that it cannot. PEFT itself asks that a model has at least one Parameter.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from quantization.ops.extras import need

need("peft", "peft", "0.21")

from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper

from quantization.layers.packed_embedding import PackedEmbedding
from quantization.layers.quantized_linear import QuantizedLinear
from quantization.layers.quantized_module import QuantizedModule
from quantization.models.quantizer import dequantize_model

__all__ = ["LAYERS", "QuantizedLoraEmbedding", "QuantizedLoraLinear"]


class _Merging:
    """Merging by way of a float layer: PEFT's own code does it there, whatever the variant."""

    base_layer: Any
    merged_adapters: list[str]
    _before: dict[str, torch.Tensor | None] | None = None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Quantize the sum of the weight and the adapters, under the scheme of the layer."""
        base, merged = self.base_layer, list(self.merged_adapters)
        try:
            with self._on_float() as plain:
                super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]
            if self.merged_adapters == merged:
                return
            before = _parts_of(base)
            base.quantize(plain.weight.detach(), name="the merged weight")
        except BaseException:
            self.merged_adapters[:] = merged
            raise
        if getattr(base, "bias", None) is not None:
            base.bias.data = plain.bias.detach().to(base.bias.dtype)
        self._before = before if self._before is None else self._before

    def unmerge(self) -> None:
        """Bring back the codes that were there before anything was merged."""
        if not self.merged_adapters or self._before is None:
            super().unmerge()  # type: ignore[misc]
            return
        with self._on_float():
            super().unmerge()  # type: ignore[misc]
        _put_back(self.base_layer, self._before)
        self._before = None

    @contextmanager
    def _on_float(self) -> Iterator[Any]:
        """A float layer of the same numbers in the place of the quantized one."""
        base = self.base_layer
        self.base_layer = plain = _float_of(base)
        try:
            yield plain
        finally:
            self.base_layer = base


class QuantizedLoraLinear(_Merging, lora.Linear):
    """LoRA over a quantized linear layer; the arguments are those of PEFT's ``lora.Linear``."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any
    ) -> None:
        if config.fan_in_fan_out:  # a layer that came from a Conv1D has its weight as nn.Linear has
            config = copy.copy(config)
            config.fan_in_fan_out = False
        super().__init__(base_layer, adapter_name, config, **kwargs)


class QuantizedLoraEmbedding(_Merging, lora.Embedding):
    """LoRA over a packed embedding; the arguments are those of PEFT's ``lora.Embedding``."""


#: Which layer of this module comes over which quantized one.
LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    QuantizedLinear: QuantizedLoraLinear,
    PackedEmbedding: QuantizedLoraEmbedding,
}


def _float_of(layer: Any) -> nn.Module:
    """The float32 layer of a quantized one's numbers."""
    with torch.no_grad():
        plain = layer.dequantize()
        plain.weight = nn.Parameter(layer.packed().dequantize("float32"), requires_grad=False)
        if getattr(plain, "bias", None) is not None:
            plain.bias = nn.Parameter(plain.bias.detach().float(), requires_grad=False)
    return plain


def _parts_of(layer: Any) -> dict[str, torch.Tensor | None]:
    """The tensors of a layer: its own, but a copy of the bias, which is written to."""
    parts = {name: layer._buffers[name] for name in layer._weight_names()}
    bias = getattr(layer, "bias", None)
    return parts | {"bias": None if bias is None else bias.detach().clone()}


def _put_back(layer: Any, before: dict[str, torch.Tensor | None]) -> None:
    parts = {name: tensor for name, tensor in before.items() if name != "bias"}
    layer._set_buffers(parts, layer._weight_shape())
    if before["bias"] is not None:
        layer.bias.data = before["bias"]


# ---- registration ------------------------------------------------------------------------------


def _with_layers(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """``LoraConfig.__post_init__`` that makes the layers known by PEFT's own way to do so."""

    @functools.wraps(original)
    def post_init(self: Any) -> None:
        original(self)
        self._register_custom_module(LAYERS)

    post_init.knows_quantized = True  # type: ignore[attr-defined]
    return post_init


def _refusing(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """The question whether a model can be merged: not where the merge would be lost."""

    @functools.wraps(original)
    def check(self: Any) -> None:
        original(self)
        for name, module in self.model.named_modules():
            lost = isinstance(module, BaseTunerLayer) and not isinstance(module, _Merging)
            if lost and isinstance(module.get_base_layer(), QuantizedModule):
                raise ValueError(
                    f"{name}: {type(module).__module__}.{type(module).__name__} cannot be merged "
                    "into a quantized layer. Load the adapter over a model made float by "
                    "dequantize_model; or, if it is LoRA, import quantization.integrations.peft "
                    "before the adapter is made"
                )

    check.knows_quantized = True  # type: ignore[attr-defined]
    return check


def _with_float_copies(original: Callable[..., None]) -> Callable[..., None]:
    """``ModulesToSaveWrapper.update`` that trains float copies of quantized modules."""

    @functools.wraps(original)
    def update(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        is_new = adapter_name not in self.modules_to_save
        original(self, adapter_name, *args, **kwargs)
        own = self.modules_to_save[adapter_name]
        if is_new and any(isinstance(module, QuantizedModule) for module in own.modules()):
            plain = dequantize_model(own).model
            plain.requires_grad_(adapter_name in self.active_adapters)
            self.modules_to_save[adapter_name] = plain

    update.knows_quantized = True  # type: ignore[attr-defined]
    return update


def _register() -> None:
    if not hasattr(ModulesToSaveWrapper.update, "knows_quantized"):
        ModulesToSaveWrapper.update = _with_float_copies(ModulesToSaveWrapper.update)
    if not hasattr(LoraConfig.__post_init__, "knows_quantized"):
        LoraConfig.__post_init__ = _with_layers(LoraConfig.__post_init__)
    if not hasattr(BaseTuner._check_merge_allowed, "knows_quantized"):
        BaseTuner._check_merge_allowed = _refusing(BaseTuner._check_merge_allowed)


_register()
