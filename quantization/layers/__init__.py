"""Modules that keep their weight as codes: int8, packed, embedding, and what they share.

All are loaded together: a linear layer of one form can become one of another.
"""

from quantization.layers.int8_layer import QWQALinearLayer
from quantization.layers.packed_embedding import PackedEmbedding
from quantization.layers.packed_layer import PackedLinearLayer

__all__ = ["PackedEmbedding", "PackedLinearLayer", "QWQALinearLayer"]
