"""Codes of 1 to 8 bits packed into integer containers, and unpacked.

The public names; :mod:`quantization.numerics.weight_packing` has the layouts and the functions.
"""

from quantization.numerics.packing import (
    Packing,
    bit_shifts,
    get_dtype_size_in_bits,
    get_max_bits_needed,
)
from quantization.numerics.weight_packing import pack_weights, unpack_weights

__all__ = [
    "Packing",
    "bit_shifts",
    "get_dtype_size_in_bits",
    "get_max_bits_needed",
    "pack_weights",
    "unpack_weights",
]
