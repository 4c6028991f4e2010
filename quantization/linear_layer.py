"""The linear layer with int8 weights under float activations (W8A16), and its way into a model.

The public names; :mod:`quantization.layers.int8_layer` has the layer,
:mod:`quantization.swap.replacement` the replacement of a model's layers.
"""

from quantization.layers.int8_layer import QWQALinearLayer, name_for_quantized_weight_buffer
from quantization.ops.linear import quantized_forward
from quantization.swap.replacement import replace_linear_layers_with_w8a16
from quantization.swap.target import Target, target_class_from

__all__ = [
    "QWQALinearLayer",
    "Target",
    "name_for_quantized_weight_buffer",
    "quantized_forward",
    "replace_linear_layers_with_w8a16",
    "target_class_from",
]
