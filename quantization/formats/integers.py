"""What formats of integer weights have in common: unsigned codes, scales, whole zero points.

``weight[n, k] = (codes[n, k] - zero) * scale``, with ``zero = 2**(bits - 1)`` where there are no
zero points. That is how compressed-tensors, GPTQ, AWQ and MatMulNBits store codes; a
:class:`quantization.PackedWeights` stores symmetric ones in two's complement.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from quantization.formats.errors import FormatError
from quantization.numerics.parameters import Mode
from quantization.numerics.weight_packing import pack_weights, unpack_weights
from quantization.schemes.packed_weights import PackedWeights
from quantization.schemes.scheme import Scheme
from quantization.schemes.stored_scales import restore, restore_zeros

__all__ = [
    "IN_ORDER",
    "Integers",
    "Order",
    "integers_of",
    "order_of",
    "packed_of",
    "why_not",
    "why_not_columns",
    "width_of",
]


_SCATTERED = "its groups are scattered over the columns (act-order), and here a group is neighbours"
_MULTIPLIED = (
    "its columns have multipliers for the layer's inputs (+cols), and here there is no place for "
    "them; quantize without +cols"
)


@dataclass(frozen=True, eq=False)
class Integers:
    """A matrix as unsigned codes.

    Attributes:
        bits: of a code, 2..8.
        codes: uint8 ``[out, in]``, below ``2**bits``.
        scales: floats ``[out, groups]``.
        zero_points: uint8 ``[out, groups]``, of ``bits`` bits (floats for a scheme that has such);
            None: ``2**(bits - 1)``.
        input_order: int32 ``[in]``, which column of the matrix each of ``codes`` is; None: itself.
    """

    bits: int
    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None
    input_order: torch.Tensor | None = None


def why_not(scheme: Scheme) -> str | None:
    """Why a scheme's weights are no such integers; None where they are.

    Example:
        >>> why_not(Scheme.parse("w4g64a")), why_not(Scheme.ternary())
        (None, None)
        >>> why_not(Scheme.nf4())
        "codes of the grid 'nf4' are places in a table of levels, not whole numbers"
    """
    if why_not_columns(scheme):
        return why_not_columns(scheme)
    if scheme.grid not in ("integer", "binary", "ternary"):
        return (
            f"codes of the grid {scheme.grid!r} are places in a table of levels, not whole numbers"
        )
    if scheme.mode is Mode.Asymmetric and not scheme.has_integer_zeros:
        return "its zero points are floats, not whole numbers"
    return None


def why_not_columns(scheme: Scheme) -> str | None:
    """Why a format without an order of columns and multipliers cannot hold a scheme; else None.

    Example:
        >>> why_not_columns(Scheme.parse("w4g64a+order"))
        'its groups are scattered over the columns (act-order), and here a group is neighbours'
    """
    if scheme.input_order:
        return _SCATTERED
    return _MULTIPLIED if scheme.input_scale else None


def width_of(scheme: Scheme, widths: Iterable[int]) -> int:
    """The least of ``widths`` that holds a scheme's codes as whole numbers.

    Example:
        >>> width_of(Scheme.parse("w3"), (2, 4, 8)), width_of(Scheme.binary(), (2, 4, 8))
        (4, 2)
    """
    return min(width for width in widths if width >= scheme.bits)


def integers_of(packed: PackedWeights, bits: int) -> Integers:
    """The codes of a packed matrix in ``bits`` bits, of the same numbers to the last bit.

    Scales that are codes themselves (double quantization) become the float32 that they stand for.

    Args:
        packed: of torch tensors, of a scheme that :func:`why_not` lets pass; or with float zero
            points, which stay as they are.
        bits: at least what :func:`width_of` says.

    Raises:
        FormatError: if it is on meta.

    Example:
        >>> from quantization import pack_matrix
        >>> integers_of(pack_matrix(torch.tensor([[-7.5, 0, 7.5]]), "w4"), 4).codes.tolist()
        [[0, 8, 15]]
    """
    scheme, cols = packed.scheme, packed.shape[1]
    if packed.packed_weights.is_meta:
        raise FormatError("the weights are on meta: they have shapes, but no numbers")
    scales = packed.scales
    if packed.scale_steps is not None:
        scales = torch.from_numpy(restore(scales, packed.scale_steps))
    if scheme.mode is Mode.Symmetric:
        return Integers(bits, _offset(packed, bits), scales, None)
    codes = unpack_weights(packed.packed_weights, scheme.bits, layout="dense", dim=1, size=cols)
    zeros = packed.zero_points
    if scheme.zero_point == "integer":
        groups = scheme.groups(cols)
        zeros = unpack_weights(zeros, scheme.bits, layout="dense", dim=1, size=groups)
    elif scheme.zero_point == "fixed":
        zeros = torch.from_numpy(restore_zeros(zeros, scheme.bits))
    return Integers(bits, codes, scales, zeros)


def _offset(packed: PackedWeights, bits: int) -> torch.Tensor:
    """Symmetric codes, as the whole number that each stands for plus ``2**(bits - 1)``."""
    scheme, half = packed.scheme, 1 << bits - 1
    codes = unpack_weights(
        packed.packed_weights,
        scheme.bits,
        dtype="uint8" if scheme.grid == "binary" else "int8",
        layout="base3" if scheme.grid == "ternary" else "dense",
        dim=1,
        size=packed.shape[1],
    )
    if scheme.grid == "binary":  # 0 is -1
        return codes.mul_(2).add_(half - 1)
    return codes.view(torch.uint8).add_(half)  # a negative code is 256 too much, and wraps


def packed_of(numbers: Integers, scheme: Scheme, dtype: str) -> PackedWeights:
    """The packed matrix of such integers.

    Args:
        numbers: with whole zero points, or none.
        scheme: of the grid ``integer``, with these bits, groups and zero points.
        dtype: of the layer's floats.

    Example:
        >>> codes = torch.tensor([[1, 15]], dtype=torch.uint8)
        >>> numbers = Integers(4, codes, torch.ones(1, 1), None)
        >>> packed_of(numbers, Scheme(4), "float32").dequantize()
        tensor([[-7.,  7.]])
    """
    codes, zeros = numbers.codes, numbers.zero_points
    if zeros is None:  # from an offset to two's complement
        codes = codes ^ (1 << numbers.bits - 1)
    else:
        zeros = pack_weights(zeros, numbers.bits, layout="dense", dim=1)
    rows, cols = codes.shape
    data = pack_weights(codes, numbers.bits, layout="dense", dim=1)
    scales, order = numbers.scales.contiguous(), numbers.input_order
    return PackedWeights(scheme, (rows, cols), data, scales, None, zeros, None, dtype, order)


@dataclass(frozen=True, eq=False)
class Order:
    """Where groups lie that are not one after the other.

    Attributes:
        groups: int64, which stored scale each run of columns has; None: in order.
        columns: int32 ``[in]``, columns sorted by their groups, where those are scattered over
            them (act-order); None where they are neighbours.
    """

    groups: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    def scales(self, stored: torch.Tensor) -> torch.Tensor:
        """``[groups, ...]`` as the groups of the layer have them."""
        return stored if self.groups is None else stored[self.groups]

    def codes(self, stored: torch.Tensor) -> torch.Tensor:
        """``[in, ...]`` as the groups of the layer have them."""
        return stored if self.columns is None else stored[self.columns]


IN_ORDER = Order()


def order_of(places: torch.Tensor, group: int, groups: int, key: str) -> Order:
    """How columns and scales are to be moved so that neighbours share a scale.

    Args:
        places: integers ``[in]``, the group of each column (``g_idx``).
        group: columns of a group.
        groups: how many there are.
        key: of ``places``, for errors.

    Raises:
        FormatError: if a group does not exist, or is not of that size.

    Example:
        >>> order_of(torch.tensor([1, 1, 0, 0]), 2, 2, "g_idx").groups
        tensor([1, 0])
        >>> order_of(torch.tensor([1, 0, 1, 0]), 2, 2, "g_idx").columns
        tensor([1, 3, 0, 2], dtype=torch.int32)
    """
    places = places.long()
    if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < groups:
        raise FormatError(f"{key} names a group that is none of the {groups} there are")
    runs = places[::group]
    if torch.equal(runs.repeat_interleave(group)[: len(places)], places):
        is_plain = torch.equal(runs, torch.arange(len(runs)))
        return IN_ORDER if is_plain else Order(groups=runs)
    columns = places.argsort(stable=True)
    if not torch.equal(places[columns], torch.arange(len(places)) // group):
        raise FormatError(
            f"{key} gives groups other sizes than {group} columns, the last one what is left: "
            "their scales could not be kept; quantize the model again with even groups"
        )
    return Order(columns=columns.int())
