"""Packed rows back to floats, in torch operators alone.

What :mod:`quantization.schemes.packed_weights` says in its head, for a few rows at a time and for
graphs: an embedding takes the rows of its tokens through here, compiled or not.
"""

from __future__ import annotations

import torch

#: ``bits`` of ternary codes, five of which share a byte.
TERNARY = 0
_CODES_A_BYTE = 5


@torch.fx.wrap
def decode_rows(
    weights: torch.Tensor,
    scales: torch.Tensor,
    scale_steps: torch.Tensor | None,
    zero_points: torch.Tensor | None,
    codebook: torch.Tensor | None,
    bits: int,
    group: int,
    in_features: int,
) -> torch.Tensor:
    """The float32 numbers of packed rows.

    Args:
        weights: packed codes, uint8 ``[rows, row bytes]``.
        scales: floats ``[rows, groups]``, or uint8: codes if there are ``scale_steps``, else
            exponents.
        scale_steps: floats ``[rows]``, or None.
        zero_points: floats ``[rows, groups]``, packed uint8 ``[rows, bytes]``, int8 in fixed
            point ``[rows, groups]``, or None.
        codebook: levels ``[1, 2**bits]`` or ``[rows, 2**bits]``, or None.
        bits: width of a code, 1..8; 0 for ternary ones.
        group: numbers of a row that share a scale.
        in_features: numbers in a row.

    Returns:
        ``[rows, in_features]``.

    Example:
        >>> codes = torch.tensor([[0x21, 0x0F]], dtype=torch.uint8)
        >>> decode_rows(codes, torch.tensor([[0.5, 10.0]]), None, None, None, 4, 2, 3)
        tensor([[  0.5000,   1.0000, -10.0000]])
    """
    codes = unpack(weights, bits, in_features)
    place = torch.arange(in_features, device=weights.device) // group
    if codebook is not None:
        values = _levels(codebook.float(), codes)
    elif bits == TERNARY:
        values = torch.where(codes == 2, -1, codes).float()
    elif zero_points is None:
        half = 1 << (bits - 1)
        values = ((codes ^ half) - half).float()
    else:
        values = codes.float()
    if zero_points is not None:
        if zero_points.dtype is torch.uint8:
            zero_points = unpack(zero_points, bits, scales.shape[1])
        elif zero_points.dtype is torch.int8:
            zero_points = from_fixed_point(zero_points, bits)
        values = values - zero_points.float().index_select(1, place)
    return values * full_scales(scales, scale_steps).index_select(1, place)


@torch.fx.wrap
def round_once(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers as that type; one beyond its largest becomes that one, not infinity, NaN stays.

    Args:
        numbers: floats of float32, or of the type itself.
        dtype: of the result.

    Example:
        >>> round_once(torch.tensor([1.0, -7e4, torch.nan]), torch.float16).tolist()
        [1.0, -65504.0, nan]
    """
    largest = min(torch.finfo(dtype).max, torch.finfo(numbers.dtype).max)
    return numbers.clamp(-largest, largest).to(dtype)


def from_fixed_point(zero_points: torch.Tensor, bits: int) -> torch.Tensor:
    """Zero points of int8 as float32.

    Example:
        >>> from_fixed_point(torch.tensor([0, 8], dtype=torch.int8), 4)
        tensor([8.0000, 8.5000])
    """
    return (zero_points.float() + 128) * 2.0 ** (bits - 8)


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Codes, int32 ``[rows, count]``, of dense or base-3 bytes.

    Example:
        >>> unpack(torch.tensor([[0x21]], dtype=torch.uint8), 4, 2)
        tensor([[1, 2]], dtype=torch.int32)
    """
    place = torch.arange(count, device=packed.device)
    if bits == TERNARY:
        powers = (3 ** (place % _CODES_A_BYTE)).int()
        return packed.index_select(1, place // _CODES_A_BYTE).int() // powers % 3
    start = place * bits
    byte, shift = start >> 3, (start & 7).int()
    pair = packed.index_select(1, byte).int()
    if 8 % bits:  # a code may straddle two bytes; the last one of a row does not
        after = (byte + 1).clamp_max(packed.shape[1] - 1)
        pair = pair | packed.index_select(1, after).int() << 8
    return torch.bitwise_right_shift(pair, shift) & ((1 << bits) - 1)  # ONNX has no __rshift__


def _levels(codebook: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    if codebook.shape[0] == 1:
        return codebook.reshape(-1).index_select(0, codes.reshape(-1)).reshape(codes.shape)
    return codebook.gather(1, codes.long())


def full_scales(scales: torch.Tensor, scale_steps: torch.Tensor | None) -> torch.Tensor:
    """Scales as float32, out of floats, codes or exponents.

    Example:
        >>> full_scales(torch.tensor([[127, 128]], dtype=torch.uint8), None)
        tensor([[1., 2.]])
    """
    if scale_steps is not None:
        return scales.float() * scale_steps.float().unsqueeze(1)
    if scales.dtype is not torch.uint8:
        return scales.float()
    exponents = scales.int()
    bits = torch.where(exponents == 0, 0x400000, exponents << 23)  # 2**-127 is no normal number
    return torch.where(exponents == 255, 0x7FC00000, bits).view(torch.float32)
