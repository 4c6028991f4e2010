"""Pack codes of 1 to 8 bits into integer containers, and unpack them.

Three layouts, each along dim 0 (down the columns) or dim 1 (along the rows):

``aligned``
    A container holds ``container bits // pack_bits`` codes, the first in its low bits; no code
    straddles two containers, and bits that are left over are 0. The default, 2 bits along dim 0
    into uint8, puts 4 consecutive rows into one.
``dense``
    Code i takes the bits ``[i * pack_bits, (i + 1) * pack_bits)`` of one stream of bits, least
    significant first, whichever containers those are in. With int32 containers and codes shifted by
    ``2 ** (pack_bits - 1)`` these are the bytes of compressed-tensors' ``pack-quantized``.
``base3``
    Five ternary codes are the digits of one byte in base 3, the first the lowest: 1.6 bits a code.
    A code -1 is the digit 2.

A negative code is stored in two's complement. A length that does not fill its last container is
padded with zeros; :class:`Packing` (``return_info=True``) remembers it, with all that
:func:`unpack_weights` needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from quantization.numerics.packing import (
    CONTAINERS,
    LARGEST_TERNARY_BYTE,
    Packing,
    bits_for,
    checked_dim,
    checked_layout,
    extremes,
    get_dtype_size_in_bits,
    integer_name,
    integers_of,
)
from quantization.ops import native
from quantization.ops.dtypes import index_of, name_of
from quantization.ops.native import Tensor, TensorT

__all__ = ["pack_weights", "unpack_weights"]

#: Calls that look at the input first: they raise, or return False, where they are not satisfied.
EnsureMethods = Iterable[Callable[[Tensor], Any]]


# ---- pack ------------------------------------------------------------------------------------


def pack_weights(
    to_pack_2d: Tensor,
    pack_bits: int,
    dtype: Any = "uint8",
    ensure_methods: EnsureMethods = (),
    compress: bool = False,
    *,
    layout: str = "aligned",
    dim: int = 0,
    return_info: bool = False,
) -> Any:
    """Pack a matrix of small integers, ``pack_bits`` bits each.

    Args:
        to_pack_2d: codes ``[rows, cols]`` of any integer dtype or bool, a torch tensor or ndarray;
            all in ``0 .. 2**pack_bits - 1``, or all in ``-2**(pack_bits - 1) .. 2**(pack_bits - 1)
            - 1`` (``base3``: 0..2 or -1..1).
        pack_bits: width of a code, 1..8; 2 for the layout ``base3``.
        dtype: of the containers: (u)int8, (u)int16, (u)int32 or (u)int64; (u)int8 for ``base3``.
        ensure_methods: called with ``to_pack_2d`` before anything else, such as
            ``torch.Tensor.is_contiguous``; each may raise, or return False to refuse.
        compress: pack with the fewest bits that hold the values, ``pack_bits`` at most; ask for
            the info to learn how many.
        layout: ``"aligned"``, ``"dense"`` or ``"base3"`` (see the module).
        dim: dimension to pack along: 0 down the columns, 1 along the rows.
        return_info: return ``(packed, Packing)`` for an exact way back.

    Returns:
        Containers of ``dtype``, the packed dimension shortened to ``ceil(length / codes a
        container)``; the same kind (and device) as ``to_pack_2d``.

    Raises:
        TypeError: if an argument has the wrong type, or the codes are not integers.
        ValueError: if a value does not fit (named with its index), or for a width, layout,
            dimension or number of dimensions that does not exist.

    Example:
        >>> codes = np.array([[1], [2], [3], [0], [3]], dtype=np.uint8)
        >>> packed, info = pack_weights(codes, 2, return_info=True)
        >>> [f"{value:08b}" for value in packed[:, 0]]
        ['00111001', '00000011']
        >>> bool((unpack_weights(packed, info) == codes).all())
        True
    """
    _ensure(to_pack_2d, ensure_methods, "to_pack_2d")
    codes = integers_of(to_pack_2d, "to_pack_2d")
    bits, container = checked_layout(pack_bits, layout, dtype, "dtype")
    dim = checked_dim(dim)
    made = None if compress else _pack_bytes(codes, bits, layout, container, dim)
    if made is None:  # the range is not known from packing: look at it first
        low, high = extremes(codes)
        _check_range(codes, low, high, bits, layout)
        if compress:
            bits = _narrowest(low, high, layout)
        is_signed = codes.dtype.kind == "i" and high <= _limits(bits, layout, True)[1]
        made = _pack(codes, bits, layout, container, dim), is_signed
    info = Packing(bits, layout, dim, container, codes.shape, made[1])
    packed = native.as_tensor_like(made[0], container, to_pack_2d)
    return (packed, info) if return_info else packed


def _pack_bytes(
    codes: np.ndarray, bits: int, layout: str, container: str, dim: int
) -> tuple[np.ndarray, bool] | None:
    """Codes of one byte, packed and judged in one pass: containers, if signed; None: no fit."""
    if layout == "base3" or codes.itemsize > 1:
        return None
    made = native.pack(codes.view("uint8"), bits, container, dim, layout == "dense")
    is_signed = codes.dtype.kind == "i" and made.fits_signed
    return (made.containers, is_signed) if is_signed or made.fits_unsigned else None


def _narrowest(low: int, high: int, layout: str) -> int:
    if layout == "base3":
        raise ValueError("compress=True has no narrower width in layout 'base3'; leave it out")
    return bits_for(low, high)


def _pack(codes: np.ndarray, bits: int, layout: str, container: str, dim: int) -> np.ndarray:
    if layout != "base3":
        codes = codes.view("uint8") if codes.itemsize == 1 else codes.astype("uint8")
        return native.pack(codes, bits, container, dim, layout == "dense").containers
    digits = np.where(codes < 0, 2, codes).astype("uint8")
    packed = native.pack_ternary(np.ascontiguousarray(digits if dim else digits.T))
    return np.ascontiguousarray(packed if dim else packed.T).view(container)


def _limits(bits: int, layout: str, is_signed: bool) -> tuple[int, int]:
    if layout == "base3":
        return (-1, 1) if is_signed else (0, 2)
    half = 1 << (bits - 1)
    return (-half, half - 1) if is_signed else (0, 2 * half - 1)


def _check_range(codes: np.ndarray, low: int, high: int, bits: int, layout: str) -> None:
    smallest, largest = _limits(bits, layout, low < 0)
    if smallest <= low and high <= largest:
        return
    row, col = np.argwhere((codes < smallest) | (codes > largest))[0]
    room = f"{bits} bits" if layout != "base3" else "a ternary digit"
    why = ", as some values are negative" if low < 0 else ""
    needed = bits_for(low, high)
    wider = f"pack_bits={needed} or " if needed <= 8 and layout != "base3" else ""
    raise ValueError(
        f"to_pack_2d[{row}, {col}] = {codes[row, col]} does not fit in {room}: allowed are "
        f"{smallest}..{largest}{why}; use {wider}smaller codes"
    )


# ---- unpack ----------------------------------------------------------------------------------


def unpack_weights(
    packed: TensorT,
    pack_bits: int | Packing,
    ensure_methods: EnsureMethods = (),
    dtype: Any = None,
    *,
    layout: str | None = None,
    dim: int | None = None,
    size: int | None = None,
) -> TensorT:
    """The codes that :func:`pack_weights` packed.

    Args:
        packed: containers ``[rows, cols]`` of (u)int8, (u)int16, (u)int32 or (u)int64.
        pack_bits: width of a code, or the :class:`Packing` that ``pack_weights`` returned: then
            the exact shape comes back, and ``layout``, ``dim`` and ``size`` are left out.
        ensure_methods: called with ``packed`` first, as in :func:`pack_weights`.
        dtype: of the codes: any integer dtype, or bool for single bits. With a Packing the codes
            are restored, then cast to ``dtype``; without one a signed dtype extends the sign, an
            unsigned one does not. None: int8 if ``Packing.is_signed``, else uint8.
        layout: ``"aligned"`` (if None), ``"dense"`` or ``"base3"``.
        dim: dimension that was packed, 0 (if None) or 1.
        size: codes along ``dim``. None: as many as the containers hold, padding included.

    Returns:
        Codes of ``dtype``, the same kind (and device) as ``packed``.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if shapes, sizes or widths do not fit together.

    Example:
        >>> packed = np.array([[0b00_11_10_01], [0b00_00_00_11]], dtype=np.uint8)
        >>> unpack_weights(packed, 2, size=5)[:, 0].tolist()
        [1, 2, 3, 0, 3]
        >>> unpack_weights(packed, 2, dtype="int8", size=5)[:, 0].tolist()
        [1, -2, -1, 0, -1]
    """
    _ensure(packed, ensure_methods, "packed")
    containers = integers_of(packed, "packed", CONTAINERS)
    if isinstance(pack_bits, Packing):
        info = _fitting(pack_bits, containers, layout, dim, size)
        is_signed = info.is_signed
    else:
        layout, dim = "aligned" if layout is None else layout, 0 if dim is None else dim
        info = _assumed(containers, pack_bits, layout, dim, size)
        is_signed = None
    out = ("int8" if is_signed else "uint8") if dtype is None else integer_name(dtype, "dtype")
    if out == "bool" and info.bits > 1:
        raise ValueError(f"dtype bool holds codes of 1 bit, not of {info.bits}; use uint8")
    if is_signed is None:
        is_signed = out.startswith("int")
    codes = _unpack(containers, info, is_signed).astype(out, copy=False)
    return native.as_tensor_like(codes, out, packed)


def _unpack(containers: np.ndarray, info: Packing, is_signed: bool) -> np.ndarray:
    length, dim = info.shape[info.dim], info.dim
    if info.layout != "base3":
        straddle = info.layout == "dense"
        return native.unpack(containers, length, info.bits, dim, straddle, is_signed)
    _check_ternary_bytes(containers.view("uint8"))
    fives = np.ascontiguousarray(containers if dim else containers.T).view("uint8")
    codes = native.unpack_ternary(fives, length)
    if is_signed:
        codes = codes.view("int8")
        codes[codes == 2] = -1
    return codes if dim else np.ascontiguousarray(codes.T)


def _check_ternary_bytes(fives: np.ndarray) -> None:
    """Bytes that no five ternary digits make come from elsewhere."""
    if fives.size and fives.max() > LARGEST_TERNARY_BYTE:
        row, col = np.argwhere(fives > LARGEST_TERNARY_BYTE)[0]
        raise ValueError(
            f"packed[{row}, {col}] is the byte {fives[row, col]}; five ternary codes make "
            f"0..{LARGEST_TERNARY_BYTE}: pass what pack_weights packed with layout='base3'"
        )


def _fitting(
    info: Packing, containers: np.ndarray, layout: str | None, dim: int | None, size: int | None
) -> Packing:
    if (layout, dim, size) != (None, None, None):
        raise ValueError("a Packing says layout, dim and size; leave those arguments out")
    width = get_dtype_size_in_bits(info.container)
    if containers.shape != info.packed_shape or containers.itemsize * 8 != width:
        raise ValueError(
            f"packed is {containers.dtype} of shape {containers.shape}, but this Packing has "
            f"{info.container} of shape {info.packed_shape}"
        )
    return info


def _assumed(
    containers: np.ndarray, pack_bits: int, layout: str, dim: int, size: int | None
) -> Packing:
    """The packing of containers that came without one."""
    bits, container = checked_layout(pack_bits, layout, containers.dtype, "packed's dtype")
    dim = checked_dim(dim)
    count = containers.shape[dim]
    form = Packing(bits, layout, dim, container, (0, 0), False)
    length = form.capacity(count)
    if size is not None:
        size = index_of(size, "size")
        least = form.capacity(count - 1) + 1 if count else 0
        if not least <= size <= length:
            raise ValueError(
                f"size={size} is not a length of {count} containers along dim {dim}; they hold "
                f"{least}..{length} codes of {bits} bits in layout {layout!r}"
            )
        length = size
    shape = (length, containers.shape[1]) if dim == 0 else (containers.shape[0], length)
    return Packing(bits, layout, dim, container, shape, False)


def _ensure(tensor: Tensor, methods: EnsureMethods, what: str) -> None:
    if callable(methods) or not isinstance(methods, Iterable):
        raise TypeError(
            f"ensure_methods must be a list of callables, not {type(methods).__name__}; "
            "write [method]"
        )
    for method in methods:
        if not callable(method):
            raise TypeError(f"ensure_methods holds {method!r}, which cannot be called")
        if _is_false(method(tensor)):
            name = getattr(method, "__name__", repr(method))
            raise ValueError(f"{what} is refused by {name}, one of ensure_methods")


def _is_false(verdict: Any) -> bool:
    if isinstance(verdict, (bool, np.bool_)):
        return not verdict
    is_mask = native.is_tensor(verdict) and name_of(verdict.dtype) == "bool"
    return is_mask and not bool(verdict.all())
