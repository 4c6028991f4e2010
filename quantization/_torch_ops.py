"""The torch operators: ``y = x (weights * scales)^T + bias`` with int8 weights, and its gradient.

Importing this module imports torch. The operators (``torch.ops.quantization.linear``,
``linear_bias`` and ``linear_backward``) are registered from C through torch's stable shim, or, with
a torch that lacks it, in Python over the NumPy binding; the environment variable
``QUANTIZATION_TORCH_OPS`` forces one of them (``c``, or an error; ``python``). Here they get shapes
for fake tensors, batching rules and derivatives. Programs call :func:`linear`: a bare operator has
no gradient.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.autograd import forward_ad

from quantization import _kernels

_SCHEMAS = {
    "linear": "(Tensor x, Tensor weights, Tensor scales, ScalarType dtype) -> Tensor",
    "linear_bias": "(Tensor x, Tensor weights, Tensor scales, Tensor bias, ScalarType dtype)"
    " -> Tensor",
    "linear_backward": "(Tensor grad, Tensor weights, Tensor scales, ScalarType dtype) -> Tensor",
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


def _check(
    rows: torch.Tensor,
    weights: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    side: int,
) -> None:
    """Shapes and dtypes, as torch_ops.c checks them; works on fake tensors.

    One meta tensor is enough to bring torch here, to a result without numbers: that must be meta.
    """
    for tensor in (weights, scales, bias):
        torch._check(
            tensor is None or tensor.is_meta == rows.is_meta,
            lambda: (
                "some tensors are on the meta device, without numbers, and some are not: load "
                "or move them first"
            ),
        )
    torch._check(weights.dtype == torch.int8, lambda: f"weights must be int8, not {weights.dtype}")
    torch._check(
        weights.dim() == 2 and rows.dim() >= 1 and rows.shape[-1] == weights.shape[side],
        lambda: f"input {tuple(rows.shape)} does not fit weights {tuple(weights.shape)}",
    )
    for vector in (scales, bias):
        torch._check(
            vector is None or (vector.dim() == 1 and vector.shape[0] == weights.shape[0]),
            lambda: f"scales and bias must have {weights.shape[0]} elements (out_features)",
        )


def _python_linear_bias(
    x: torch.Tensor,
    weights: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    _check(x, weights, scales, bias, side=1)
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
    _check(grad, weights, scales, None, side=0)
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
    kernels = (_python_linear, _python_linear_bias, _python_linear_backward)
    for (name, schema), kernel in zip(_SCHEMAS.items(), kernels, strict=True):
        torch.library.define(f"quantization::{name}", schema)
        torch.library.impl(f"quantization::{name}", "CPU", kernel)
    return "python"


#: Which kernels the operators have: ``"c"`` or ``"python"``.
KERNELS = _register()

_linear = torch.ops.quantization.linear.default
_linear_bias = torch.ops.quantization.linear_bias.default
_linear_backward = torch.ops.quantization.linear_backward.default


@torch.library.register_fake("quantization::linear_bias")
def _fake_linear_bias(x, weights, scales, bias, dtype):
    _check(x, weights, scales, bias, side=1)
    return x.new_empty((*x.shape[:-1], weights.shape[0]), dtype=dtype)


@torch.library.register_fake("quantization::linear")
def _fake_linear(x, weights, scales, dtype):
    return _fake_linear_bias(x, weights, scales, None, dtype)


@torch.library.register_fake("quantization::linear_backward")
def _fake_linear_backward(grad, weights, scales, dtype):
    _check(grad, weights, scales, None, side=0)
    return grad.new_empty((*grad.shape[:-1], weights.shape[1]), dtype=dtype)


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


for _operator in (_linear, _linear_bias, _linear_backward):
    _register_batching(_operator)


def _register_nested(name: str, operator: Any) -> None:
    """A nested tensor, which nn.TransformerEncoder makes of a mask, is a call for each part."""

    def nested(x, *rest):
        return torch.nested.as_nested_tensor([operator(part, *rest) for part in x.unbind()])

    _library.impl(name, nested, "NestedTensorCPU")
    _library.impl(name, torch.library.fallthrough_kernel, "AutogradNestedTensor")


_library = torch.library.Library("quantization", "FRAGMENT")  # what it registered dies with it
_register_nested("linear", _linear)
_register_nested("linear_bias", _linear_bias)

# ---- derivatives -----------------------------------------------------------------------------


def _forward(x, weights, scales, bias, dtype):
    if bias is None:
        return _linear(x, weights, scales, dtype)
    return _linear_bias(x, weights, scales, bias, dtype)


class _Linear(torch.autograd.Function):
    """y = x W^T + bias, where W = weights * scales; derivatives to x and bias."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weights, scales, bias, dtype):
        return _forward(x, weights, scales, bias, dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weights, scales, bias, dtype = inputs
        ctx.save_for_backward(weights, scales)
        ctx.save_for_forward(weights, scales)
        ctx.x_dtype, ctx.dtype = x.dtype, dtype
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx, grad):
        weights, scales = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _input_gradient(grad, weights, scales, ctx.x_dtype)
        if ctx.needs_input_grad[3]:
            rows = grad.unsqueeze(0) if grad.dim() == 1 else grad.flatten(0, -2)
            grad_bias = rows.sum(0, dtype=ctx.bias_dtype)
        return grad_x, None, None, grad_bias, None


