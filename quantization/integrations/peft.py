"""PEFT: LoRA over quantized layers, which trains, is saved and loaded, and merges.

Importing this module is all that is needed, and the first swap of layers does it where PEFT is in
use. From then on every ``LoraConfig`` puts the layers of this module over quantized ones. They do
what PEFT's own do, but merging: the sum of the weight and the adapter is quantized anew, under the
scheme of the layer, which adds the error that quantizing has; what the layer was before is kept, so
that unmerging brings it back bit for bit. For a merge without that error make the model float first
(:func:`quantization.dequantize_model`), and load the adapter over it.

A quantized module in ``modules_to_save``, which is to be trained itself, is trained as a float copy
of its numbers; that copy is what is saved, and what stands in its place after a merge.

Initialisations that take a part out of the weight (PiSSA, OLoRA, CorDA, LoRA-GA, KaSA) run in
float, and what is left of the weight is quantized anew, as the PiSSA paper does it. LoftQ, which
needs the float weight, is refused, and so are gradients of quantized weights for LoRA-GA.

Other adapters than LoRA train over quantized layers too; where one would be merged, an error says
that it cannot. PEFT itself asks that a model has at least one Parameter.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from quantization.ops.extras import need

need("peft", "peft", "0.21")

from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.lora import LoraModel, loraga
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper

from quantization.layers.packed_embedding import PackedEmbedding
from quantization.layers.quantized_linear import QuantizedLinear
from quantization.layers.quantized_module import QuantizedModule
from quantization.models.quantizer import dequantize_model

try:
    from peft.tuners.lora import corda
except ModuleNotFoundError:  # it needs the package attrs, which PEFT does not ask for
    corda = None

__all__ = ["LAYERS", "QuantizedLoraEmbedding", "QuantizedLoraLinear"]


class _OverFloat:
    """What writes the weight, done on a float layer by PEFT's own code, whatever the variant."""

    base_layer: Any
    merged_adapters: list[str]
    _before: dict[str, torch.Tensor | None] | None = None

    def update_layer(
        self, adapter_name: str, *args: Any, config: LoraConfig, **kwargs: Any
    ) -> None:
        """Add an adapter; what its initialisation leaves of the weight is quantized."""
        update = functools.partial(super().update_layer, adapter_name, config=config, **kwargs)  # type: ignore[misc]
        if _only_adds(config):
            update(*args)
            return
        base = self.base_layer
        with self._on_float() as plain:
            before = plain.weight.detach().clone()
            update(*args)
        self._move_adapter_to_device_of_base_layer(adapter_name)  # type: ignore[attr-defined]
        if not plain.weight.is_meta and not torch.equal(plain.weight, before):
            base.quantize(plain.weight.detach(), name="what the adapter leaves of the weight")

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
        noted = {name: value for name, value in vars(base).items() if name not in vars(plain)}
        vars(plain).update(noted)  # by preprocess_corda and others; they are used up
        try:
            yield plain
            for name in noted.keys() - vars(plain):
                del vars(base)[name]
        finally:
            self.base_layer = base


class QuantizedLoraLinear(_OverFloat, lora.Linear):
    """LoRA over a quantized linear layer; the arguments are those of PEFT's ``lora.Linear``."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any
    ) -> None:
        if config.fan_in_fan_out:  # a layer that came from a Conv1D has its weight as nn.Linear has
            config = copy.copy(config)
            config.fan_in_fan_out = False
        super().__init__(base_layer, adapter_name, config, **kwargs)


class QuantizedLoraEmbedding(_OverFloat, lora.Embedding):
    """LoRA over a packed embedding; the arguments are those of PEFT's ``lora.Embedding``."""


#: Values of ``init_lora_weights`` that draw an adapter and do not look at the weight.
_ADDING = (True, False, "gaussian", "eva", "orthogonal")

#: Which layer of this module comes over which quantized one.
LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    QuantizedLinear: QuantizedLoraLinear,
    PackedEmbedding: QuantizedLoraEmbedding,
}


def _only_adds(config: LoraConfig) -> bool:
    """Whether a new adapter of that kind leaves the weight alone."""
    variants = (f.name for f in fields(config) if f.metadata.get("is_lora_variant"))
    is_plain = not any(getattr(config, name) for name in variants)
    return is_plain and config.init_lora_weights in _ADDING


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


def _refusing_loftq(original: Callable[..., None]) -> Callable[..., None]:
    """``BaseTuner.inject_adapter`` that refuses LoftQ before anything is changed."""

    @functools.wraps(original)
    def inject_adapter(
        self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        config = self.peft_config[adapter_name]
        if getattr(config, "init_lora_weights", None) == "loftq":
            _refuse(
                model,
                config,
                "init_lora_weights='loftq' quantizes the float weight by itself, and there is none",
                "use True, 'pissa' or 'olora'",
            )
        original(self, model, adapter_name, *args, **kwargs)

    inject_adapter.knows_quantized = True  # type: ignore[attr-defined]
    return inject_adapter


def _refusing_gradients(original: Callable[..., None]) -> Callable[..., None]:
    """LoRA-GA's ``estimate_gradients`` that refuses where weights have none, before it begins."""

    @functools.wraps(original)
    def estimate_gradients(model: nn.Module, lora_config: Any, *args: Any, **kwargs: Any) -> None:
        _refuse(
            model,
            lora_config,
            "LoRA-GA estimates gradients of weights, and codes have none",
            "call preprocess_loraga with cache_file= on the float model, then on this one",
        )
        original(model, lora_config, *args, **kwargs)

    estimate_gradients.knows_quantized = True  # type: ignore[attr-defined]
    return estimate_gradients


def _of_buffers_too(original: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Any]:
    """CorDA's ``get_model_device``, which asks layers, for those without Parameters."""

    @functools.wraps(original)
    def get_model_device(model: nn.Module) -> Any:
        is_bare = next(model.parameters(), None) is None
        return next(model.buffers()).device.type if is_bare else original(model)

    get_model_device.knows_quantized = True  # type: ignore[attr-defined]
    return get_model_device


def _refuse(model: nn.Module, config: Any, why: str, remedy: str) -> None:
    """Raise ValueError if an adapter of that kind comes over a quantized layer."""
    asked = config.target_modules
    is_named = asked is not None and asked != "all-linear"  # otherwise: all there are
    for name, module in model.named_modules():
        if isinstance(module, QuantizedModule) and (
            not is_named or LoraModel._check_target_module_exists(config, name)
        ):
            raise ValueError(f"{name} is quantized: {why}. Nothing was changed; {remedy}")


def _refusing(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """The question whether a model can be merged: not where the merge would be lost."""

    @functools.wraps(original)
    def check(self: Any) -> None:
        original(self)
        for name, module in self.model.named_modules():
            lost = isinstance(module, BaseTunerLayer) and not isinstance(module, _OverFloat)
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


#: What knows quantized layers in the place of PEFT's own: (owner, name, what is made of it).
_PATCHES = (
    (ModulesToSaveWrapper, "update", _with_float_copies),
    (LoraConfig, "__post_init__", _with_layers),
    (BaseTuner, "inject_adapter", _refusing_loftq),
    (BaseTuner, "_check_merge_allowed", _refusing),
    (loraga, "estimate_gradients", _refusing_gradients),
    *([(corda, "get_model_device", _of_buffers_too)] if corda else []),
)


def _register() -> None:
    for owner, name, patch in _PATCHES:
        original: Any = getattr(owner, name)
        if not hasattr(original, "knows_quantized"):
            setattr(owner, name, patch(original))


_register()
