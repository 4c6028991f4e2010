"""Blocks of GGUF: the bytes of a row, cut into codes, scales and minima, and put together again.

A block holds 32 or 256 weights of a row, ``w = code * scale + minimum``. What a scheme of this
package calls such weights:

=========  ======  =====  ================  ==================================================
type       block   bits   scheme            as read from a file
=========  ======  =====  ================  ==================================================
``Q8_0``   32      8.5    w8g32+f16         exact, also written
``Q5_0``   32      5.5    w5g32+f16         exact, also written
``Q4_0``   32      4.5    w4g32+f16         exact, also written
``Q5_1``   32      6      w5g32af+f16       codes and scales exact, minima rounded; also written
``Q4_1``   32      5      w4g32af+f16       codes and scales exact, minima rounded; also written
``TQ1_0``  256     1.69   ternaryg256+f16   exact, also written
``TQ2_0``  256     2.06   ternaryg256+f16   exact, also written
``MXFP4``  32      4.25   mxfp4             exact, also written
``Q2_K``   256     2.63   w2g16af+f32       codes and scales exact, minima rounded
``Q3_K``   256     3.44   w3g16+f32         exact
``Q4_K``   256     4.5    w4g32af+f32       codes and scales exact, minima rounded
``Q5_K``   256     5.5    w5g32af+f32       codes and scales exact, minima rounded
``Q6_K``   256     6.56   w6g16+f32         exact
``Q8_K``   256     9.13   w8g256+f32        exact
``IQ4_NL`` 32      4.5    kmeans4g32+f16    exact
``IQ4_XS`` 256     4.25   kmeans4g32+f32    exact
=========  ======  =====  ================  ==================================================

A minimum becomes the zero point ``z = -minimum / scale``, and ``(code - z) * scale`` is computed:
three roundings to float32 instead of one. A weight w then differs from that of the file by at most
``2**-23 * (|minimum| + 2 |w|)``, and the minimum comes back exactly where a file is written again.

Source: ggml's block structures, by way of the package gguf, whose dequantizer the tests compare.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from quantization.formats.errors import FormatError

__all__ = ["IQ4_LEVELS", "TYPES", "BlockType", "Blocks"]

#: The levels of IQ4_NL and IQ4_XS, in units of a scale.
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

_NAN_EXPONENT = 255
_PAIRS = np.array([0, 2, 4, 6], "uint8")[:, None]
_BITS = np.arange(8, dtype="uint8")[:, None]
_TRITS = 3 ** np.arange(5, dtype="uint8")  # 1, 3, 9, 27, 81


class Blocks(NamedTuple):
    """The parts of n blocks.

    Attributes:
        codes: ``[n, weights of a block]``; int8 where they are signed, else uint8.
        scales: ``[n, groups of a block]``: float16, float32, or uint8 exponents.
        minima: float32 ``[n, groups of a block]``, or None.
    """

    codes: np.ndarray
    scales: np.ndarray
    minima: np.ndarray | None = None


@dataclass(frozen=True)
class BlockType:
    """One type of block.

    Attributes:
        name: ggml's.
        length: weights of a block.
        nbytes: bytes of a block.
        scheme: the short name of the scheme that holds such weights.
        decode: from uint8 ``[n, nbytes]`` to :class:`Blocks`.
        encode: the reverse, or None where such blocks are only read. It takes one scale a block,
            float16 (uint8: exponents), and one float16 minimum where there are minima.
        codes: the smallest and the largest code.
    """

    name: str
    length: int
    nbytes: int
    scheme: str
    decode: Callable[[np.ndarray], Blocks]
    encode: Callable[[Blocks], np.ndarray] | None = None
    codes: tuple[int, int] = (0, 0)


# ---- blocks of 32 weights with one scale -------------------------------------------------------


def _half(field: np.ndarray) -> np.ndarray:
    return field.view("<f2").astype("float16", copy=False)


def _bytes(numbers: np.ndarray) -> np.ndarray:
    """float16 ``[n, 1]`` as bytes ``[n, 2]``."""
    return np.ascontiguousarray(numbers.astype("<f2", copy=False)).view("uint8")


def _from_nibbles(field: np.ndarray) -> np.ndarray:
    """The low four bits of each byte, then the high ones."""
    return np.concatenate([field & 15, field >> 4], axis=1)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    half = codes.shape[1] // 2
    return (codes[:, :half] & 15) | codes[:, half:] << 4


def _unsigned(codes: np.ndarray, offset: int) -> np.ndarray:
    return (codes + np.int8(offset)).view("uint8")


def _signed(codes: np.ndarray, offset: int) -> np.ndarray:
    return codes.view("int8") - np.int8(offset)


def _from_q8_0(blocks: np.ndarray) -> Blocks:
    return Blocks(blocks[:, 2:].view("int8"), _half(blocks[:, :2]))


def _q8_0(parts: Blocks) -> np.ndarray:
    return np.concatenate([_bytes(parts.scales), parts.codes.view("uint8")], axis=1)


def _from_q4_0(blocks: np.ndarray) -> Blocks:
    return Blocks(_signed(_from_nibbles(blocks[:, 2:]), 8), _half(blocks[:, :2]))


def _q4_0(parts: Blocks) -> np.ndarray:
    return np.concatenate([_bytes(parts.scales), _nibbles(_unsigned(parts.codes, 8))], axis=1)


def _from_q4_1(blocks: np.ndarray) -> Blocks:
    minima = _half(blocks[:, 2:4]).astype("float32")
    return Blocks(_from_nibbles(blocks[:, 4:]), _half(blocks[:, :2]), minima)


def _q4_1(parts: Blocks) -> np.ndarray:
    head = [_bytes(parts.scales), _bytes(parts.minima)]
    return np.concatenate([*head, _nibbles(parts.codes)], axis=1)


def _from_ternary_bytes(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Codes of 5 bits: 32 fifth bits, the first the lowest, and 32 nibbles."""
    return _from_nibbles(low) | np.unpackbits(high, axis=1, bitorder="little") << 4