class _InputGradient(torch.autograd.Function):
    """grad_x = grad W: the transposed map, so its own gradient is the map again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad, weights, scales, dtype):
        return _linear_backward(grad, weights, scales, dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, weights, scales, dtype = inputs
        ctx.save_for_backward(weights, scales)
        ctx.save_for_forward(weights, scales)
        ctx.grad_dtype, ctx.dtype = grad.dtype, dtype

    @staticmethod
    def backward(ctx, grad):
        weights, scales = ctx.saved_tensors
        return _map(grad, weights, scales, None, ctx.grad_dtype), None, None, None


class _DualLinear(_Linear):
    """The same with forward mode, apart because torch.compile refuses functions that have it."""

    @staticmethod
    def jvp(ctx, x, weights, scales, bias, dtype):
        saved_weights, saved_scales = ctx.saved_tensors
        tangent = None if bias is None else bias.to(ctx.dtype)
        if x is None:
            return tangent
        along_x = _map(x, saved_weights, saved_scales, None, ctx.dtype)
        return along_x if tangent is None else along_x + tangent


class _DualInputGradient(_InputGradient):
    """The same with forward mode."""

    @staticmethod
    def jvp(ctx, grad, weights, scales, dtype):
        return _input_gradient(grad, *ctx.saved_tensors, ctx.dtype)


def _is_forward_mode() -> bool:
    return forward_ad._current_level >= 0


def _is_differentiated(*tensors: torch.Tensor | None) -> bool:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return True
    return _is_forward_mode()


def _map(x, weights, scales, bias, dtype):
    if _is_differentiated(x, bias):
        function = _DualLinear if _is_forward_mode() else _Linear
        return function.apply(x, weights, scales, bias, dtype)
    return _forward(x, weights, scales, bias, dtype)


def _input_gradient(grad, weights, scales, dtype):
    if _is_differentiated(grad):
        function = _DualInputGradient if _is_forward_mode() else _InputGradient
        return function.apply(grad, weights, scales, dtype)
    return _linear_backward(grad, weights, scales, dtype)


# ---- the public function ---------------------------------------------------------------------


@torch.fx.wrap
def linear(
    x: torch.Tensor,
    weights: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``x @ (weights * scales[:, None]).T + bias`` in one native call.

    Products are summed in float32 (float64 for a float64 ``x``); scale and bias are applied there,
    and the result is rounded once. Works under autograd (to ``x`` and ``bias``, any order, forward
    mode too), autocast, torch.compile, export, vmap, fx, jit and on meta tensors.

    Args:
        x: activations [..., in_features]; float32, bfloat16, float16 or float64.
        weights: int8 codes [out_features, in_features].
        scales: one a row of weights, [out_features], of any of those float types.
        bias: [out_features], of any of those float types, or None.
        out_dtype: of the result. None: the autocast dtype where autocast is on (and ``x`` is not
            float64, which it leaves alone), else the dtype of ``x``.

    Returns:
        [..., out_features] in ``out_dtype``.

    Raises:
        RuntimeError: if shapes or dtypes do not fit, or scales ask for a gradient.

    Example:
        >>> import torch
        >>> weights = torch.tensor([[1, 2], [3, -4]], dtype=torch.int8)
        >>> linear(torch.ones(1, 2), weights, torch.tensor([0.5, 0.25]))
        tensor([[ 1.5000, -0.2500]])
    """
    if torch.jit.is_scripting():
        dtype = x.dtype if out_dtype is None else out_dtype
        if bias is None:
            return torch.ops.quantization.linear(x, weights, scales, dtype)
        return torch.ops.quantization.linear_bias(x, weights, scales, bias, dtype)
    else:
        if out_dtype is None:
            out_dtype = x.dtype
            if torch.is_autocast_enabled("cpu") and out_dtype != torch.float64:
                out_dtype = torch.get_autocast_dtype("cpu")
        if scales.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "scales require a gradient, and quantized weights have none: pass "
                "scales.detach(), or train the float layer and quantize it again"
            )
        return _map(x, weights, scales, bias, out_dtype)
