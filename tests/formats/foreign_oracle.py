"""GPTQ, AWQ and MatMulNBits in NumPy, code by code, as their own programs pack and unpack them.

GPTQ: what AutoGPTQ's ``QuantLinear.pack`` makes (``auto_gptq/nn_modules/qlinear/qlinear_cuda.py``).
AWQ: ``order_map`` of AutoAWQ's ``WQLinear_GEMM.from_linear`` (``awq/modules/linear/gemm.py``).
Planes: the table of GPTQModel's ``gptqmodel/utils/planar_packing.py``; streams of 5, 6 and 7 bits:
that of auto-round's ``auto_round/utils/bit_packing.py``.
MatMulNBits: ``docs/ContribOperators.md`` of ONNX Runtime.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def gptq_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes packed along the last dimension, whose length is a multiple of 32."""
    codes = codes.astype(np.uint64)
    *lead, length = codes.shape
    words = np.zeros((*lead, length * bits // 32), np.uint64)
    if bits != 3:
        each = 32 // bits
        for k in range(length):
            words[..., k // each] |= codes[..., k] << np.uint64(bits * (k % each))
    else:
        for block in range(length // 32):
            of, to = codes[..., block * 32 :], words[..., block * 3 :]
            for j in range(10):
                to[..., 0] |= of[..., j] << np.uint64(3 * j)
                to[..., 1] |= of[..., 11 + j] << np.uint64(3 * j + 1)
                to[..., 2] |= of[..., 22 + j] << np.uint64(3 * j + 2)
            to[..., 0] |= (of[..., 10] & np.uint64(3)) << np.uint64(30)
            to[..., 1] |= of[..., 10] >> np.uint64(2)
            to[..., 1] |= (of[..., 21] & np.uint64(1)) << np.uint64(31)
            to[..., 2] |= of[..., 21] >> np.uint64(1)
    return words.astype(np.uint32).view(np.int32)


def stream_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes along the last dimension as one stream of bits, the first in the lowest; any width."""
    *lead, length = codes.shape
    words = np.zeros((*lead, length * bits // 32), np.uint32)
    for place in np.ndindex(*lead):
        stream = sum(int(code) << bits * k for k, code in enumerate(codes[place]))
        for i in range(words.shape[-1]):
            words[(*place, i)] = stream >> 32 * i & 0xFFFFFFFF
    return words.view(np.int32)


def planar_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Of each 32 codes the lowest 4 (3 bits: 2) bits of all, then the next 2, then the last 1."""
    planes = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}.get(bits, (bits,))
    *lead, length = codes.shape
    blocks = codes.reshape(*lead, length // 32, 32)
    made, low = [], 0
    for width in planes:
        made.append(stream_words(blocks >> low & (1 << width) - 1, width))
        low += width
    return np.concatenate(made, -1).reshape(*lead, -1)


def gptq_tensors(
    codes: np.ndarray,
    zeros: np.ndarray,
    scales: np.ndarray,
    places: np.ndarray,
    bits: int,
    version: int,
    pack: Callable[[np.ndarray, int], np.ndarray] = gptq_words,
) -> dict[str, torch.Tensor]:
    """Of codes [in, out], zero points and scales [groups, out], and the group of each column."""
    stored = zeros - 1 if version == 1 else zeros
    return {
        "qweight": torch.from_numpy(np.ascontiguousarray(pack(codes.T, bits).T)),
        "qzeros": torch.from_numpy(pack(stored, bits)),
        "scales": torch.from_numpy(scales),
        "g_idx": torch.from_numpy(places.astype(np.int32)),
    }


def awq_words(codes: np.ndarray) -> np.ndarray:
    """Codes [any, out] of 4 bits, eight rows in one int32."""
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for word in range(words.shape[1]):
        for place, row in enumerate(AWQ_ORDER):
            words[:, word] |= codes[:, word * 8 + row].astype(np.uint32) << np.uint32(4 * place)
    return words.view(np.int32)


def wide_awq_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [any, out] of any width, in AWQ's order, as one stream of bits."""
    order = [8 * (row // 8) + AWQ_ORDER[row % 8] for row in range(codes.shape[1])]
    return stream_words(codes[:, order], bits)


def awq_tensors(
    codes: np.ndarray,
    zeros: np.ndarray,
    scales: np.ndarray,
    pack: Callable[[np.ndarray], np.ndarray] = awq_words,
) -> dict[str, torch.Tensor]:
    """Of codes [in, out], zero points and scales [groups, out]."""
    return {
        "qweight": torch.from_numpy(pack(codes)),
        "qzeros": torch.from_numpy(pack(zeros)),
        "scales": torch.from_numpy(scales),
    }


def numbers(
    codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, places: np.ndarray
) -> np.ndarray:
    """The weight [out, in] in float64."""
    wide = scales.astype(np.float64)[places] * (codes.astype(np.float64) - zeros[places])
    return wide.T


def write_folder(
    folder: Path,
    layers: dict[str, dict[str, torch.Tensor]],
    settings: dict[str, Any] | None,
    *,
    config: dict[str, Any] | None = None,
    sidecar: str | None = None,
    **tensors: torch.Tensor,
) -> Path:
    """A model folder: tensors of layers, further ones, and settings in config.json or a sidecar."""
    folder.mkdir(parents=True, exist_ok=True)
    flat = {
        f"{name}.{part}": value for name, made in layers.items() for part, value in made.items()
    }
    save_file(flat | tensors, folder / "model.safetensors")
    if sidecar is not None:
        (folder / sidecar).write_text(json.dumps(settings))
    elif settings is not None:
        config = {**(config or {}), "quantization_config": settings}
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def matmul_nbits_numbers(node: Any) -> np.ndarray:
    """What the operator's constants stand for, [N, K] in float64, code by code."""
    blocks = -(-node.K // node.block_size)
    codes = np.zeros((node.N, blocks * node.block_size))
    zeros = np.full((node.N, blocks), float(1 << node.bits - 1))
    mask, each = (1 << node.bits) - 1, 8 // node.bits
    data = node.B.reshape(node.N, -1)
    for k in range(codes.shape[1]):
        codes[:, k] = data[:, k // each] >> node.bits * (k % each) & mask
    if node.zero_points is not None and node.zero_points.dtype == np.uint8:
        for block in range(blocks):
            zeros[:, block] = (
                node.zero_points[:, block // each] >> node.bits * (block % each) & mask
            )
    elif node.zero_points is not None:
        zeros = node.zero_points.astype(np.float64)
    place = np.arange(node.K) // node.block_size
    return (codes[:, : node.K] - zeros[:, place]) * node.scales.astype(np.float64)[:, place]
