"""What the torch operators ask of their tensors, on whatever device; fake ones will do.

The C kernels check the same in csrc, in the files of the torch operators.
"""

from __future__ import annotations

import torch

from quantization.ops.operators import Call

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_call(call: Call) -> None:
    """Shapes, dtypes and devices of a quantized weight and of what meets it.

    Raises:
        RuntimeError: if something does not fit.
    """
    if call.group is None:
        _check_int8(call)
    else:
        _check_packed(call, call.group)
    _check_floats(call)
    torch._check(
        call.rows.layout is torch.strided,
        lambda: f"layout {call.rows.layout} will not do; only dense (strided) tensors will",
    )


def _check_int8(call: Call) -> None:
    rows, weights = call.rows, call.weights
    check_devices(rows, weights, call.scales, call.bias)
    torch._check(weights.dtype == torch.int8, lambda: f"weights must be int8, not {weights.dtype}")
    side = 0 if call.is_backward else 1  # of the weights, that the columns of rows run along
    torch._check(
        weights.dim() == 2 and rows.dim() >= 1 and rows.shape[-1] == weights.shape[side],
        lambda: f"input {tuple(rows.shape)} does not fit weights {tuple(weights.shape)}",
    )
    for vector in (call.scales, call.bias):
        torch._check(
            vector is None or (vector.dim() == 1 and vector.shape[0] == weights.shape[0]),
            lambda: f"scales and bias must have {weights.shape[0]} elements (out_features)",
        )


def _check_packed(call: Call, group: int) -> None:
    rows, weights, bits = call.rows, call.weights, call.bits
    torch._check(
        0 <= bits <= 8 and group >= 1,
        lambda: "bits must be 0 (base 3) or 1..8, and group at least 1",
    )
    torch._check(
        bits > 0 or (call.zero_points is None and call.codebook is None),
        lambda: "base-3 codes have neither zero points nor a codebook: bits must be 1..8",
    )
    torch._check(
        weights.dtype == torch.uint8 and weights.dim() == 2,
        lambda: "weights must be uint8 [out_features, bytes of a packed row]",
    )
    out, groups = call.out_features, -(-call.in_features // group)
    torch._check(
        tuple(weights.shape) == (out, packed_row_bytes(call.in_features, bits))
        and tuple(call.scales.shape) == (out, groups),
        lambda: (
            f"packed weights {tuple(weights.shape)} and scales {tuple(call.scales.shape)} do not "
            f"fit {call.in_features} input features of {bits} bits in groups of {group}"
        ),
    )
    _check_optional(call, groups)
    check_devices(rows, *call.tensors)
    torch._check(
        rows.dim() >= 1 and (not call.is_backward or rows.shape[-1] == out),
        lambda: f"grad {tuple(rows.shape)} must have {out} columns (out_features)",
    )


def _check_optional(call: Call, groups: int) -> None:
    """The tensors that not all packed weights have."""
    steps, zeros, codebook, bias = call.tensors[2:]
    out, levels = call.out_features, 2**call.bits
    if zeros is not None:
        is_packed, have = zeros.dtype == torch.uint8, tuple(zeros.shape)
        must = (out, packed_row_bytes(groups, call.bits) if is_packed else groups)
        torch._check(have == must, lambda: f"zero_points {have} must be {must}")
    if codebook is not None:
        of_all, of_rows, found = (1, levels), (out, levels), tuple(codebook.shape)
        torch._check(
            found in (of_all, of_rows), lambda: f"codebook {found} must be {of_all} or {of_rows}"
        )
    if steps is not None:
        torch._check(
            tuple(steps.shape) == (out,) and call.scales.dtype == torch.uint8,
            lambda: f"scale_steps must be [{out}], of uint8 scales",
        )
    if bias is not None:
        size = tuple(bias.shape)
        torch._check(
            size == (out,),
            lambda: f"bias must have {out} elements (out_features), not shape {size}",
        )


def _check_floats(call: Call) -> None:
    types = [call.dtype, call.rows.dtype]
    for tensor, may_be_codes in (
        (call.scales, call.group is not None),
        (call.zero_points, True),
        (call.codebook, False),
        (call.bias, False),
    ):
        if tensor is not None and not (may_be_codes and tensor.dtype == torch.uint8):
            types.append(tensor.dtype)
    wrong = [dtype for dtype in types if dtype not in _FLOATS]
    torch._check(
        not wrong, lambda: f"must be float32, bfloat16, float16 or float64, not {wrong[0]}"
    )


def packed_row_bytes(count: int, bits: int) -> int:
    """Bytes of a row of ``count`` codes; 0 bits: five ternary codes a byte.

    Example:
        >>> packed_row_bytes(10, 3), packed_row_bytes(10, 0)
        (4, 2)
    """
    return -(-count // 5) if bits == 0 else (count * bits + 7) // 8


def check_devices(rows: torch.Tensor, *tensors: torch.Tensor | None) -> None:
    """Raise RuntimeError unless all are on one device.

    One tensor that is elsewhere is enough to bring torch to the kernel of that device: one on meta
    to a result without numbers, which must then be what everybody expects.

    Example:
        >>> check_devices(torch.ones(2), torch.ones(2, device="meta"))
        Traceback (most recent call last):
        ...
        RuntimeError: some tensors are on the meta device, without numbers, and some are not: load \
or move them first
    """
    for tensor in tensors:
        if tensor is None or tensor.device == rows.device:
            continue
        torch._check(
            tensor.is_meta == rows.is_meta,
            lambda: (
                "some tensors are on the meta device, without numbers, and some are not: load "
                "or move them first"
            ),
        )
        raise RuntimeError(
            f"the input is on {rows.device}, but tensors of the layer are on {tensor.device}: "
            "move the layer or the input, so that both are on one device"
        )
