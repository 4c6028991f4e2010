"""Which kernel a linear layer of some size, scheme and number of tokens would run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantization.ops import native
from quantization.ops.dtypes import index_of, source_of
from quantization.ops.runtime import get_num_threads
from quantization.schemes.scheme import scheme_of

__all__ = ["LinearKernel", "linear_kernel"]


@dataclass(frozen=True)
class LinearKernel:
    """What runs when so many tokens meet quantized weights, and why; print it.

    Attributes:
        isa: the active instruction set.
        dtype: of the activations.
        tokens: rows of activations in the call.
        tile: tokens and features whose sums are kept in registers at a time.
        packs_weights: whether a tile's weights are converted once for all tokens that pass over
            them; else they are converted in registers as each tile is summed.
        chunk: tokens that read the weights together; more are cut into chunks.
        threads: how many the call may use; a small one is not worth waking others.

    Example:
        >>> kernel = linear_kernel(128, 4096, 4096, "bfloat16")
        >>> print(kernel)  # doctest: +SKIP
        avx512bf16: 128 tokens of bfloat16, tiles of 4 tokens x 6 features, weights packed once \
for 128 tokens, 2 of 2 threads
    """

    isa: str
    dtype: str
    tokens: int
    tile: tuple[int, int]
    packs_weights: bool
    chunk: int
    threads: int

    def __str__(self) -> str:
        rows, cols = self.tile
        weights = (
            f"packed once for {self.chunk} tokens"
            if self.packs_weights
            else "converted in registers"
        )
        return (
            f"{self.isa}: {self.tokens} tokens of {self.dtype}, tiles of {rows} tokens x {cols} "
            f"features, weights {weights}, {self.threads} of {get_num_threads()} threads"
        )


def linear_kernel(
    tokens: int,
    out_features: int,
    in_features: int,
    dtype: Any = "float32",
    scheme: Any = None,
) -> LinearKernel:
    """The kernel that a call of that size and dtype would run now, on this CPU.

    Args:
        tokens: rows of activations, 1 or more.
        out_features: rows of weights, 1 or more.
        in_features: columns of weights, 0 or more.
        dtype: of the activations: float32, bfloat16, float16 or float64.
        scheme: of packed weights, a Scheme or its short name; None: int8 codes, a scale a row.

    Raises:
        TypeError: for another dtype, or sizes that are no integers.
        ValueError: for sizes out of range, or a name that is no scheme's.

    Example:
        >>> linear_kernel(1, 4096, 4096).tokens
        1
    """
    sizes = {"tokens": tokens, "out_features": out_features, "in_features": in_features}
    for name, value in sizes.items():
        least = 0 if name == "in_features" else 1
        if index_of(value, name) < least:
            raise ValueError(f"{name} is {value}; it must be {least} or more")
    source = source_of(dtype, "activations")
    numbers = (8, 0, 0, 0) if scheme is None else scheme_of(scheme).kernel_numbers(in_features)
    isa, rows, cols, chunk, threads, packed = native.choose_linear(
        tokens, out_features, in_features, source, numbers
    )
    return LinearKernel(isa, source.name, tokens, (rows, cols), packed, chunk, threads)
