"""Weights stored as ``[in, out]`` with scales ``[groups, out]``, as GPTQ and AWQ have them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from quantization.checkpoint.disk.stored_tensor import StoredTensor, key_of
from quantization.checkpoint.stored_model import StoredLayer
from quantization.formats.folders import Folder, granularity_of
from quantization.formats.integers import IN_ORDER, Integers, Order, packed_of
from quantization.ops.dtypes import SOURCES
from quantization.schemes.packed_weights import PackedWeights
from quantization.schemes.scheme import Scheme

__all__ = ["groups_of", "layer_of", "scales_of"]

Read = Callable[[], torch.Tensor]


def groups_of(group_size: int, cols: int) -> tuple[int | None, int]:
    """The group of a layer (None: a row), and how many there are, for a size of which -1 is a row.

    Example:
        >>> groups_of(-1, 100), groups_of(64, 100)
        ((None, 1), (64, 2))
    """
    if group_size == -1:
        return None, 1
    return group_size, -(-cols // group_size)


def scales_of(folder: Folder, name: str, groups: int) -> StoredTensor:
    """The scales of a layer, ``[groups, out]``."""
    return folder.tensor(key_of(name, "scales"), SOURCES, (groups, None))


def layer_of(
    folder: Folder,
    bits: int,
    group: int | None,
    scales: StoredTensor,
    cols: int,
    codes: Read,
    zeros: Read,
    order: Order = IN_ORDER,
) -> StoredLayer:
    """A layer; symmetric where all zero points are ``2**(bits - 1)``, as its zero points tell now.

    Args:
        folder: where it comes from.
        bits: of a code.
        group: columns of a group; None: all.
        scales: ``[groups, out]``.
        cols: ``in``.
        codes: reads codes, uint8 ``[in, out]``.
        zeros: reads zero points, uint8 ``[groups, out]``.
        order: where the groups lie.
    """
    is_symmetric = bool((zeros() == 1 << bits - 1).all())

    def load(scheme: Scheme, dtype: str) -> PackedWeights:
        zero_points = None if is_symmetric else order.scales(zeros()).t()
        found = order.scales(scales.load()).t()
        numbers = Integers(bits, order.codes(codes()).t(), found, zero_points, order.columns)
        return packed_of(numbers, scheme, dtype)

    shape, has_order = (scales.shape[1], cols), order.columns is not None
    return folder.layer(shape, bits, granularity_of(group), is_symmetric, scales, load, has_order)
