"""What other packages make of a weight: their own code, called for one matrix at a time.

An adapter takes a float32 weight [out, in], what the cell asks for, and E[x^2] of the columns or
None; it gives the numbers that the codes stand for, and the bytes that codes and side data take.
Side data are rounded to float16 and counted so.
"""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Callable
from functools import cache
from importlib import util
from pathlib import Path

import torch
from torch import Tensor

Peer = Callable[[Tensor, str, Tensor | None], tuple[Tensor, int]]


class AbsentError(Exception):
    """A peer or a method is not there; the message says why."""


def hqq(weight: Tensor, recipe: str, moments: Tensor | None) -> tuple[Tensor, int]:
    """Half-quadratic quantization: scale and float zero a group, no data."""
    quantizer = _need("hqq.core.quantize").Quantizer
    bits, group = _bits_and_group(recipe)
    codes, meta = quantizer.quantize(
        weight, nbits=bits, group_size=group, axis=1, bitpack=False, device="cpu",
        round_zero=bits == 4, compute_dtype=torch.float32,  # its own defaults
    )  # fmt: skip
    meta |= {name: meta[name].half().float() for name in ("scale", "zero")}
    return quantizer.dequantize(codes, meta), _nbytes(weight, bits, group, 32)


def sinq(weight: Tensor, recipe: str, moments: Tensor | None) -> tuple[Tensor, int]:
    """Rows and columns normalised in turn, scale and zero a group, a factor a column; no data."""
    quantize = _need("sinq.dual_shift").tiled_quant_rectangle
    bits, group = _bits_and_group(recipe)
    codes, scales, columns, zeros = quantize(weight, [0, 2**bits - 1], group, method="sinq")
    scales, columns, zeros = (each.half().float() for each in (scales, columns, zeros))
    values = ((codes - zeros) * scales).reshape(weight.shape) * columns
    return values, _nbytes(weight, bits, group, 32) + 2 * weight.shape[1]


def opt_rtn(weight: Tensor, recipe: str, moments: Tensor | None) -> tuple[Tensor, int]:
    """auto-round without its tuning: signed scales searched under E[x^2], no zero point."""
    quantize = _need("auto_round.data_type.int").quant_tensor_opt_rtn_sym
    bits, group = _bits_and_group(recipe)
    values, scales, _ = quantize(weight, bits=bits, group_size=group, imatrix=moments)
    scales = scales.reshape(-1, 1)
    codes = (values.reshape(-1, group) / scales).round()
    return (codes * scales.half().float()).reshape(weight.shape), _nbytes(weight, bits, group, 16)


def neuqi(weight: Tensor, recipe: str, moments: Tensor | None) -> tuple[Tensor, int]:
    """NeUQI as auto-round has it: scale and integer zero point searched together."""
    search = _need("auto_round.data_type.neuqi").neuqi_search_scale_zero
    bits, group = _bits_and_group(recipe)
    rows = weight.reshape(-1, group)
    importance = None if moments is None else moments.expand_as(weight).reshape(-1, group)
    scales, zeros = search(rows, bits, qw=importance)
    scales = scales.half().float()
    codes = ((rows / scales).round() + zeros).clamp(0, 2**bits - 1)
    return ((codes - zeros) * scales).reshape(weight.shape), _nbytes(weight, bits, group, 16 + bits)


# ---- llama.cpp -------------------------------------------------------------------------------

#: By llama.cpp's name: its number, weights of a block, and bytes of one.
GGML = {
    "q4_0": (2, 32, 18),
    "q4_1": (3, 32, 20),
    "q2_K": (10, 256, 84),
    "q3_K": (11, 256, 110),
    "q4_K": (12, 256, 144),
    "iq4_nl": (20, 32, 18),
}


def llama_cpp(weight: Tensor, recipe: str, moments: Tensor | None) -> tuple[Tensor, int]:
    """llama.cpp's quantizers with an importance matrix.

    Rows that its blocks of 256 do not divide are padded with zeros, which are not counted: it could
    not store such layers in these types itself.
    """
    library = _ggml()
    number, block, size = GGML[recipe]
    rows, cols = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -cols % block)).contiguous()
    importance = torch.ones(padded.shape[1])
    if moments is not None:
        importance[:cols] = moments
    codes = torch.zeros(padded.numel() // block * size, dtype=torch.uint8)
    pointers = [ctypes.c_void_p(each.data_ptr()) for each in (padded, codes, importance)]
    shape = (ctypes.c_int64(0), ctypes.c_int64(rows), ctypes.c_int64(padded.shape[1]))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    written = library.ggml_quantize_chunk(number, *pointers[:2], *shape, pointers[2])
    if written != codes.numel():
        raise AbsentError(f"llama.cpp wrote {written} bytes of {recipe}, {codes.numel()} expected")
    values = torch.zeros_like(padded)
    decode = getattr(library, f"dequantize_row_{recipe}")
    decode(pointers[1], ctypes.c_void_p(values.data_ptr()), ctypes.c_int64(values.numel()))
    return values[:, :cols], rows * cols * size // block


@cache
def _ggml() -> ctypes.CDLL:
    spec = util.find_spec("xllamacpp")
    if spec is None or not spec.origin:
        raise AbsentError("xllamacpp is not installed")
    for file in sorted(Path(spec.origin).parent.glob("*.so")):
        library = ctypes.CDLL(str(file))
        if hasattr(library, "ggml_quantize_chunk"):
            return library
    raise AbsentError("this xllamacpp does not export ggml_quantize_chunk")


# ---- what they share -------------------------------------------------------------------------

PEERS: dict[str, Peer] = {
    "hqq": hqq,
    "sinq": sinq,
    "opt-rtn": opt_rtn,
    "neuqi": neuqi,
    "llama.cpp": llama_cpp,
}


@cache
def _need(module: str):
    """A module of a peer; what it prints while it is imported is its own."""
    try:
        return __import__(module, fromlist=["_"])
    except Exception as error:  # packages fail in many ways where others are missing
        kind = type(error).__name__
        raise AbsentError(f"{module} cannot be imported: {kind}: {error}") from error


def _bits_and_group(recipe: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d)g(\d+)", recipe)
    assert found is not None, recipe
    return int(found[1]), int(found[2])


def _nbytes(weight: Tensor, bits: int, group: int, side: int) -> int:
    """Bytes of codes and `side` bits a group."""
    return math.ceil(weight.numel() * (bits + side / group) / 8)
