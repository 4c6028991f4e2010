"""The linear maps of quantized weights as torch functions: derivatives, autocast, fx.

``linear`` has int8 weights with a scale a row, ``packed_linear`` weights of any width in groups.
Both are one native call on the CPU (:mod:`quantization.ops.torch_kernels` has the operators), and
plain torch on other devices (:mod:`quantization.ops.torch_devices`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function, forward_ad
from torch.jit import is_scripting, is_tracing  # type: ignore[attr-defined]  # unsaid there

from quantization.ops import torch_kernels as kernels
from quantization.ops.exporters import onnx_nodes
from quantization.ops.operators import HAS_BIAS, with_stand_ins

# ---- derivatives -----------------------------------------------------------------------------
#
# A quantized weight is `tensors`, and two numbers before them that say how to read them: for int8
# rows 8, 0 and (weights, scales); for packed ones bits, group and (weights, scales, scale_steps,
# zero_points, codebook), of which the last three may be None. They are passed one by one: vmap
# takes no tuples apart.


def _run(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    bits: int,
    group: int,
    *tensors: Any,
) -> torch.Tensor:
    """The linear map, ``x W^T + bias``, by the operator alone."""
    try:
        if group:
            tensors, present = with_stand_ins(*tensors)
            if bias is None:
                return kernels.packed(x, *tensors, tensors[1], bits, group, present, dtype)
            present |= HAS_BIAS
            return kernels.packed(x, *tensors, bias, bits, group, present, dtype)
        if bias is None:
            return kernels.linear(x, *tensors, dtype)
        return kernels.linear_bias(x, *tensors, bias, dtype)
    except RuntimeError as error:
        kernels.raise_heard(error)
        raise


def _run_backward(
    grad: torch.Tensor,
    dtype: torch.dtype,
    in_features: int,
    bits: int,
    group: int,
    *tensors: Any,
) -> torch.Tensor:
    """The gradient to x, ``grad W``, by the operator alone."""
    try:
        if group:
            tensors, present = with_stand_ins(*tensors)
            return kernels.packed_backward(grad, *tensors, in_features, bits, group, present, dtype)
        return kernels.linear_backward(grad, *tensors, dtype)
    except RuntimeError as error:
        kernels.raise_heard(error)
        raise


class _Linear(Function):
    """y = x W^T + bias; derivatives to x and bias."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> torch.Tensor:
        return _run(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, bias, dtype, *numbers = inputs[:5]
        tensors = inputs[5:]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.x_dtype, ctx.dtype, ctx.numbers = x.dtype, dtype, numbers
        ctx.in_features = x.shape[-1]
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,), weight = grads, (*ctx.numbers, *ctx.saved_tensors)
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _input_gradient(grad, ctx.x_dtype, ctx.in_features, *weight)
        if ctx.needs_input_grad[1]:
            rows = grad.unsqueeze(0) if grad.dim() == 1 else grad.flatten(0, -2)
            grad_bias = rows.sum(0, dtype=ctx.bias_dtype)
        return grad_x, grad_bias, None, *[None] * len(weight)


class _InputGradient(Function):
    """grad_x = grad W: the transposed map, so its own gradient is the map again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> torch.Tensor:
        return _run_backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        grad, dtype, in_features, *numbers = inputs[:5]
        tensors = inputs[5:]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.grad_dtype, ctx.dtype = grad.dtype, dtype
        ctx.in_features, ctx.numbers = in_features, numbers

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,), weight = grads, (*ctx.numbers, *ctx.saved_tensors)
        return _linear(grad, None, ctx.grad_dtype, *weight), None, None, *[None] * len(weight)


class _DualLinear(_Linear):
    """The same with forward mode, apart because torch.compile refuses functions that have it."""

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> torch.Tensor | None:
        x, bias = tangents[:2]
        along_bias = None if bias is None else bias.to(ctx.dtype)
        if x is None:
            return along_bias
        along_x = _linear(x, None, ctx.dtype, *ctx.numbers, *ctx.saved_tensors)
        return along_x if along_bias is None else along_x + along_bias


class _DualInputGradient(_InputGradient):
    """The same with forward mode."""

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor) -> torch.Tensor:
        weight = (*ctx.numbers, *ctx.saved_tensors)
        return _input_gradient(tangents[0], ctx.dtype, ctx.in_features, *weight)


def _is_forward_mode() -> bool:
    return forward_ad._current_level >= 0


def _is_traced() -> bool:
    """Whether TorchScript's tracer is at work: it records operators, and no functions of Python."""
    if not is_tracing():
        return False
    if onnx_nodes.is_exporting():
        raise RuntimeError(
            "quantized layers have no nodes in torch's old ONNX exporter: call "
            "torch.onnx.export(..., dynamo=True), which needs the package onnxscript"
        )
    return True


