"""Shares of a layer: what each of several processes holds of it, as a layer of its own.

Along dim 0, the rows of the weight (output features; of an embedding, its words), a share has some
of the outputs: joined they are those of the whole layer, bit for bit. Along dim 1, the columns
(input features), a share meets some of the inputs: its outputs are parts of sums, and added up they
are those of the whole layer, but for rounding. The bias is in the first share alone.

A share is made of the same kinds of tensors as the whole, by the layout that
:mod:`quantization.schemes.packed_weights` tells: nothing is quantized anew, no code and no scale
changes. Groups stay whole. Where the first code of a share does not begin a byte, its codes are
packed anew.
No process is needed here; :mod:`quantization.distributed.styles` brings shares to processes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from quantization.layers.int8_layer import QWQALinearLayer
from quantization.layers.packed_embedding import PackedEmbedding
from quantization.layers.packed_layer import PackedLinearLayer
from quantization.layers.packed_module import PackedModule
from quantization.layers.quantized_module import QuantizedModule
from quantization.numerics.weight_packing import pack_weights, unpack_weights
from quantization.ops.dtypes import index_of
from quantization.schemes.packed_weights import PARTS, PackedWeights, layout_of
from quantization.schemes.scheme import TERNARY_CODES, Scheme

__all__ = ["EmbeddingShare", "bounds", "group_of", "shard", "why_whole"]

_CODES_OF_WHOLE_BYTES = 8  # so many codes of any width end with a byte


def bounds(size: int, count: int, unit: int = 1) -> list[tuple[int, int]]:
    """Where each share of a number of features begins and ends: whole units, as even as can be.

    The first shares are the longer ones, by one unit; a last unit that is not full is in the last.

    Args:
        size: features to share, 1 or more.
        count: shares.
        unit: features that stay together.

    Raises:
        TypeError: for a number that is no integer.
        ValueError: if there are fewer units than shares, or a number is not positive.

    Example:
        >>> bounds(576, 2, unit=64)
        [(0, 320), (320, 576)]
    """
    for name, value in (("size", size), ("count", count), ("unit", unit)):
        if index_of(value, name) < 1:
            raise ValueError(f"{name} is {value}; it must be 1 or more")
    units = -(-size // unit)
    if units < count:
        what = f"{units} groups of {unit} features" if unit > 1 else f"{size} features"
        raise ValueError(
            f"{what} cannot be shared by {count} processes: take fewer of them, smaller groups, "
            "or the other dimension of the weight"
        )
    each, more = divmod(units, count)
    starts = [unit * (i * each + min(i, more)) for i in range(count)]
    return list(zip(starts, [*starts[1:], size], strict=True))


def shard(layer: nn.Module, dim: int, index: int, count: int, *, unit: int = 1) -> nn.Module:
    """One of ``count`` shares of a layer, which is left as it is.

    Args:
        layer: a :class:`quantization.QWQALinearLayer`, :class:`quantization.PackedLinearLayer` or
            :class:`quantization.PackedEmbedding`; or an nn.Linear, for what a recipe leaves in
            float beside them. On any device including meta.
        dim: 0: rows of the weight; 1: columns. Embeddings are shared by rows.
        index: which share, 0..count - 1.
        count: how many there are.
        unit: features that stay together, beside those of a group: as many as a layer that the
            outputs go to has in a group, say.

    Returns:
        A layer of the same kind, dtype and training flag, that holds copies of its part, and the
        very tensors of which it needs the whole (codebooks; scales of whole rows along dim 1). An
        embedding becomes an :class:`EmbeddingShare`. Hooks stay behind.

    Raises:
        TypeError: for another kind of layer.
        ValueError: for a share, a dimension or a number of shares that there is not.

    Example:
        >>> layer, x = PackedLinearLayer(64, 32, scheme="w3g8a"), torch.randn(2, 64)
        >>> rows = [shard(layer, 0, i, 3)(x) for i in range(3)]
        >>> torch.equal(torch.cat(rows, -1), layer(x))
        True
        >>> parts = [shard(layer, 1, i, 2) for i in range(2)]
        >>> [part.in_features for part in parts], parts[0].scales.shape
        ([32, 32], torch.Size([32, 4]))
    """
    reason = why_whole(layer)
    if reason is not None:
        raise TypeError(reason)
    if dim != 0 and (dim != 1 or isinstance(layer, PackedEmbedding)):
        raise ValueError(
            f"dim is {dim}; shares are along 0, the rows of the weight, or 1, its columns; those "
            "of an embedding along 0"
        )
    if not 0 <= index_of(index, "index") < count:
        raise ValueError(f"index is {index}; the {count} shares are 0..{count - 1}")
    start, end = share_bounds(layer, dim, count, unit)[index]
    with torch.inference_mode(False), torch.no_grad():
        bias = _bias_of(layer, dim, start, end)
        made = _make(layer, dim, start, end, bias)
    return made.train(layer.training)


def share_bounds(layer: Any, dim: int, count: int, unit: int = 1) -> list[tuple[int, int]]:
    """Where the shares of a layer begin and end along a dimension of its weight.

    Raises:
        ValueError: as :func:`bounds`; the message names the layer.

    Example:
        >>> share_bounds(PackedLinearLayer(100, 4, scheme="w4g16"), 1, 2)
        [(0, 64), (64, 100)]
    """
    if dim == 1:
        unit = math.lcm(unit, group_of(layer))
    try:
        return bounds(_shape_of(layer)[dim], count, unit)
    except ValueError as error:
        error.add_note(f"while sharing {layer} along dim {dim}")
        raise


def group_of(layer: Any) -> int:
    """Input features of a layer that share a scale, 1 where a share can begin anywhere.

    All of them where columns have an order of their own (``input_order``).

    Example:
        >>> group_of(PackedLinearLayer(128, 4, scheme="w4g64")), group_of(QWQALinearLayer(128, 4))
        (64, 1)
    """
    if not isinstance(layer, PackedLinearLayer):
        return 1
    if layer.scheme.input_order:
        return layer.in_features
    groups = layer.scheme.groups(layer.in_features)
    return layer.scheme.group(layer.in_features) if groups > 1 else 1


def why_whole(layer: Any) -> str | None:
    """Why a layer has no shares, in words; else None.

    Example:
        >>> why_whole(nn.ReLU())
        'ReLU has no shares: only quantized layers and nn.Linear do'
    """
    if isinstance(layer, EmbeddingShare):
        return "this embedding is a share already"
    quantized = PackedLinearLayer | QWQALinearLayer | PackedEmbedding
    if isinstance(layer, quantized) or type(layer) is nn.Linear:
        return None
    return f"{type(layer).__name__} has no shares: only quantized layers and nn.Linear do"


class EmbeddingShare(PackedEmbedding):
    """Some rows of a packed embedding; those of other shares are zeros, so that all can be added.

    Attributes:
        first_row: number of the first row that is here.
        all_rows: rows of the whole table.

    Example:
        >>> table = PackedEmbedding(10, 4)
        >>> shares = [shard(table, 0, i, 2) for i in range(2)]
        >>> words = torch.tensor([0, 9])
        >>> torch.equal(shares[0](words) + shares[1](words), table(words))
        True
    """

    first_row: int = 0
    all_rows: int = 0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The rows of those numbers that are here, zeros for others.

        Raises:
            IndexError: for a number that is no row of the whole table.
        """
        place = input - self.first_row
        is_here = (place >= 0) & (place < self.num_embeddings)
        is_elsewhere = ~is_here & (input >= 0) & (input < self.all_rows)
        rows = super().forward(place.masked_fill(is_elsewhere, 0))
        return rows.masked_fill(~is_here.unsqueeze(-1), 0)

    def extra_repr(self) -> str:
        """As that of a whole one, and which rows these are."""
        last = self.first_row + self.num_embeddings
        return f"{super().extra_repr()}, rows {self.first_row}..{last - 1} of {self.all_rows}"


