"""The linear map with int8 weights as a plain function."""

from __future__ import annotations

from quantization.ops import native
from quantization.ops.dtypes import name_of, source_of
from quantization.ops.native import SameKindT, Tensor, check_tensor

__all__ = ["quantized_forward"]


def quantized_forward(
    weights: SameKindT, input: SameKindT, scales: SameKindT, bias: SameKindT | None = None
) -> SameKindT:
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
    if native.is_torch(input):
        from quantization.ops import torch_ops

        return torch_ops.linear(input, weights, scales, bias)
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
    for name, value in named.items():
        if name in ("scales", "bias") and tuple(value.shape) != (out_features,):
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; expected [out_features] = "
                f"({out_features},)"
            )
