"""What the torch operators ask of their tensors, on whatever device; fake ones will do.

The C kernels check the same in csrc/torch/torch_ops.c and csrc/torch/torch_packed.c.
"""

from __future__ import annotations

import torch

#: Bits of ``present``: which tensors of a packed operator are there. In the place of one that is
#: not, scales are given.
HAS_STEPS, HAS_ZEROS, HAS_CODEBOOK, HAS_BIAS = 1, 2, 4, 8


def check_linear(
    rows: torch.Tensor,
    weights: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    side: int,
) -> None:
    """Shapes, dtypes and devices of int8 weights and of what meets them.

    Args:
        rows: activations or their gradient, ``[..., columns]``.
        weights: codes, ``[out_features, in_features]``.
        scales: one a row.
        bias: offsets, or None.
        side: the dimension of ``weights`` that the columns of ``rows`` run along.

    Raises:
        RuntimeError: if something does not fit.
    """
    check_devices(rows, weights, scales, bias)
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


def packed_row_bytes(count: int, bits: int) -> int:
    """Bytes of a row of ``count`` codes; 0 bits: five ternary codes a byte.

    Example:
        >>> packed_row_bytes(10, 3), packed_row_bytes(10, 0)
        (4, 2)
    """
    return -(-count // 5) if bits == 0 else (count * bits + 7) // 8


def check_packed(
    rows: torch.Tensor,
    tensors: tuple[torch.Tensor, ...],
    bias: torch.Tensor | None,
    in_features: int,
    bits: int,
    group: int,
    present: int,
) -> None:
    """Shapes, dtypes and devices of packed weights and of what meets them.

    Args:
        rows: activations or their gradient.
        tensors: codes, scales, steps, zero points and codebook, as the operators take them.
        bias: offsets, if `present` says so.
        in_features: numbers in a row of the weight.
        bits: of a code; 0: ternary ones, five to a byte.
        group: codes of a row that share a scale.
        present: which of ``tensors`` are there.

    Raises:
        RuntimeError: if something does not fit.
    """
    weights, scales, steps, zeros, codebook = tensors
    torch._check(
        0 <= bits <= 8 and group >= 1,
        lambda: "bits must be 0 (base 3) or 1..8, and group at least 1",
    )
    torch._check(
        bits > 0 or not present & (HAS_ZEROS | HAS_CODEBOOK),
        lambda: "base-3 codes have neither zero points nor a codebook: bits must be 1..8",
    )
    out, groups = weights.shape[0], -(-in_features // group)
    torch._check(
        weights.dtype == torch.uint8
        and tuple(weights.shape) == (out, packed_row_bytes(in_features, bits))
        and tuple(scales.shape) == (out, groups),
        lambda: (
            f"packed weights {tuple(weights.shape)} and scales {tuple(scales.shape)} do not "
            f"fit {in_features} input features of {bits} bits in groups of {group}"
        ),
    )
    columns = packed_row_bytes(groups, bits) if zeros.dtype == torch.uint8 else groups
    torch._check(
        not present & HAS_ZEROS or tuple(zeros.shape) == (out, columns),
        lambda: f"zero_points {tuple(zeros.shape)} must be {(out, columns)}",
    )
    torch._check(
        not present & HAS_CODEBOOK or tuple(codebook.shape) in ((1, 2**bits), (out, 2**bits)),
        lambda: f"codebook {tuple(codebook.shape)} must be {(1, 2**bits)} or {(out, 2**bits)}",
    )
    torch._check(
        not present & HAS_STEPS or (tuple(steps.shape) == (out,) and scales.dtype == torch.uint8),
        lambda: f"scale_steps must be [{out}], of uint8 scales",
    )
    torch._check(
        not present & HAS_BIAS or tuple(bias.shape) == (out,),
        lambda: f"bias must have {out} elements (out_features), not shape {tuple(bias.shape)}",
    )
    check_devices(rows, *tensors, bias)


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