# ---- what a share is made of -----------------------------------------------------------------


def _shape_of(layer: Any) -> tuple[int, int]:
    is_quantized = isinstance(layer, QuantizedModule)
    return layer._weight_shape() if is_quantized else tuple(layer.weight.shape)


def _make(layer: Any, dim: int, start: int, end: int, bias: torch.Tensor | None) -> nn.Module:
    rows, cols = _shape_of(layer)
    shape = (rows, end - start) if dim else (end - start, cols)
    if isinstance(layer, PackedModule):
        parts = (_columns if dim else _rows)(layer.packed(), start, end)
        packed = PackedWeights(layer.scheme, shape, **parts, dtype=layer.dtype)
        if isinstance(layer, PackedLinearLayer):
            return PackedLinearLayer.from_packed(packed, bias)
        made = EmbeddingShare.from_packed(packed)
        made.first_row, made.all_rows = start, layer.num_embeddings
        return made
    if isinstance(layer, QWQALinearLayer):
        made = QWQALinearLayer(*shape[::-1], False, layer.dtype, device="meta")
        scales = layer.scales if dim else layer.scales[start:end].clone()
        codes = _cut(layer.int8_weights, dim, start, end)
        made._set_buffers({"int8_weights": codes, "scales": scales}, shape)
        made.bias = bias
        return made
    made = nn.Linear(*shape[::-1], bias=False, device="meta")
    weight = _cut(layer.weight.detach(), dim, start, end)
    made.weight = nn.Parameter(weight, layer.weight.requires_grad)
    made.bias = bias
    return made


