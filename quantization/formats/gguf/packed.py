"""From blocks of GGUF to packed weights and back, and what is lost on the way.

Scales and minima are float16 in a file: numbers that float16 does not hold are refused, or rounded
on request.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from quantization.formats.errors import FormatError
from quantization.formats.gguf.blocks import IQ4_LEVELS, Blocks, BlockType
from quantization.formats.gguf.types import WITH_MINIMA, has_float_zeros
from quantization.numerics.parameters import Mode
from quantization.numerics.weight_packing import pack_weights, unpack_weights
from quantization.schemes.codebooks import E2M1
from quantization.schemes.conversion import whole_levels
from quantization.schemes.packed_weights import PackedWeights
from quantization.schemes.scheme import Scheme
from quantization.schemes.stored_scales import restore, restore_zeros

__all__ = ["blocks_of", "packed_of"]

_AT_ONCE = 1 << 20  # weights whose temporaries are in memory together
_PER_ROW = ("packed_weights", "scales", "scale_steps", "zero_points")
_LEVELS = {"mxfp4": E2M1, "kmeans": IQ4_LEVELS}


# ---- from a file -------------------------------------------------------------------------------


def packed_of(
    data: np.ndarray, kind: BlockType, name: str, dtype: str = "float32"
) -> PackedWeights:
    """The packed weights of rows of blocks.

    Args:
        data: uint8 ``[rows, bytes of a row]``, a whole number of blocks each.
        kind: the type of the blocks.
        name: what error messages call them.
        dtype: of the weights. Another than float32 rounds zero points to it.

    Returns:
        Packed weights of torch tensors, of scheme ``kind.scheme``.

    Raises:
        FormatError: if a block stands for no numbers, or a zero point is beyond ``dtype``.

    Example:
        >>> from quantization.formats.gguf.blocks import TYPES
        >>> block = np.array([[0, 0x3C, *range(16)]], "uint8")  # a scale of 1, and 32 codes
        >>> packed_of(block, TYPES["Q4_0"], "w").dequantize()[0, :3]
        tensor([-8., -7., -6.])
    """
    scheme, rows = Scheme.parse(kind.scheme), len(data)
    cols = data.shape[1] // kind.nbytes * kind.length
    layout = "base3" if scheme.grid == "ternary" else "dense"
    forms = scheme.buffers((rows, cols)).items()
    parts = {part: np.empty(*form) for part, form in forms if part != "codebook"}
    for some in _chunks(rows, cols):
        blocks = _decoded(np.ascontiguousarray(data[some]).reshape(-1, kind.nbytes), kind, name)
        blocks, zeros = _with_zero_points(blocks)
        codes = blocks.codes.reshape(-1, cols)
        parts["packed_weights"][some] = pack_weights(codes, scheme.bits, layout=layout, dim=1)
        parts["scales"][some] = blocks.scales.reshape(len(codes), -1)
        if zeros is not None:
            parts["zero_points"][some] = zeros.reshape(len(codes), -1)
    tensors = {part: torch.from_numpy(numbers) for part, numbers in parts.items()}
    kept = getattr(torch, dtype)
    if "zero_points" in tensors:
        tensors["zero_points"] = _as_dtype(tensors["zero_points"], kept, name)
    if scheme.has_codebook:
        tensors["codebook"] = torch.tensor([_LEVELS[scheme.grid]], dtype=kept)
    return PackedWeights(scheme, (rows, cols), **tensors, dtype=dtype)


def _chunks(rows: int, cols: int) -> Iterator[slice]:
    """Some whole rows at a time; none of a matrix without weights."""
    step = max(_AT_ONCE // max(cols, 1), 1)
    for start in range(0, rows if cols else 0, step):
        yield slice(start, start + step)


def _decoded(blocks: np.ndarray, kind: BlockType, name: str) -> Blocks:
    try:
        return kind.decode(blocks)
    except FormatError as error:
        raise FormatError(f"{name} ({kind.name}): {error}") from None


def _with_zero_points(blocks: Blocks) -> tuple[Blocks, np.ndarray | None]:
    """Blocks, and zero points float32 ``[n, groups]`` for their minima.

    A group of the scale 0 is its minimum throughout: ``(0 - -1) * minimum``.
    """
    codes, scales, minima = blocks
    if minima is None:
        return blocks, None
    constant = (scales == 0) & (minima != 0)
    if constant.any():
        group = codes.shape[1] // scales.shape[1]
        codes = np.where(np.repeat(constant, group, axis=1), 0, codes).astype("uint8")
        scales = np.where(constant, minima.astype(scales.dtype), scales)
    return Blocks(codes, scales, minima), zero_points_for(scales, minima)


def zero_points_for(scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """``-minimum / scale``, rounded once to float32; 0 where the scale is 0.

    Example:
        >>> zero_points_for(np.array([0.5, 0.0]), np.array([-4.0, 0.0])).tolist()
        [8.0, 0.0]
    """
    steps = scales.astype("float64")
    with np.errstate(divide="ignore", invalid="ignore"):
        zeros = -minima.astype("float64") / steps
    return np.where(steps == 0, 0, zeros).astype("float32")


def _as_dtype(zeros: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    cast = zeros.to(dtype)
    if dtype is torch.float16 and (cast.isinf() & ~zeros.isinf()).any():
        raise FormatError(
            f"{name} has a zero point of {float(zeros.abs().nan_to_num().max()):g}, beyond the "
            "largest number of float16: read it as float32"
        )
    return cast


# ---- into a file -------------------------------------------------------------------------------


def blocks_of(
    packed: PackedWeights, kind: BlockType, name: str, allow_rounding: bool = False
) -> tuple[np.ndarray, float]:
    """The blocks of packed weights, uint8 ``[rows, bytes of a row]``, and what they lose.

    Args:
        packed: of torch tensors.
        kind: as :func:`quantization.formats.gguf.types.type_for` chose it.
        name: what error messages call the weights.
        allow_rounding: whether scales and minima that float16 does not hold are rounded.

    Returns:
        The bytes, and how far a weight may have moved; 0.0 where :func:`packed_of` gives back
        exactly these weights.

    Raises:
        FormatError: if a number has to be rounded, or is beyond what the type holds.

    Example:
        >>> from quantization import pack_matrix
        >>> from quantization.formats.gguf.blocks import TYPES
        >>> packed = pack_matrix(torch.randn(2, 64), "w8g32+f16")
        >>> blocks, moved = blocks_of(packed, TYPES["Q8_0"], "w")
        >>> blocks.shape, moved
        ((2, 68), 0.0)
        >>> bool((packed_of(blocks, TYPES["Q8_0"], "w").dequantize() == packed.dequantize()).all())
        True
    """
    rows, cols = packed.shape
    blocks, moved = np.empty((rows, cols // kind.length * kind.nbytes), "uint8"), 0.0
    for some in _chunks(rows, cols):
        parts, moves = _parts(_rows_of(packed, some), kind, name, some.start, allow_rounding)
        blocks[some] = _encoded(parts, kind, name).reshape(blocks[some].shape)
        moved = max(moved, moves)
    return blocks, moved


def _parts(
    packed: PackedWeights, kind: BlockType, name: str, first: int, allow_rounding: bool
) -> tuple[Blocks, float]:
    """The parts of the blocks of some rows, the first of that number, and how far they move."""
    cols = packed.shape[1]
    place = np.arange(0, cols, kind.length) // packed.scheme.group(cols)
    if kind.name == "MXFP4":
        scales, minima, moved = _exponents(packed, name)[:, place], None, 0.0
    else:
        told = _ErrorWords(name, packed.scheme, kind, first, allow_rounding)
        scales, minima, moved = _halves(packed, place, kind, told)
    codes = _codes(packed, kind, name).reshape(-1, kind.length)
    minima = None if minima is None else minima.reshape(-1, 1)
    return Blocks(codes, scales.reshape(-1, 1), minima), moved


def _encoded(parts: Blocks, kind: BlockType, name: str) -> np.ndarray:
    try:
        return kind.encode(parts)  # type: ignore[misc]
    except FormatError as error:
        raise FormatError(f"{name}: {error}") from None


def _rows_of(packed: PackedWeights, some: slice) -> PackedWeights:
    """Some rows of packed weights, on the CPU."""
    given = {part: getattr(packed, part) for part in (*_PER_ROW, "codebook")}
    parts: dict[str, Any] = {
        part: tensor if tensor is None else (tensor[some] if part in _PER_ROW else tensor).cpu()
        for part, tensor in given.items()
    }
    shape = (len(parts["packed_weights"]), packed.shape[1])
    return dataclasses.replace(packed, shape=shape, **parts)


def _codes(packed: PackedWeights, kind: BlockType, name: str) -> np.ndarray:
    """Codes as the blocks have them: uint8, or int8 levels."""
    scheme = packed.scheme
    is_bare = kind.name in ("MXFP4", *WITH_MINIMA)
    if is_bare or (scheme.mode is Mode.Symmetric and scheme.grid != "binary"):
        layout = "base3" if scheme.grid == "ternary" else "dense"
        return unpack_weights(
            packed.packed_weights,
            scheme.bits,
            dtype="uint8" if is_bare else "int8",
            layout=layout,
            dim=1,
            size=packed.shape[1],
        ).numpy()
    levels: Any = whole_levels(packed)
    low, high = int(levels.min()), int(levels.max())
    if low < kind.codes[0] or high > kind.codes[1]:
        raise FormatError(
            f"{name} (scheme {scheme}) has codes of {low}..{high} after zero points; "
            f"{kind.name} of GGUF holds {kind.codes[0]}..{kind.codes[1]}"
        )
    return levels.to(torch.int8).numpy()


def _exponents(packed: PackedWeights, name: str) -> np.ndarray:
    if packed.codebook.float().tolist() != [list(E2M1)]:
        raise FormatError(f"{name} has other levels than the grid mxfp4")
    return packed.scales.numpy()


def _halves(
    packed: PackedWeights, place: np.ndarray, kind: BlockType, told: _ErrorWords
) -> tuple[np.ndarray, np.ndarray | None, float]:
    """Scales and minima of the blocks as float16, and how far they move a weight."""
    exact = restore(packed.scales, packed.scale_steps)[:, place]
    scales, is_same = _as_half(exact)
    told.check("scale", exact, scales, is_same)
    moves, minima = np.zeros(1), None
    if not is_same.all():
        moves = np.abs(scales.astype("float64") - exact) * max(map(abs, kind.codes))
    if kind.name in WITH_MINIMA:
        zeros = _zero_points(packed).double().numpy()[:, place]
        low = -zeros * exact
        minima, is_held = _as_half(low)
        if has_float_zeros(packed.scheme):
            is_held = (zero_points_for(scales, minima) == zeros) | np.isnan(zeros)
        is_held |= (exact == 0) | np.isnan(exact)
        told.check("minimum", low, minima, is_held)
        if not (is_held & is_same).all():
            moves = moves + np.abs(minima - low)
    return scales, minima, float(np.nan_to_num(moves).max(initial=0.0))


def _as_half(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wider floats as float16, and where that is the same number, or NaN."""
    with np.errstate(over="ignore"):
        halves = numbers.astype("float16")
    return halves, (halves == numbers) | np.isnan(numbers)