def _ternary_bytes(codes: np.ndarray) -> list[np.ndarray]:
    return [np.packbits(codes >> 4, axis=1, bitorder="little"), _nibbles(codes)]


def _from_q5_0(blocks: np.ndarray) -> Blocks:
    return Blocks(
        _signed(_from_ternary_bytes(blocks[:, 2:6], blocks[:, 6:]), 16), _half(blocks[:, :2])
    )


def _q5_0(parts: Blocks) -> np.ndarray:
    return np.concatenate(
        [_bytes(parts.scales), *_ternary_bytes(_unsigned(parts.codes, 16))], axis=1
    )


def _from_q5_1(blocks: np.ndarray) -> Blocks:
    minima = _half(blocks[:, 2:4]).astype("float32")
    return Blocks(_from_ternary_bytes(blocks[:, 4:8], blocks[:, 8:]), _half(blocks[:, :2]), minima)


def _q5_1(parts: Blocks) -> np.ndarray:
    head = [_bytes(parts.scales), _bytes(parts.minima)]
    return np.concatenate([*head, *_ternary_bytes(parts.codes)], axis=1)


def _from_mxfp4(blocks: np.ndarray) -> Blocks:
    if (blocks[:, 0] == _NAN_EXPONENT).any():
        raise FormatError("an exponent is 255, which is no number")
    return Blocks(_from_nibbles(blocks[:, 1:]), blocks[:, :1])


def _mxfp4(parts: Blocks) -> np.ndarray:
    if (parts.scales == _NAN_EXPONENT).any():
        raise FormatError("a scale is NaN, which MXFP4 of GGUF cannot say")
    return np.concatenate([parts.scales, _nibbles(parts.codes)], axis=1)


def _from_iq4_nl(blocks: np.ndarray) -> Blocks:
    return Blocks(_from_nibbles(blocks[:, 2:]), _half(blocks[:, :2]))