def _rows(packed: PackedWeights, start: int, end: int) -> dict[str, torch.Tensor | None]:
    """Every tensor of some rows; a codebook that all rows have stays as it is."""
    cut = packed.rows(start, end)
    parts = {name: (getattr(packed, name), getattr(cut, name)) for name in PARTS}
    return {name: new if new is old else new.clone() for name, (old, new) in parts.items()}


def _columns(packed: PackedWeights, start: int, end: int) -> dict[str, torch.Tensor | None]:
    """Codes of some columns, with what their groups have; what a row has one of stays as it is."""
    scheme, cols = packed.scheme, packed.shape[1]
    parts = {name: getattr(packed, name) for name in PARTS}
    layout = layout_of(scheme)
    parts["packed_weights"] = _cut_codes(packed.packed_weights, scheme, layout, start, end, cols)
    if packed.input_scale is not None:
        parts["input_scale"] = _cut(packed.input_scale, 0, start, end)
    groups = scheme.groups(cols)
    if groups == 1:
        return parts
    first = start // scheme.group(cols)
    last = first + scheme.groups(end - start)
    parts["scales"] = _cut(packed.scales, 1, first, last)
    zeros = packed.zero_points
    if zeros is not None and zeros.dtype is torch.uint8:
        parts["zero_points"] = _cut_codes(zeros, scheme, "dense", first, last, groups)
    elif zeros is not None:
        parts["zero_points"] = _cut(zeros, 1, first, last)
    return parts


def _cut(tensor: torch.Tensor, dim: int, start: int, end: int) -> torch.Tensor:
    """A copy, so that the rest can be forgotten."""
    return tensor.narrow(dim, start, end - start).clone(memory_format=torch.contiguous_format)


def _cut_codes(
    packed: torch.Tensor, scheme: Scheme, layout: str, start: int, end: int, cols: int
) -> torch.Tensor:
    """Codes ``start..end`` of ``cols`` in each row; packed anew if they do not fill their bytes."""
    period = TERNARY_CODES if layout == "base3" else _CODES_OF_WHOLE_BYTES
    first = start - start % period
    bytes_to = scheme.row_bytes
    if start == first and (end % period == 0 or end == cols):
        return _cut(packed, 1, bytes_to(start), bytes_to(end))
    if packed.is_meta:
        return packed.new_empty((packed.shape[0], bytes_to(end - start)))
    around = packed[:, bytes_to(first) : bytes_to(end)]
    codes = unpack_weights(around, scheme.bits, layout=layout, dim=1, size=end - first)
    return pack_weights(codes[:, start - first :], scheme.bits, layout=layout, dim=1)


def _bias_of(layer: Any, dim: int, start: int, end: int) -> torch.Tensor | None:
    """That of the rows; along columns the first share has it whole, and others have none."""
    bias = getattr(layer, "bias", None)
    if bias is None or dim == 1:
        return bias if start == 0 else None
    cut = bias.detach()[start:end].clone()
    return nn.Parameter(cut, bias.requires_grad) if isinstance(bias, nn.Parameter) else cut
