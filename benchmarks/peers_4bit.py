"""Who else maps float activations through 4-bit weights on a CPU: one small adapter each.

All of them, like ours, quantize the weight only; groups are of 128, or 64 for normal floats.
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.peers import (
    ALL,
    BLOCK,
    FLOAT32,
    NN_LINEAR,
    Map,
    Peer,
    Problem,
    onnxruntime_map,
    quanto_map,
)

BITSANDBYTES = "bitsandbytes nf4"
NF4_GROUP, NF4_ROWS = 64, 32  # weights that share a scale, rows that its kernel takes together
INT4_GROUPS = (128, 64, 32)  # that torch's kernel takes, the largest first
INT4_ROWS = 16


def _bitsandbytes(problem: Problem, threads: int) -> Map:
    """In eval mode: there it packs the codes anew for AVX-512 BF16 at the first call."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    out_features, in_features = problem.weight.shape
    options = {"compress_statistics": False, "quant_type": "nf4"}
    layer = Linear4bit(
        in_features, out_features, bias=False, compute_dtype=problem.torch_dtype, device="meta",
        **options,
    )  # fmt: skip
    weight = problem.weight.to(problem.torch_dtype, copy=True)
    layer.weight = Params4bit(weight, requires_grad=False, blocksize=NF4_GROUP, **options)
    return layer.to("cpu").eval()


def _bitsandbytes_note(problem: Problem) -> str:
    from bitsandbytes.functional import has_avx512bf16

    is_rounded = problem.dtype != "bfloat16" and has_avx512bf16()
    return "rounds its input to bfloat16" if is_rounded else ""


def _bitsandbytes_refuses(problem: Problem) -> str | None:
    out_features, in_features = problem.weight.shape
    if out_features % NF4_ROWS or in_features % NF4_GROUP:
        return f"takes multiples of {NF4_ROWS} rows and {NF4_GROUP} columns only"
    return None


def _int4_group(problem: Problem) -> int | None:
    out_features, in_features = problem.weight.shape
    if out_features % INT4_ROWS:
        return None
    return next((group for group in INT4_GROUPS if in_features % group == 0), None)


def _int4pack(problem: Problem, threads: int) -> Map:
    """Codes 0..15 around 8, and pairs (scale, offset) of the dtype for each group."""
    out_features, in_features = problem.weight.shape
    group = _int4_group(problem)
    grouped = problem.weight.view(out_features, in_features // group, group)
    scales = grouped.abs().amax(2).clamp_(min=1e-30) / 7
    codes = (grouped / scales[:, :, None]).round_().add_(8).to(torch.int32)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes.view(out_features, -1), 1)
    pairs = torch.stack([scales.T, torch.zeros_like(scales.T)], 2)
    pairs = pairs.to(problem.torch_dtype).contiguous()
    return lambda x: torch._weight_int4pack_mm_for_cpu(x, packed, group, pairs)


def _int4pack_refuses(problem: Problem) -> str | None:
    if _int4_group(problem) is None:
        return f"takes multiples of {INT4_ROWS} rows and of {INT4_GROUPS[-1]} columns only"
    return None


def _quanto_refuses(problem: Problem) -> str | None:
    in_features = problem.weight.shape[1]
    return None if in_features % BLOCK == 0 else f"{BLOCK}, its group, does not divide K"


FOUR_BIT_PEERS = (
    NN_LINEAR,
    Peer(
        BITSANDBYTES, "W4A16", "bitsandbytes", _bitsandbytes, ALL, _bitsandbytes_refuses,
        note=_bitsandbytes_note,
    ),
    Peer("torch int4pack", "W4A16", "torch", _int4pack, refuses=_int4pack_refuses),
    Peer(
        "onnxruntime 4-bit", "W4A16", "onnxruntime",
        partial(onnxruntime_map, accuracy_level=1, bits=4), FLOAT32, per_threads=True,
    ),
    Peer(
        "quanto qint4", "W4A16", "optimum-quanto", partial(quanto_map, weights="qint4"),
        refuses=_quanto_refuses,
    ),
)  # fmt: skip
