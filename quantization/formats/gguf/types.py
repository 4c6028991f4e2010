"""Which type of block holds weights of a scheme, and why others do not.

A scheme of whole levels (integers without or with whole zero points, ternary, binary) goes into the
smallest of TQ1_0, TQ2_0, Q4_0, Q5_0 and Q8_0 that holds its levels, so that ``w4g32a+f16``, whose
codes less zero points are -15..15, is exact in Q5_0. Float zero points go into Q4_1 and Q5_1,
``mxfp4`` into MXFP4. Rows are whole numbers of blocks, and a block has one scale: groups are whole
blocks, or rows.
"""

from __future__ import annotations

from quantization.formats.errors import FormatError
from quantization.formats.gguf.blocks import TYPES, BlockType
from quantization.formats.integers import why_not_columns
from quantization.numerics.parameters import Mode
from quantization.schemes.scheme import Scheme

__all__ = ["WITH_MINIMA", "has_float_zeros", "type_for"]

#: Types whose blocks have minima.
WITH_MINIMA = ("Q4_1", "Q5_1")
_OF_LEVELS = ("TQ1_0", "TQ2_0", "Q4_0", "Q5_0", "Q8_0")
_LARGEST_BYTE = 127


def type_for(scheme: Scheme, cols: int, name: str, wanted: str | None = None) -> BlockType:
    """The type of block that holds weights of a scheme: the smallest one that is sure to.

    Args:
        scheme: of the weights.
        cols: weights of a row.
        name: what error messages call them.
        wanted: the type to use instead, if it can hold them.

    Raises:
        FormatError: if there is none, or not the one that is wanted; the message says why.

    Example:
        >>> type_for(Scheme.parse("w3g64"), 128, "w").name
        'Q4_0'
        >>> type_for(Scheme.parse("w8"), 100, "w")
        Traceback (most recent call last):
        ...
        quantization.formats.FormatError: w (scheme w8) does not fit Q8_0 of GGUF: rows of \
100 weights are no whole number of blocks of 32; schemes that fit are ternaryg256+f16, mxfp4, \
w4g32+f16, w4g32af+f16, w5g32+f16, w5g32af+f16, w8g32+f16, or write floats: types={'w': 'F16'}
    """
    reason = None
    for kind in [wanted] if wanted else _candidates(scheme):
        reason = _why_not(scheme, cols, TYPES[kind])
        if reason is None:
            return TYPES[kind]
    fitting = dict.fromkeys(each.scheme for each in TYPES.values() if each.encode)
    raise FormatError(
        f"{name} (scheme {scheme}) does not fit {kind} of GGUF: {reason}; schemes that fit are "
        f"{', '.join(fitting)}, or write floats: types={{{name!r}: 'F16'}}"
    )


def _candidates(scheme: Scheme) -> tuple[str, ...]:
    if scheme.grid == "mxfp4":
        return ("MXFP4",)
    return WITH_MINIMA if has_float_zeros(scheme) else _OF_LEVELS


def has_float_zeros(scheme: Scheme) -> bool:
    """Whether the zero points of a scheme are floats.

    Example:
        >>> has_float_zeros(Scheme.parse("w4g32af"))
        True
    """
    return scheme.mode is Mode.Asymmetric and not scheme.has_integer_zeros


def _levels(scheme: Scheme) -> tuple[int, int]:
    """The smallest and largest level that codes may stand for, after whole zero points."""
    if scheme.grid in ("ternary", "binary"):
        return -1, 1
    if scheme.mode is Mode.Asymmetric:  # of 8 bits the numbers that are there decide
        top = min((1 << scheme.bits) - 1, _LARGEST_BYTE)
        return -top, top
    return -(1 << scheme.bits - 1), (1 << scheme.bits - 1) - 1


def _why_not(scheme: Scheme, cols: int, kind: BlockType) -> str | None:
    """Why blocks of a type cannot hold weights of a scheme, in words; else None."""
    reason = _why_not_codes(scheme, kind)
    if reason is None and cols % kind.length:
        reason = f"rows of {cols} weights are no whole number of blocks of {kind.length}"
    group = scheme.group(cols)
    if reason is None and scheme.groups(cols) > 1 and group % kind.length:
        reason = f"groups of {group} weights are no whole number of blocks of {kind.length}"
    return reason


def _why_not_codes(scheme: Scheme, kind: BlockType) -> str | None:
    if why_not_columns(scheme):
        return why_not_columns(scheme)
    if (scheme.grid == "mxfp4") != (kind.name == "MXFP4"):
        return "mxfp4 is for MXFP4, and MXFP4 for mxfp4"
    if scheme.grid == "mxfp4":
        return None
    if scheme.grid not in ("integer", "ternary", "binary"):
        return f"no block has the levels of the grid {scheme.grid}"
    low, high = _levels(scheme)
    if kind.name in WITH_MINIMA:
        if scheme.mode is Mode.Symmetric:
            return "its blocks have minima, and the scheme no zero points"
        low, high = 0, (1 << scheme.bits) - 1
    elif has_float_zeros(scheme):
        return "its blocks have no minima, which float zero points need"
    least, most = kind.codes
    if low < least or high > most:
        return f"codes of {low}..{high} are not within {least}..{most}"
    return None
