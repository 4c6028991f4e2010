"""The operators as nodes of ONNX, for ``torch.onnx.export(..., dynamo=True)``.

int8 rows become DequantizeLinear and MatMul. Codes of 2, 4 and 8 bits become MatMulNBits of ONNX
Runtime (``com.microsoft``) where that operator can hold them: without a codebook, and in groups of
a multiple of 16. All others are decoded by plain nodes, which a runtime computes when it opens the
file, and multiplied in float.

Constants stay the tensors of the layer, as they are stored; what MatMulNBits wants otherwise
(shape, offset) are nodes too.
"""

from __future__ import annotations

import sys

import torch
from torch.nn import functional as F

from quantization.ops import torch_devices
from quantization.ops.operators import OPERATORS, Call, check_call
from quantization.ops.packed_rows import from_fixed_point, full_scales, unpack

#: Widths of codes that MatMulNBits takes, and those with which it takes float zero points.
_WIDTHS, _WIDTHS_OF_FLOAT_ZEROS = (2, 4, 8), (2, 4)
_LEAST_BLOCK, _LARGEST_BLOCK, _ROW_BLOCK = 16, 256, 128
_EXACT_FLOATS = 1  # accuracy_level: activations stay float32


def is_exporting() -> bool:
    """Whether an ONNX exporter of torch is at work.

    Example:
        >>> is_exporting()
        False
    """
    return "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()


def decompose(call: Call) -> torch.Tensor:
    """What an exporter puts in the place of an operator; elsewhere a tensor without numbers.

    Raises:
        RuntimeError: if something does not fit.

    Example:
        >>> weights, scales = torch.tensor([[1, 2]], dtype=torch.int8), torch.tensor([0.5])
        >>> decompose(OPERATORS[0].call(torch.ones(3, 2), weights, scales, torch.float32)).shape
        torch.Size([3, 1])
    """
    check_call(call)
    if not is_exporting():  # torch asks for shapes where sizes are symbols
        return call.rows.new_empty(call.result_shape, dtype=call.dtype)
    if call.scales.dtype is torch.uint8 and call.scale_steps is None:
        call = call._replace(scales=_powers_of_two(call.scales))
    wide = torch.float64 if call.rows.dtype is torch.float64 else torch.float32
    rows = call.rows.to(wide)
    block = _block(call) if wide is torch.float32 else 0
    if block:
        y = _matmul_nbits(call, rows, block)
    elif call.group is None and wide is torch.float32:
        y = rows @ _dequantize_linear(call.weights, call.scales.float()).t()
    else:
        y = rows @ torch_devices.float_rows(call, 0, call.out_features, wide).t()
    return (y if call.bias is None else y + call.bias.to(wide)).to(call.dtype)


def _powers_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """Scales of exponents by arithmetic: ONNX cannot take bits for a number."""
    powers = torch.pow(2.0, exponents.float() - 127)
    return torch.where(exponents == 255, torch.nan, powers)


def _dequantize_linear(weights: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    given: torch.Tensor = torch.onnx.ops.symbolic(
        "DequantizeLinear",
        (weights, scales),
        {"axis": 0},
        dtype=torch.float32,
        shape=weights.shape,
    )
    return given


def _block(call: Call) -> int:
    """The block of MatMulNBits that lies within a group; 0 if it cannot hold the codes."""
    if call.group is None or call.codebook is not None or call.bits not in _WIDTHS:
        return 0
    zeros = call.zero_points
    has_float_zeros = zeros is not None and zeros.dtype is not torch.uint8
    if has_float_zeros and call.bits not in _WIDTHS_OF_FLOAT_ZEROS:
        return 0
    if call.scales.shape[1] == 1:
        block = _LEAST_BLOCK
        while block < min(call.in_features, _ROW_BLOCK):
            block *= 2
        return block
    block = min(call.group & -call.group, _LARGEST_BLOCK)
    return block if block >= _LEAST_BLOCK else 0


def _matmul_nbits(call: Call, rows: torch.Tensor, block: int) -> torch.Tensor:
    """The product in one node; the head of :mod:`quantization.formats.onnx` says what it takes."""
    assert call.group is not None
    out, columns, blocks = call.out_features, call.in_features, -(-call.in_features // block)
    size = block * call.bits // 8
    codes = F.pad(call.weights, (0, blocks * size - call.weights.shape[1]))
    if call.zero_points is None:  # two's complement; the node counts from the middle
        codes = codes ^ _every_code(1 << (call.bits - 1), call.bits)
    places = torch.arange(blocks, device=codes.device) * block // call.group
    scales = full_scales(call.scales, call.scale_steps).index_select(1, places)
    flat = rows.reshape(-1, columns)
    y: torch.Tensor = torch.onnx.ops.symbolic(
        "com.microsoft::MatMulNBits",
        (flat, codes.reshape(out, blocks, size), scales, *_zeros(call, places)),
        {
            "K": columns,
            "N": out,
            "bits": call.bits,
            "block_size": block,
            "accuracy_level": _EXACT_FLOATS,
        },
        dtype=torch.float32,
        shape=(flat.shape[0], out),
        version=1,
    )
    return y.reshape(call.result_shape)


def _zeros(call: Call, places: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The zero points of the blocks: packed as they are stored, else in float or whole bytes."""
    zeros = call.zero_points
    if zeros is None:
        return ()
    if zeros.dtype is torch.uint8:
        groups = call.scales.shape[1]
        if len(places) == groups:
            return (zeros,)
        zeros = unpack(zeros, call.bits, groups)
        if call.bits not in _WIDTHS_OF_FLOAT_ZEROS:
            return (zeros.index_select(1, places).to(torch.uint8),)
    elif zeros.dtype is torch.int8:
        zeros = from_fixed_point(zeros, call.bits)
    return (zeros.float().index_select(1, places),)


def _every_code(value: int, bits: int) -> int:
    """A byte whose codes all have that value.

    Example:
        >>> hex(_every_code(8, 4)), hex(_every_code(128, 8))
        ('0x88', '0x80')
    """
    return sum(value << start for start in range(0, 8, bits))


def register() -> None:
    """Put :func:`decompose` where torch's exporter looks for operators that it does not know."""
    for row in OPERATORS:
        if not row.is_backward:
            operator = getattr(torch.ops.quantization, row.name).default
            torch._decomp.decomposition_table[operator] = row.kernel(decompose)
