"""The operators on devices that have no kernel of ours (CUDA, MPS, XPU and others): torch alone.

A call makes the weight in float, some rows at a time, and multiplies as nn.Linear does there. The
sums are those of that device's own matrix product, in the type of the result if it has 16 bits, and
in float32 (float64 for float64 activations) if not: a weight is then rounded to bfloat16 or float16
as that of a bfloat16 or float16 nn.Linear is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch.nn import functional as F

from quantization.ops import torch_checks as checks
from quantization.ops.packed_rows import decode_rows

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_BLOCK = 1 << 24  # numbers of a weight that are in float at a time: 64 MiB of float32

#: Makes rows of a weight (the first, how many), as numbers of a type.
_Decoder = Callable[[int, int, torch.dtype], torch.Tensor]


def linear(
    x: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """``x @ (weights * scales[:, None]).T`` as ``dtype``; tensors as in ``torch_ops``.

    Example:
        >>> weights = torch.tensor([[1, 2], [3, -4]], dtype=torch.int8)
        >>> linear(torch.ones(1, 2), weights, torch.tensor([0.5, 0.25]), torch.float32)
        tensor([[ 1.5000, -0.2500]])
    """
    return linear_bias(x, weights, scales, None, dtype)


def linear_bias(
    x: torch.Tensor,
    weights: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The same, with a bias or None."""
    checks.check_linear(x, weights, scales, bias, side=1)
    _check_floats(x, scales, bias, dtype)
    return _map(x, bias, dtype, weights.shape, partial(_int8_rows, weights, scales))


def linear_backward(
    grad: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """``grad @ (weights * scales[:, None])`` as ``dtype``."""
    checks.check_linear(grad, weights, scales, None, side=0)
    _check_floats(grad, scales, None, dtype)
    return _gradient(grad, dtype, weights.shape, partial(_int8_rows, weights, scales))


def packed(
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
    """The linear map of packed weights; which tensors count is said by ``present``."""
    tensors = (weights, scales, scale_steps, zero_points, codebook)
    given = bias if present & checks.HAS_BIAS else None
    checks.check_packed(x, tensors, given, x.shape[-1], bits, group, present)
    _check_floats(x, None, given, dtype)
    shape = weights.shape[0], x.shape[-1]
    decode = partial(_packed_rows, _those_present(tensors, present), bits, group, shape[1])
    return _map(x, given, dtype, shape, decode)


def packed_backward(
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
    """The gradient of its input."""
    tensors = (weights, scales, scale_steps, zero_points, codebook)
    checks.check_packed(grad, tensors, None, in_features, bits, group, present)
    _check_floats(grad, None, None, dtype)
    torch._check(
        grad.dim() >= 1 and grad.shape[-1] == weights.shape[0],
        lambda: f"grad {tuple(grad.shape)} must have {weights.shape[0]} columns (out_features)",
    )
    decode = partial(_packed_rows, _those_present(tensors, present), bits, group, in_features)
    return _gradient(grad, dtype, (weights.shape[0], in_features), decode)


# ---- products --------------------------------------------------------------------------------


def _map(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    shape: tuple[int, int],
    decode: _Decoder,
) -> torch.Tensor:
    kind = _compute_type(x, dtype)
    x, parts = x.to(kind), []
    with _without_autocast(x.device.type):
        for start, count in _blocks(*shape):
            offsets = None if bias is None else bias.narrow(0, start, count).to(kind)
            parts.append(F.linear(x, decode(start, count, kind), offsets))
    return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).to(dtype)


def _gradient(
    grad: torch.Tensor, dtype: torch.dtype, shape: tuple[int, int], decode: _Decoder
) -> torch.Tensor:
    kind = _compute_type(grad, dtype)
    grad, total = grad.to(kind), None
    with _without_autocast(grad.device.type):
        for start, count in _blocks(*shape):
            part = grad.narrow(-1, start, count) @ decode(start, count, kind)
            total = part if total is None else total.to(_wide(kind)) + part
    return total.to(dtype)


def _without_autocast(device: str) -> AbstractContextManager:
    """The operator was told which type its result has; autocast is not to change that inside."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def _blocks(out_features: int, in_features: int) -> Iterator[tuple[int, int]]:
    """Rows, some at a time: the first and how many; at least once, also of none."""
    step = max(_BLOCK // max(in_features, 1), 1)
    for start in range(0, max(out_features, 1), step):
        yield start, min(step, out_features - start)


def _compute_type(rows: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    if rows.dtype is torch.float64:
        return torch.float64
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32


def _wide(kind: torch.dtype) -> torch.dtype:
    return torch.float64 if kind is torch.float64 else torch.float32


# ---- weights ---------------------------------------------------------------------------------


def _int8_rows(
    weights: torch.Tensor, scales: torch.Tensor, start: int, count: int, kind: torch.dtype
) -> torch.Tensor:
    wide = _wide(kind)
    codes, factors = (tensor.narrow(0, start, count).to(wide) for tensor in (weights, scales))
    return (codes * factors.unsqueeze(1)).to(kind)


def _packed_rows(
    tensors: list[torch.Tensor | None],
    bits: int,
    group: int,
    in_features: int,
    start: int,
    count: int,
    kind: torch.dtype,
) -> torch.Tensor:
    *by_row, codebook = tensors
    cut = [None if tensor is None else tensor.narrow(0, start, count) for tensor in by_row]
    if codebook is not None and codebook.shape[0] > 1:
        codebook = codebook.narrow(0, start, count)
    return decode_rows(*cut, codebook, bits, group, in_features).to(kind)


def _those_present(tensors: tuple[torch.Tensor, ...], present: int) -> list[torch.Tensor | None]:
    """The tensors of a packed operator, None for what only holds a place."""
    flags = (checks.HAS_STEPS, checks.HAS_ZEROS, checks.HAS_CODEBOOK)
    pairs = zip(flags, tensors[2:], strict=True)
    return [*tensors[:2], *(tensor if present & flag else None for flag, tensor in pairs)]


def _check_floats(
    rows: torch.Tensor,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> None:
    types = [dtype, *(t.dtype for t in (rows, scales, bias) if t is not None)]
    wrong = [kind for kind in types if kind not in _FLOATS]
    torch._check(
        not wrong, lambda: f"must be float32, bfloat16, float16 or float64, not {wrong[0]}"
    )
    torch._check(
        rows.layout is torch.strided,
        lambda: f"layout {rows.layout} will not do; only dense (strided) tensors will",
    )
