"""Linear quantization: numbers to codes on an evenly spaced grid, and back.

The public names; :mod:`quantization.numerics.linear_quantization` has the formulas and the
functions, :mod:`quantization.numerics` all that they are made of.
"""

from quantization.numerics.granularity import PER_COLUMNS, PER_ROWS, Granularity
from quantization.numerics.linear_quantization import (
    dequantize_linear,
    get_info,
    get_scale_and_zero_for,
    group,
    per_dim_scale_and_zero_for,
    quantize_linear,
)
from quantization.numerics.parameters import Mode, QuantizationParameters

__all__ = [
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
]