# ---- ternary blocks of 256 weights -------------------------------------------------------------


def _from_trits(field: np.ndarray, count: int) -> np.ndarray:
    """``count`` digits 0..2 of each byte, the first digits of all bytes first.

    A byte stands for a fraction of 256, written in base 3: times 3**i it wraps around to what comes
    after i digits, and the next digit is the whole part of three times that.
    """
    rest = field[:, None, :] * _TRITS[:count, None]
    return (rest.astype("uint16") * 3 >> 8).astype("uint8").reshape(len(field), -1)


def _trits(digits: np.ndarray, count: int) -> np.ndarray:
    parts = digits.reshape(len(digits), count, -1) * _TRITS[4::-1][:count, None]
    number = parts.sum(axis=1, dtype="uint16")
    return ((number * 256 + 242) // 243).astype("uint8")


def _from_tq1_0(blocks: np.ndarray) -> Blocks:
    fields = [(blocks[:, :32], 5), (blocks[:, 32:48], 5), (blocks[:, 48:52], 4)]
    codes = np.concatenate([_from_trits(*field) for field in fields], axis=1)
    return Blocks(_signed(codes, 1), _half(blocks[:, 52:]))


def _tq1_0(parts: Blocks) -> np.ndarray:
    digits = _unsigned(parts.codes, 1)
    fields = [(digits[:, :160], 5), (digits[:, 160:240], 5), (digits[:, 240:], 4)]
    return np.concatenate([*(_trits(*field) for field in fields), _bytes(parts.scales)], axis=1)


def _from_pairs(field: np.ndarray) -> np.ndarray:
    """Codes of 2 bits, ``[n, 64]`` bytes: of each 32 bytes first all lowest pairs of bits."""
    return (field.reshape(-1, 2, 1, 32) >> _PAIRS & 3).reshape(-1, 256)


def _from_tq2_0(blocks: np.ndarray) -> Blocks:
    codes = _from_pairs(blocks[:, :64])
    if (codes == 3).any():
        raise FormatError("a code is 3, which stands for no ternary number")
    return Blocks(_signed(codes, 1), _half(blocks[:, 64:]))


def _tq2_0(parts: Blocks) -> np.ndarray:
    digits = _unsigned(parts.codes, 1).reshape(-1, 2, 4, 32) << _PAIRS
    field = np.bitwise_or.reduce(digits, axis=2).reshape(-1, 64)
    return np.concatenate([field, _bytes(parts.scales)], axis=1)


# ---- blocks of 256 weights with scales of scales, only read ------------------------------------


def _wide(field: np.ndarray) -> np.ndarray:
    return _half(field).astype("float32")


def _from_q2_k(blocks: np.ndarray) -> Blocks:
    both = blocks[:, :16]
    scales = _wide(blocks[:, 80:82]) * (both & 15)
    return Blocks(_from_pairs(blocks[:, 16:80]), scales, -_wide(blocks[:, 82:]) * (both >> 4))


def _from_q3_k(blocks: np.ndarray) -> Blocks:
    high = (blocks[:, None, :32] >> _BITS & 1).reshape(-1, 256)
    codes = _signed(_from_pairs(blocks[:, 32:96]) | high << 2, 4)
    tops = (blocks[:, None, 104:108] >> _PAIRS & 3).reshape(-1, 16)
    factors = _signed(_from_nibbles(blocks[:, 96:104]) | tops << 4, 32)
    return Blocks(codes, _wide(blocks[:, 108:]) * factors)


def _six_bit(field: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight factors of scales and eight of minima, of 6 bits each, out of 12 bytes."""
    scales, minima, low = field[:, :4], field[:, 4:8], field[:, 8:]
    late = (low & 15 | scales >> 6 << 4, low >> 4 | minima >> 6 << 4)
    return tuple(
        np.concatenate([early & 63, part], axis=1)
        for early, part in zip((scales, minima), late, strict=True)
    )


def _halves(field: np.ndarray) -> np.ndarray:
    """Codes of 4 bits: of each 32 bytes first all low halves."""
    parts = field.reshape(-1, 4, 1, 32) >> np.array([0, 4], "uint8")[:, None] & 15
    return parts.reshape(-1, 256)


def _from_q4_k(blocks: np.ndarray) -> Blocks:
    scales, minima = _six_bit(blocks[:, 4:16])
    codes = _halves(blocks[:, 16:])
    return Blocks(codes, _wide(blocks[:, :2]) * scales, -_wide(blocks[:, 2:4]) * minima)


def _from_q5_k(blocks: np.ndarray) -> Blocks:
    scales, minima = _six_bit(blocks[:, 4:16])
    high = (blocks[:, None, 16:48] >> _BITS & 1).reshape(-1, 256)
    codes = _halves(blocks[:, 48:]) | high << 4
    return Blocks(codes, _wide(blocks[:, :2]) * scales, -_wide(blocks[:, 2:4]) * minima)


def _from_q6_k(blocks: np.ndarray) -> Blocks:
    low = blocks[:, :128].reshape(-1, 2, 1, 64) >> np.array([0, 4], "uint8")[:, None] & 15
    codes = low.reshape(-1, 256) | _from_pairs(blocks[:, 128:192]) << 4
    factors = blocks[:, 192:208].view("int8")
    return Blocks(_signed(codes, 32), _wide(blocks[:, 208:]) * factors)


def _from_q8_k(blocks: np.ndarray) -> Blocks:
    return Blocks(blocks[:, 4:260].view("int8"), blocks[:, :4].view("<f4"))


def _from_iq4_xs(blocks: np.ndarray) -> Blocks:
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=2).reshape(-1, 8)
    tops = (blocks[:, 2:4, None] >> _PAIRS[:, 0] & 3).reshape(-1, 8)
    codes = np.concatenate(
        [_from_nibbles(blocks[:, start : start + 16]) for start in range(8, 136, 16)], axis=1
    )
    return Blocks(codes, _wide(blocks[:, :2]) * _signed(low | tops << 4, 32))


#: All types of blocks that a scheme holds, by name; of those that are written, smaller ones first.
TYPES: dict[str, BlockType] = {
    kind.name: kind
    for kind in (
        BlockType("TQ1_0", 256, 54, "ternaryg256+f16", _from_tq1_0, _tq1_0, (-1, 1)),
        BlockType("TQ2_0", 256, 66, "ternaryg256+f16", _from_tq2_0, _tq2_0, (-1, 1)),
        BlockType("MXFP4", 32, 17, "mxfp4", _from_mxfp4, _mxfp4, (0, 15)),
        BlockType("Q4_0", 32, 18, "w4g32+f16", _from_q4_0, _q4_0, (-8, 7)),
        BlockType("Q4_1", 32, 20, "w4g32af+f16", _from_q4_1, _q4_1, (0, 15)),
        BlockType("Q5_0", 32, 22, "w5g32+f16", _from_q5_0, _q5_0, (-16, 15)),
        BlockType("Q5_1", 32, 24, "w5g32af+f16", _from_q5_1, _q5_1, (0, 31)),
        BlockType("Q8_0", 32, 34, "w8g32+f16", _from_q8_0, _q8_0, (-128, 127)),
        BlockType("Q2_K", 256, 84, "w2g16af+f32", _from_q2_k),
        BlockType("Q3_K", 256, 110, "w3g16+f32", _from_q3_k),
        BlockType("Q4_K", 256, 144, "w4g32af+f32", _from_q4_k),
        BlockType("Q5_K", 256, 176, "w5g32af+f32", _from_q5_k),
        BlockType("Q6_K", 256, 210, "w6g16+f32", _from_q6_k),
        BlockType("Q8_K", 256, 292, "w8g256+f32", _from_q8_k),
        BlockType("IQ4_NL", 32, 18, "kmeans4g32+f16", _from_iq4_nl),
        BlockType("IQ4_XS", 256, 136, "kmeans4g32+f32", _from_iq4_xs),
    )
}
