"""Weights stored as ``[in, out]`` with scales ``[groups, out]``, as GPTQ and AWQ have them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from quantization.checkpoint.disk.stored_tensor import StoredTensor, key_of
from quantization.checkpoint.stored_model import StoredLayer
from quantization.formats.errors import FormatError
from quantization.formats.folders import Folder, granularity_of
from quantization.formats.integers import IN_ORDER, Integers, Order, packed_of
from quantization.ops.dtypes import SOURCES
from quantization.schemes.packed_weights import PackedWeights
from quantization.schemes.scheme import Scheme

__all__ = ["groups_of", "layer_of", "scales_of", "sizes_of"]

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


def sizes_of(
    folder: Folder, name: str, own: Mapping[str, Any], widths: Iterable[int]
) -> tuple[int, int]:
    """Width and group_size of a layer: its own settings, else those of the model.

    Raises:
        FormatError: if a size is none, or the width none of ``widths``.
    """
    bits = own.get("bits", folder.setting("bits", int))
    group_size = own.get("group_size", folder.setting("group_size", int, -1))
    if type(bits) is not int or bits not in widths:
        raise FormatError(
            f"{folder.path}: {name} has {bits!r:.60} bits; allowed are {tuple(widths)}"
        )
    if type(group_size) is not int or (group_size < 1 and group_size != -1):
        raise FormatError(
            f"{folder.path}: {name} has group_size {group_size!r:.60}; it must be 1 or more, or -1 "
            "for rows"
        )
    return bits, group_size


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