def _zero_points(packed: PackedWeights) -> torch.Tensor:
    if has_float_zeros(packed.scheme):
        return torch.from_numpy(restore_zeros(packed.zero_points, packed.scheme.bits))
    groups = packed.scheme.groups(packed.shape[1])
    return unpack_weights(
        packed.zero_points, packed.scheme.bits, layout="dense", dim=1, size=groups
    )


class _ErrorWords(NamedTuple):
    """What an error says of numbers that float16 does not hold."""

    name: str
    scheme: Scheme
    kind: BlockType
    first: int  # row
    allow_rounding: bool

    def check(self, what: str, exact: np.ndarray, halves: np.ndarray, is_same: np.ndarray) -> None:
        """Raise unless numbers are the same as float16, or may be rounded, not to infinity."""
        bad = np.isinf(halves) & np.isfinite(exact)
        if not self.allow_rounding:
            bad |= ~is_same
        if not bad.any():
            return
        row, block = np.argwhere(bad)[0]
        remedy = "allow_rounding=True rounds it"
        if np.isinf(halves[row, block]):
            remedy = "it is beyond the largest one, 65504"
        elif what == "scale" and self.scheme.scale_dtype != "float16":
            remedy += ", or quantize with scales of float16 (+f16 in the name of the scheme)"
        elif what == "minimum":
            remedy += ", or quantize with whole zero points (w4g32a+f16), which Q5_0 holds"
        raise FormatError(
            f"{self.name} (scheme {self.scheme}): the {what} {exact[row, block]:g} of block "
            f"{block} in row {self.first + row} is no number of float16, in which "
            f"{self.kind.name} keeps it: {remedy}"
        )
