"""The torch operators, bare: registered, with shapes for fake tensors and batching rules.

Importing this module imports torch. The operators (``torch.ops.quantization.linear``,
``linear_bias``, ``linear_backward``, ``packed`` and ``packed_backward``) are registered from C
through torch's stable shim, or, with a torch that lacks it, in Python over the NumPy binding; the
environment variable ``QUANTIZATION_TORCH_OPS`` forces one of them (``c``, or an error; ``python``).
Those are kernels for the CPU; other devices have :mod:`quantization.ops.torch_devices`.
Programs call the functions of :mod:`quantization.ops.torch_ops`: a bare operator has no gradient.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from quantization import _kernels
from quantization.ops import torch_devices
from quantization.ops.torch_checks import (
    HAS_BIAS,
    HAS_CODEBOOK,
    HAS_STEPS,
    HAS_ZEROS,
    check_linear,
    check_packed,
)

_SCHEMAS = {
    "linear": "(Tensor x, Tensor weights, Tensor scales, ScalarType dtype) -> Tensor",
    "linear_bias": "(Tensor x, Tensor weights, Tensor scales, Tensor bias, ScalarType dtype)"
    " -> Tensor",
    "linear_backward": "(Tensor grad, Tensor weights, Tensor scales, ScalarType dtype) -> Tensor",
    "packed": "(Tensor x, Tensor weights, Tensor scales, Tensor scale_steps, Tensor zero_points, "
    "Tensor codebook, Tensor bias, int bits, int group, int present, ScalarType dtype) -> Tensor",
    "packed_backward": "(Tensor grad, Tensor weights, Tensor scales, Tensor scale_steps, "
    "Tensor zero_points, Tensor codebook, int in_features, int bits, int group, int present, "
    "ScalarType dtype) -> Tensor",
}

# ---- kernels in Python, for a torch without the stable shim -----------------------------------


def _array(tensor: torch.Tensor) -> Any:
    """The numbers of a CPU tensor as an ndarray; 16-bit floats as their bits."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.view(torch.int16)
    return tensor.numpy()


def _number(dtype: torch.dtype) -> int:
    """The kernels' number of a dtype.

    Raises:
        RuntimeError: for a dtype that is no float type of the kernels.
    """
    numbers = {
        torch.float32: _kernels.FLOAT32,
        torch.bfloat16: _kernels.BFLOAT16,
        torch.float16: _kernels.FLOAT16,
        torch.float64: _kernels.FLOAT64,
    }
    if dtype not in numbers:
        raise RuntimeError(f"must be float32, bfloat16, float16 or float64, not {dtype}")
    return numbers[dtype]


