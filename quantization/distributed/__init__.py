"""A model whose quantized layers are spread over several processes or machines.

:func:`tensor_parallel` does it to a whole model; :class:`ColwiseQuantized` and
:class:`RowwiseQuantized` are styles for torch's ``parallelize_module``; :func:`shard` gives one
share of a layer, without any process.
"""

from quantization.distributed.plan import plan_of, tensor_parallel
from quantization.distributed.shares import EmbeddingShare, bounds, shard
from quantization.distributed.styles import ColwiseQuantized, RowwiseQuantized
from quantization.distributed.verify import allowed_difference, held_bytes

__all__ = [
    "ColwiseQuantized",
    "EmbeddingShare",
    "RowwiseQuantized",
    "allowed_difference",
    "bounds",
    "held_bytes",
    "plan_of",
    "shard",
    "tensor_parallel",
]
