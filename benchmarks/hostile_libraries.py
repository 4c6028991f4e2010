"""Libraries that quantize a model, each as one function, for the hostile battery."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import nn

import quantization


@dataclass(frozen=True)
class Library:
    """What the battery asks of a library.

    Attributes:
        name: as tables show it.
        package: the distribution that it needs.
        quantize: gives the quantized model, which may be the one that was given.
        tolerance: relative error of a layer's output that its codes explain.
        reports: what it says, in words, of a model that it has quantized.
    """

    name: str
    package: str
    quantize: Callable[[nn.Module], nn.Module]
    tolerance: float
    reports: Callable[[nn.Module], str] = lambda model: ""

    @property
    def version(self) -> str | None:
        """Version of the package, or None if it is not installed."""
        if self.package == "qwqa":
            return quantization.__version__
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return None


def _ours(scheme: str) -> Callable[[nn.Module], nn.Module]:
    return lambda model: quantization.quantize_model(model, scheme).model


def _our_report(model: nn.Module) -> str:
    return str(quantization.quantize_model(model, "w8a16"))


def _torchao(model: nn.Module) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False))
    return model


def _quanto(model: nn.Module) -> nn.Module:
    from optimum import quanto

    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    return model


def _walked(make: Callable[[nn.Linear], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """Bitsandbytes and hqq have layers and no walk of their own; transformers walks like this."""

    def quantize(model: nn.Module) -> nn.Module:
        for name, child in model.named_children():
            if isinstance(child, nn.Linear):
                setattr(model, name, make(child))
            else:
                quantize(child)
        return make(model) if isinstance(model, nn.Linear) else model

    return quantize


def _bitsandbytes8(linear: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    sizes, has_bias = (linear.in_features, linear.out_features), linear.bias is not None
    layer: Any = Linear8bitLt(*sizes, bias=has_bias, has_fp16_weights=False)
    weight = linear.weight.detach().clone()
    layer.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    layer.bias = linear.bias
    return layer.to("cpu")


def _bitsandbytes4(linear: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    sizes, has_bias = (linear.in_features, linear.out_features), linear.bias is not None
    layer: Any = Linear4bit(*sizes, bias=has_bias, quant_type="nf4")
    weight = linear.weight.detach().clone()
    layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4")
    layer.bias = linear.bias
    return layer.to("cpu")


def _hqq(linear: nn.Linear) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=8, group_size=64)
    return HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")


OURS = Library("ours w8a16", "qwqa", _ours("w8a16"), 0.02, _our_report)
LIBRARIES = (
    OURS,
    Library("ours w4g32a", "qwqa", _ours("w4g32a"), 0.2, _our_report),
    Library("torchao", "torchao", _torchao, 0.02),
    Library("quanto", "optimum-quanto", _quanto, 0.02),
    Library("bitsandbytes 8", "bitsandbytes", _walked(_bitsandbytes8), 0.05),
    Library("bitsandbytes nf4", "bitsandbytes", _walked(_bitsandbytes4), 0.25),
    Library("hqq", "hqq", _walked(_hqq), 0.02),
    Library("float", "torch", lambda model: model, 1e-6),
)