def _python_linear_bias(
    x: torch.Tensor,
    weights: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    check_linear(x, weights, scales, bias, side=1)
    out_features, in_features = weights.shape
    y = torch.empty((*x.shape[:-1], out_features), dtype=dtype)
    _kernels.linear(
        _array(y),
        _array(x),
        _array(weights),
        _array(scales),
        None if bias is None else _array(bias),
        x.shape[:-1].numel(),
        out_features,
        in_features,
        _number(dtype),
        _number(x.dtype),
        _number(scales.dtype),
        _number(scales.dtype if bias is None else bias.dtype),
    )
    return y


def _python_linear(
    x: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    return _python_linear_bias(x, weights, scales, None, dtype)


def _python_linear_backward(
    grad: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    check_linear(grad, weights, scales, None, side=0)
    out_features, in_features = weights.shape
    grad_x = torch.empty((*grad.shape[:-1], in_features), dtype=dtype)
    _kernels.linear_backward(
        _array(grad_x),
        _array(grad),
        _array(weights),
        _array(scales),
        grad.shape[:-1].numel(),
        out_features,
        in_features,
        _number(dtype),
        _number(grad.dtype),
        _number(scales.dtype),
    )
    return grad_x


def _packed_arguments(tensors, present) -> tuple[list[Any], list[int]]:
    """Arrays and dtypes of the kernels."""
    weights, scales, steps, zeros, codebook = tensors
    there = [present & bit for bit in (HAS_STEPS, HAS_ZEROS, HAS_CODEBOOK)]
    optional = [
        _array(tensor) if is_there else None
        for tensor, is_there in zip((steps, zeros, codebook), there, strict=True)
    ]
    dtypes = [
        _kernels.UINT8 if tensor.dtype == torch.uint8 else _number(tensor.dtype)
        for tensor in (scales, zeros, codebook)
    ]
    return [_array(weights), _array(scales), *optional], dtypes


def _python_packed(
    x: torch.Tensor,
    weights: torch.Tensor,
    scales: torch.Tensor,
    scale_steps: torch.Tensor,
    zero_points: torch.Tensor,
    codebook: torch.Tensor,
    bias: torch.Tensor,
    bits: int,
    group: int,
    present: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    tensors = (weights, scales, scale_steps, zero_points, codebook)
    check_packed(x, tensors, bias, x.shape[-1], bits, group, present)
    arrays, dtypes = _packed_arguments(tensors, present)
    y = torch.empty((*x.shape[:-1], len(weights)), dtype=dtype)
    _kernels.linear_packed(
        _array(y),
        _array(x),
        *arrays,
        _array(bias) if present & HAS_BIAS else None,
        x.shape[:-1].numel(),
        len(weights),
        x.shape[-1],
        bits,
        group,
        codebook.shape[0] if present & HAS_CODEBOOK else 1,
        _number(dtype),
        _number(x.dtype),
        *dtypes,
        _number(bias.dtype) if present & HAS_BIAS else _kernels.FLOAT32,
    )
    return y


def _python_packed_backward(
    grad: torch.Tensor,
    weights: torch.Tensor,
    scales: torch.Tensor,
    scale_steps: torch.Tensor,
    zero_points: torch.Tensor,
    codebook: torch.Tensor,
    in_features: int,
    bits: int,
    group: int,
    present: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    tensors = (weights, scales, scale_steps, zero_points, codebook)
    check_packed(grad, tensors, None, in_features, bits, group, present)
    arrays, dtypes = _packed_arguments(tensors, present)
    grad_x = torch.empty((*grad.shape[:-1], in_features), dtype=dtype)
    _kernels.linear_packed_backward(
        _array(grad_x),
        _array(grad),
        *arrays,
        grad.shape[:-1].numel(),
        len(weights),
        in_features,
        bits,
        group,
        codebook.shape[0] if present & HAS_CODEBOOK else 1,
        _number(dtype),
        _number(grad.dtype),
        *dtypes,
    )
    return grad_x


# ---- registration ----------------------------------------------------------------------------


def _register() -> str:
    """Register the operators; returns which kernels they have, ``"c"`` or ``"python"``.

    Raises:
        RuntimeError: if QUANTIZATION_TORCH_OPS asks for what cannot be had.
    """
    wanted = os.environ.get("QUANTIZATION_TORCH_OPS", "")
    if wanted not in ("", "c", "python"):
        raise RuntimeError(f"QUANTIZATION_TORCH_OPS is {wanted!r}; allowed are 'c' and 'python'")
    if wanted != "python":
        for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
            if _kernels.register_torch(os.path.join(torch.__path__[0], "lib", name)):
                return "c"
        if wanted == "c":
            raise RuntimeError(
                f"torch {torch.__version__} has no stable C shim (2.10 and later have); "
                "unset QUANTIZATION_TORCH_OPS"
            )
    kernels = (
        _python_linear,
        _python_linear_bias,
        _python_linear_backward,
        _python_packed,
        _python_packed_backward,
    )
    for (name, schema), kernel in zip(_SCHEMAS.items(), kernels, strict=True):
        torch.library.define(f"quantization::{name}", schema)
        torch.library.impl(f"quantization::{name}", "CPU", kernel)
    return "python"


#: Which kernels the operators have: ``"c"`` or ``"python"``.
KERNELS = _register()

linear = torch.ops.quantization.linear.default
linear_bias = torch.ops.quantization.linear_bias.default
linear_backward = torch.ops.quantization.linear_backward.default
packed = torch.ops.quantization.packed.default
packed_backward = torch.ops.quantization.packed_backward.default


@torch.library.register_fake("quantization::linear_bias")
def _fake_linear_bias(x, weights, scales, bias, dtype):
    check_linear(x, weights, scales, bias, side=1)
    return x.new_empty((*x.shape[:-1], weights.shape[0]), dtype=dtype)


@torch.library.register_fake("quantization::linear")
def _fake_linear(x, weights, scales, dtype):
    return _fake_linear_bias(x, weights, scales, None, dtype)


@torch.library.register_fake("quantization::linear_backward")
def _fake_linear_backward(grad, weights, scales, dtype):
    check_linear(grad, weights, scales, None, side=0)
    return grad.new_empty((*grad.shape[:-1], weights.shape[1]), dtype=dtype)


@torch.library.register_fake("quantization::packed")
def _fake_packed(x, weights, scales, steps, zeros, codebook, bias, bits, group, present, dtype):
    tensors = (weights, scales, steps, zeros, codebook)
    check_packed(x, tensors, bias, x.shape[-1], bits, group, present)
    return x.new_empty((*x.shape[:-1], weights.shape[0]), dtype=dtype)


@torch.library.register_fake("quantization::packed_backward")
def _fake_packed_backward(
    grad, weights, scales, steps, zeros, codebook, in_features, bits, group, present, dtype
):
    tensors = (weights, scales, steps, zeros, codebook)
    check_packed(grad, tensors, None, in_features, bits, group, present)
    return grad.new_empty((*grad.shape[:-1], in_features), dtype=dtype)


def _register_batching(operator: Any) -> None:
    """Under vmap a batch of rows is more rows; a batch of weights is one call for each."""

    def batched(info, in_dims, rows, *rest):
        if all(dim is None for dim in in_dims[1:]):
            return operator(rows.movedim(in_dims[0], 0), *rest), 0
        results = []
        for i in range(info.batch_size):
            pairs = zip((rows, *rest), in_dims, strict=True)
            results.append(operator(*(a if d is None else a.select(d, i) for a, d in pairs)))
        return torch.stack(results), 0

    torch.library.register_vmap(operator, batched)


for _operator in (linear, linear_bias, linear_backward, packed, packed_backward):
    _register_batching(_operator)


def _register_nested(name: str, operator: Any) -> None:
    """A nested tensor, which nn.TransformerEncoder makes of a mask, is a call for each part."""

    def nested(x, *rest):
        return torch.nested.as_nested_tensor([operator(part, *rest) for part in x.unbind()])

    for key in ("NestedTensorCPU", "NestedTensorCUDA"):
        _library.impl(name, nested, key)
    _library.impl(name, torch.library.fallthrough_kernel, "AutogradNestedTensor")


_library = torch.library.Library("quantization", "FRAGMENT")  # what it registered dies with it
for _name in _SCHEMAS:  # the kernels above are for the CPU; this is for whatever else there is
    _library.impl(_name, getattr(torch_devices, _name), "CompositeExplicitAutograd")
_register_nested("linear", linear)
_register_nested("linear_bias", linear_bias)
_register_nested("packed", packed)
