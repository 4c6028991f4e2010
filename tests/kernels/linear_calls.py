"""The linear calls of the extension on guarded, misaligned memory, by the oracle's names."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from quantization import _kernels
from tests.kernels.quantize_calls import number_of, placed, stored
from tests.memory import Guarded
from tests.oracle import STORAGE, numbers


class Layer(NamedTuple):
    """Quantized weights; scales and bias as bits of their types."""

    weights: np.ndarray
    scales: np.ndarray
    scales_dtype: str
    bias: np.ndarray | None
    bias_dtype: str


def random_layer(
    rng: np.random.Generator,
    shape: tuple[int, int],
    scales_dtype: str = "float32",
    bias_dtype: str | None = "float32",
) -> Layer:
    weights = rng.integers(-128, 128, shape, dtype=np.int8)
    scales = stored(rng.uniform(0.001, 0.02, shape[0]), scales_dtype)
    bias = None if bias_dtype is None else stored(rng.standard_normal(shape[0]), bias_dtype)
    return Layer(weights, scales, scales_dtype, bias, bias_dtype or "float32")


def forward(
    x: np.ndarray, x_dtype: str, layer: Layer, y_dtype: str, offset: int = 1, fill: int = 0x5A
) -> np.ndarray:
    """Bits of y."""
    out_features, in_features = layer.weights.shape
    y = Guarded((len(x), out_features), STORAGE[y_dtype], offset, fill)
    _kernels.linear(
        y.array,
        placed(x, offset),
        placed(layer.weights, offset),
        placed(layer.scales, offset),
        None if layer.bias is None else placed(layer.bias, offset),
        len(x),
        out_features,
        in_features,
        *map(number_of, (y_dtype, x_dtype, layer.scales_dtype, layer.bias_dtype)),
    )
    y.check()
    return y.array


def backward(
    grad: np.ndarray, grad_dtype: str, layer: Layer, x_dtype: str, offset: int = 1
) -> np.ndarray:
    """Bits of grad_x."""
    out_features, in_features = layer.weights.shape
    grad_x = Guarded((len(grad), in_features), STORAGE[x_dtype], offset)
    _kernels.linear_backward(
        grad_x.array,
        placed(grad, offset),
        placed(layer.weights, offset),
        placed(layer.scales, offset),
        len(grad),
        out_features,
        in_features,
        *map(number_of, (x_dtype, grad_dtype, layer.scales_dtype)),
    )
    grad_x.check()
    return grad_x.array


def scales_of(layer: Layer) -> np.ndarray:
    return numbers(layer.scales, layer.scales_dtype)


def bias_of(layer: Layer) -> np.ndarray | None:
    return None if layer.bias is None else numbers(layer.bias, layer.bias_dtype)
