"""The linear map with int8 weights as a plain function, and which kernel a call would run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantization.numerics.rules import check_tensor
from quantization.ops import native
from quantization.ops.dtypes import index_of, name_of, source_of
from quantization.ops.native import Tensor
from quantization.ops.runtime import get_num_threads
from quantization.schemes.scheme import scheme_of


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
    isa, rows, cols, chunk, threads, packed = native.choose_linear(*sizes.values(), source, numbers)
    return LinearKernel(isa, source.name, tokens, (rows, cols), packed, chunk, threads)


def quantized_forward(
    weights: Tensor, input: Tensor, scales: Tensor, bias: Tensor | None = None
) -> Tensor:
    """``input @ (weights * scales[:, None]).T + bias`` without making the float weight.

    The weights are converted in registers; products are summed in float32 (float64 for a float64
    input), then scaled, shifted by the bias and rounded once to the input's dtype.

    Args:
        weights: int8 codes, ``[out_features, in_features]``.
        input: float32, bfloat16, float16 or float64 activations, ``[..., in_features]``.
        scales: one float scale a row of weights, ``[out_features]``.
        bias: float offsets, ``[out_features]``, or None.

    Returns:
        ``[..., out_features]`` in the dtype, kind and device of ``input``. Gradients flow to
        ``input`` and ``bias``.

    Raises:
        TypeError: if an argument is not a tensor, or has a dtype that is not allowed.
        ValueError: if shapes do not fit.

    Example:
        >>> import numpy as np
        >>> weights = np.array([[1, 2], [3, -4]], dtype=np.int8)
        >>> quantized_forward(
        ...     weights, np.ones((1, 2), np.float32), np.array([0.5, 0.25], np.float32)
        ... )
        array([[ 1.5 , -0.25]], dtype=float32)
    """
    _check(weights, input, scales, bias)
    return native.linear(input, weights, scales, bias)


def _check(weights: Tensor, input: Tensor, scales: Tensor, bias: Tensor | None) -> None:
    named = {"weights": weights, "input": input, "scales": scales}
    named |= {} if bias is None else {"bias": bias}
    for name, value in named.items():
        check_tensor(value, name)
        if native.is_torch(value) != native.is_torch(input):
            raise TypeError(
                f"{name} is a {type(value).__name__}, but input a {type(input).__name__}: pass "
                "torch tensors alone, or numpy arrays alone"
            )
        if name != "weights":
            source_of(value.dtype, name)
    if name_of(weights.dtype) != "int8":
        raise TypeError(f"weights have dtype {name_of(weights.dtype)}; only int8 codes will do")
    if weights.ndim != 2:
        raise ValueError(
            f"weights have shape {tuple(weights.shape)}; expected [out_features, in_features]"
        )
    out_features, in_features = weights.shape
    if input.ndim < 1 or input.shape[-1] != in_features:
        raise ValueError(
            f"input has shape {tuple(input.shape)}; its last dimension must be in_features = "
            f"{in_features}"
        )
    for name in ("scales", "bias"):
        value = named.get(name)
        if value is not None and tuple(value.shape) != (out_features,):
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; expected [out_features] = "
                f"({out_features},)"
            )
