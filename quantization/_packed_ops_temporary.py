"""TEMPORARY: stands in for ``_torch_ops.packed_linear`` until the kernels have it; then delete."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from quantization.packed_rows import decode_rows


@torch.fx.wrap
def packed_linear(
    x, weights, scales, scale_steps, zero_points, codebook, bias, bits, group, out_dtype=None
):
    """``x @ decoded.T + bias``: decodes in torch and calls F.linear."""
    if not x.is_floating_point():
        raise RuntimeError(f"x has dtype {x.dtype}")
    out = out_dtype
    if out is None:
        out = x.dtype
        if torch.is_autocast_enabled("cpu") and out != torch.float64:
            out = torch.get_autocast_dtype("cpu")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    per_byte = 8 / bits if bits else 5
    if not weights.shape[1] - 1 < x.size(-1) / per_byte <= weights.shape[1]:
        raise RuntimeError(f"input {x.size(-1)} does not fit weights {tuple(weights.shape)}")
    with torch.autocast("cpu", enabled=False):
        decoded = decode_rows(
            weights, scales, scale_steps, zero_points, codebook, bits, group, x.size(-1)
        )
        offsets = None if bias is None else bias.to(wide)
        return F.linear(x.to(wide), decoded.to(wide), offsets).to(out)