def _is_differentiated(x: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    if x.requires_grad or (bias is not None and bias.requires_grad):
        return torch.is_grad_enabled() or _is_forward_mode()
    return _is_forward_mode()


def _linear(
    x: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, *weight: Any
) -> torch.Tensor:
    """The linear map, with derivatives where they are asked for."""
    if not _is_traced() and _is_differentiated(x, bias):
        function: type[Function] = _DualLinear if _is_forward_mode() else _Linear
        y: torch.Tensor = function.apply(x, bias, dtype, *weight)
        return y
    return _run(x, bias, dtype, *weight)


def _input_gradient(
    grad: torch.Tensor, dtype: torch.dtype, in_features: int, *weight: Any
) -> torch.Tensor:
    """The gradient to x, with derivatives where they are asked for."""
    if _is_differentiated(grad):
        function: type[Function] = _DualInputGradient if _is_forward_mode() else _InputGradient
        grad_x: torch.Tensor = function.apply(grad, dtype, in_features, *weight)
        return grad_x
    return _run_backward(grad, dtype, in_features, *weight)


def output_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that a linear map gives its result: that of autocast, or else of ``x``.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     output_dtype(torch.ones(1))
        torch.bfloat16
    """
    device = "cpu" if x.is_cpu or x.is_meta else x.device.type  # is_cpu is fast; meta has none
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def _refuse_trained() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "scales require a gradient, and quantized weights have none: pass "
            "scales.detach(), or train the float layer and quantize it again"
        )


# ---- the public functions --------------------------------------------------------------------


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
    if is_scripting():
        dtype = x.dtype if out_dtype is None else out_dtype
        if bias is None:
            y: torch.Tensor = torch.ops.quantization.linear(x, weights, scales, dtype)
        else:
            y = torch.ops.quantization.linear_bias(x, weights, scales, bias, dtype)
        return y
    else:
        if out_dtype is None:
            out_dtype = output_dtype(x)
        if scales.requires_grad:
            _refuse_trained()
        return _linear(x, bias, out_dtype, 8, 0, weights, scales)


@torch.fx.wrap
def packed_linear(
    x: torch.Tensor,
    weights: torch.Tensor,
    scales: torch.Tensor,
    scale_steps: torch.Tensor | None,
    zero_points: torch.Tensor | None,
    codebook: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group: int,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``x @ W.T + bias`` in one native call, where W are packed weights of 1 to 8 bits in groups.

    ``w = (value - zero) * scale`` in float32: the value of a code is its entry of ``codebook``;
    without one the code itself, unsigned where there are zero points, else in two's complement.
    Products are summed in float32 (float64 for a float64 ``x``); where ``x`` is bfloat16, weights
    may be rounded to bfloat16 first. Works wherever :func:`linear` does.

    Args:
        x: activations [..., in_features]; float32, bfloat16, float16 or float64.
        weights: uint8 [out_features, row bytes], dense rows, first code in the lowest bits.
        scales: [out_features, ceil(in_features / group)]; a float type, or uint8: codes of
            ``scale_steps``, without those exponents, ``2 ** (scale - 127)``.
        scale_steps: floats [out_features], or None.
        zero_points: as scales, of a float type; or uint8, packed as the weights are; or int8
            [out_features, groups], ``(i + 128) * 2**(bits - 8)``; or None.
        codebook: a float type, [1, 2**bits] or one a row, [out_features, 2**bits]; or None.
        bias: [out_features], of a float type, or None.
        bits: of a code; 0: ternary codes 0, 1, 2 for 0, 1, -1, five to a byte in base 3.
        group: codes of a row that share a scale.
        out_dtype: as for :func:`linear`.

    Returns:
        [..., out_features] in ``out_dtype``.

    Raises:
        RuntimeError: if shapes or dtypes do not fit, or scales ask for a gradient.

    Example:
        >>> import torch
        >>> weights = torch.tensor([[0x21], [0xF1]], dtype=torch.uint8)  # 1, 2 and 1, -1
        >>> scales = torch.tensor([[0.5], [2.0]])
        >>> packed_linear(torch.ones(1, 2), weights, scales, None, None, None, None, 4, 2)
        tensor([[1.5000, 0.0000]])
    """
    if out_dtype is None:
        out_dtype = output_dtype(x)
    if scales.requires_grad:
        _refuse_trained()
    if group < 1:  # 0 would say: int8 rows
        raise RuntimeError(f"group is {group}; a scale serves 1 code at least")
    if weights.size(-1) == 0:  # no group, though a scheme without groups has a scale all the same
        scales, zero_points = scales[:, :0], None
    tensors = (weights, scales, scale_steps, zero_points, codebook)
    return _linear(x, bias, out_dtype, bits, group, *tensors)
