"""The operators on devices that have no kernel of ours (CUDA, MPS, XPU and others): torch alone.

A call makes the weight in float, some rows at a time, and multiplies as nn.Linear does there. The
sums are those of that device's own matrix product, in the type of the result if it has 16 bits, and
in float32 (float64 for float64 activations) if not: a weight is then rounded to bfloat16 or float16
as that of a bfloat16 or float16 nn.Linear is; one beyond the largest of that type becomes that one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn import functional as F

from quantization.ops.operators import Call, check_call
from quantization.ops.packed_rows import decode_rows, round_once

_BLOCK = 1 << 24  # numbers of a weight that are in float at a time: 64 MiB of float32


def multiply(call: Call) -> torch.Tensor:
    """What the operator gives, by matrix products of torch; a kernel for any device.

    Raises:
        RuntimeError: if something does not fit.

    Example:
        >>> from quantization.ops.operators import OPERATORS
        >>> weights = torch.tensor([[1, 2], [3, -4]], dtype=torch.int8)
        >>> scales = torch.tensor([0.5, 0.25])
        >>> multiply(OPERATORS[0].call(torch.ones(1, 2), weights, scales, torch.float32))
        tensor([[ 1.5000, -0.2500]])
    """
    check_call(call)
    dtype = _compute_type(call)
    rows = call.rows.to(dtype)
    product = _input_gradient if call.is_backward else _linear
    with _without_autocast(rows.device.type):
        return product(call, rows).to(call.dtype)


# ---- products --------------------------------------------------------------------------------


def _linear(call: Call, rows: torch.Tensor) -> torch.Tensor:
    parts = []
    for start, count in _blocks(call):
        bias = None if call.bias is None else call.bias.narrow(0, start, count).to(rows.dtype)
        parts.append(F.linear(rows, float_rows(call, start, count, rows.dtype), bias))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _input_gradient(call: Call, rows: torch.Tensor) -> torch.Tensor:
    total = None
    for start, count in _blocks(call):
        part = rows.narrow(-1, start, count) @ float_rows(call, start, count, rows.dtype)
        total = part if total is None else total.to(_wide(rows.dtype)) + part
    assert total is not None  # there is one block at least
    return total


def _without_autocast(device: str) -> AbstractContextManager[object]:
    """The operator was told which type its result has; autocast is not to change that inside."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def _blocks(call: Call) -> Iterator[tuple[int, int]]:
    """Rows of the weight, some at a time: the first and how many; at least once, also of none."""
    step = max(_BLOCK // max(call.in_features, 1), 1)
    for start in range(0, max(call.out_features, 1), step):
        yield start, min(step, call.out_features - start)


def _compute_type(call: Call) -> torch.dtype:
    if call.rows.dtype is torch.float64:
        return torch.float64
    return call.dtype if call.dtype in (torch.bfloat16, torch.float16) else torch.float32


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


# ---- weights ---------------------------------------------------------------------------------


def float_rows(call: Call, start: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows ``start`` to ``start + count`` of the weight as finite numbers of that type.

    Example:
        >>> from quantization.ops.operators import OPERATORS
        >>> weights, scales = torch.tensor([[1, 2]], dtype=torch.int8), torch.tensor([0.5])
        >>> call = OPERATORS[0].call(torch.ones(1, 2), weights, scales, torch.float32)
        >>> float_rows(call, 0, 1, torch.float32)
        tensor([[0.5000, 1.0000]])
    """

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.narrow(0, start, count)

    weights, scales, codebook = cut(call.weights), cut(call.scales), call.codebook
    if call.group is None:
        wide = _wide(dtype)
        return round_once(weights.to(wide) * scales.to(wide).unsqueeze(1), dtype)
    if codebook is not None and codebook.shape[0] > 1:
        codebook = cut(codebook)
    steps = None if call.scale_steps is None else cut(call.scale_steps)
    zeros = None if call.zero_points is None else cut(call.zero_points)
    decoded = decode_rows(
        weights, scales, steps, zeros, codebook, call.bits, call.group, call.in_features
    )
    return round_once(decoded, dtype)
