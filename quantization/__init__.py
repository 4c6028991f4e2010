"""Weight quantization for PyTorch on C kernels: every part exposed.

>>> import torch
>>> from quantization import QWQALinearLayer, Target, replace_linear_layers_with_w8a16
>>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
>>> report = replace_linear_layers_with_w8a16(model, Target.Linear(QWQALinearLayer), ["2"])
>>> type(model[0]).__name__, type(model[2]).__name__
('QWQALinearLayer', 'Linear')

Names are loaded when first used, so the NumPy core works where torch is not installed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from quantization.swap import OBSERVERS
from quantization.version import VERSION

__version__ = VERSION

if TYPE_CHECKING:
    from quantization.checkpoint import load_quantized, quantize_checkpoint, save_quantized
    from quantization.layers.packed_embedding import PackedEmbedding
    from quantization.layers.packed_layer import PackedLinearLayer
    from quantization.linear_layer import QWQALinearLayer, name_for_quantized_weight_buffer
    from quantization.linear_quantizer import (
        PER_COLUMNS,
        PER_ROWS,
        Granularity,
        Mode,
        QuantizationParameters,
        dequantize_linear,
        get_info,
        get_scale_and_zero_for,
        group,
        per_dim_scale_and_zero_for,
        quantize_linear,
    )
    from quantization.models.quantizer import dequantize_model, quantize_model
    from quantization.ops.linear import quantized_forward
    from quantization.ops.runtime import active_isa, get_num_threads, isas, set_isa, set_num_threads
    from quantization.schemes.kernel_choice import LinearKernel, linear_kernel
    from quantization.schemes.packed_weights import PackedWeights, pack_matrix
    from quantization.schemes.scheme import Scheme
    from quantization.swap.experts import UnfusedExperts, unfuse_experts
    from quantization.swap.replacement import (
        ReplacementReport,
        Target,
        replace_linear_layers_with_w8a16,
        target_class_from,
    )
    from quantization.weight_pack import (
        Packing,
        bit_shifts,
        get_dtype_size_in_bits,
        get_max_bits_needed,
        pack_weights,
        unpack_weights,
    )

_HOMES = {
    "checkpoint": ("load_quantized", "quantize_checkpoint", "save_quantized"),
    "swap.experts": ("UnfusedExperts", "unfuse_experts"),
    "schemes.kernel_choice": ("LinearKernel", "linear_kernel"),
    "ops.linear": ("quantized_forward",),
    "linear_layer": ("QWQALinearLayer", "name_for_quantized_weight_buffer"),
    "linear_quantizer": (
        "PER_COLUMNS",
        "PER_ROWS",
        "Granularity",
        "Mode",
        "QuantizationParameters",
        "dequantize_linear",
        "get_info",
        "get_scale_and_zero_for",
        "group",
        "per_dim_scale_and_zero_for",
        "quantize_linear",
    ),
    "models.quantizer": ("dequantize_model", "quantize_model"),
    "layers.packed_embedding": ("PackedEmbedding",),
    "layers.packed_layer": ("PackedLinearLayer",),
    "schemes.packed_weights": ("PackedWeights", "pack_matrix"),
    "swap.replacement": (
        "ReplacementReport",
        "Target",
        "replace_linear_layers_with_w8a16",
        "target_class_from",
    ),
    "ops.runtime": ("active_isa", "get_num_threads", "isas", "set_isa", "set_num_threads"),
    "schemes.scheme": ("Scheme",),
    "weight_pack": (
        "Packing",
        "bit_shifts",
        "get_dtype_size_in_bits",
        "get_max_bits_needed",
        "pack_weights",
        "unpack_weights",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "PER_COLUMNS",
    "PER_ROWS",
    "Granularity",
    "LinearKernel",
    "Mode",
    "PackedEmbedding",
    "PackedLinearLayer",
    "PackedWeights",
    "Packing",
    "QWQALinearLayer",
    "QuantizationParameters",
    "ReplacementReport",
    "Scheme",
    "Target",
    "UnfusedExperts",
    "__version__",
    "active_isa",
    "bit_shifts",
    "dequantize_linear",
    "dequantize_model",
    "get_dtype_size_in_bits",
    "get_info",
    "get_max_bits_needed",
    "get_num_threads",
    "get_scale_and_zero_for",
    "group",
    "isas",
    "linear_kernel",
    "load_quantized",
    "name_for_quantized_weight_buffer",
    "pack_matrix",
    "pack_weights",
    "per_dim_scale_and_zero_for",
    "quantize_checkpoint",
    "quantize_linear",
    "quantize_model",
    "quantized_forward",
    "replace_linear_layers_with_w8a16",
    "save_quantized",
    "set_isa",
    "set_num_threads",
    "target_class_from",
    "unfuse_experts",
    "unpack_weights",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'quantization' has no attribute {name!r}")
    value = getattr(import_module(f"quantization.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def _notify_integrations(report: Any) -> None:
    import_module("quantization.integrations").note_swap(report)


OBSERVERS.append(_notify_integrations)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
