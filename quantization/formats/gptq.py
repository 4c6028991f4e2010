"""GPTQ checkpoints (AutoGPTQ, GPTQModel, transformers): read.

Of a layer of ``in`` features and ``out`` rows there are, as int32 that hold one dense stream of
codes, the first in the lowest bits:

``qweight`` ``[in * bits / 32, out]``
    Codes down the columns.
``qzeros`` ``[groups, out * bits / 32]``
    Zero points along the rows: in format ``gptq_v2`` as they are, in ``gptq`` less one.
``scales`` ``[groups, out]``
    Floats.
``g_idx`` ``[in]``
    The group of each column; without it ``k // group_size``. Where groups are scattered over the
    columns (act-order), these are sorted by group, and the layer gathers its input.

``w[n, k] = (code - zero) * scale``. The settings stand in ``config.json``
(``quantization_config``) or in ``quantize_config.json``.

Source: AutoGPTQ, ``auto_gptq/nn_modules/qlinear/qlinear_cuda.py`` and ``quantization/config.py``;
GPTQModel, ``gptqmodel/nn_modules/qlinear/__init__.py``, ``gptqmodel/utils/model.py`` (versions 1
and 2) and ``gptqmodel/quantization/config.py`` (``dynamic``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from quantization.checkpoint.disk.stored_tensor import StoredTensor, key_of
from quantization.checkpoint.stored_model import StoredLayer, StoredModel
from quantization.formats.columns import groups_of, layer_of, scales_of
from quantization.formats.errors import FormatError
from quantization.formats.folders import Folder, containers, is_named, open_folder
from quantization.formats.integers import IN_ORDER, order_of
from quantization.numerics.weight_packing import unpack_weights

__all__ = ["read_gptq"]

WIDTHS = (2, 3, 4, 8)
VERSIONS = {"gptq": 1, "gptq_v2": 2}
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


def read_gptq(folder: str | os.PathLike[str]) -> StoredModel:
    """A GPTQ model, lossless: 2, 3, 4 or 8 bits, with zero points or symmetric, by group or row.

    What decides is in the tensors: a layer all of whose zero points are in the middle becomes a
    symmetric one. Zero points and ``g_idx`` are read now, weights when they are asked for.

    Args:
        folder: with safetensors files and settings.

    Raises:
        FileNotFoundError: if it is no folder, or has no safetensors files.
        quantization.checkpoint.disk.safetensors_files.CheckpointError: if a file is broken.
        FormatError: for a tensor that is missing or of another form, for other widths and layouts
            (marlin, bitblas), and for zero points of version 1 that readers understand differently;
            the message names the tensor.

    Example:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> from safetensors.torch import save_file
        >>> tensors = {  # 32 x 32 codes 9 of 4 bits around 8, and the scale 0.5
        ...     "up.qweight": torch.full((4, 32), 0x99999999 - (1 << 32), dtype=torch.int32),
        ...     "up.qzeros": torch.full((1, 4), 0x77777777, dtype=torch.int32),
        ...     "up.scales": torch.full((1, 32), 0.5, dtype=torch.float16),
        ... }
        >>> with tempfile.TemporaryDirectory() as place:
        ...     save_file(tensors, f"{place}/model.safetensors")
        ...     settings = {"bits": 4, "group_size": 32, "checkpoint_format": "gptq"}
        ...     _ = Path(f"{place}/quantize_config.json").write_text(json.dumps(settings))
        ...     layer = read_gptq(place).layers["up"]
        ...     str(layer.scheme), layer.load().dequantize()[0, :2]
        ('w4g32', tensor([0.5000, 0.5000], dtype=torch.float16))
    """
    synonyms = {"checkpoint_format": "format"}
    source = open_folder(folder, "gptq", "quantize_config.json", synonyms)
    version = _version(source)
    names = source.names("qweight", "qzeros")
    layers = {name: _layer(source, name, version) for name in names}
    return source.model(layers, [key_of(name, part) for name in names for part in _PARTS])


def _version(source: Folder) -> int:
    """1 or 2; files without a format are older than version 2."""
    name = source.setting("format", str, "gptq").lower()
    if source.settings.get("is_marlin_format"):
        name = "marlin"
    if name not in VERSIONS:
        raise FormatError(
            f"{source.path} is in the layout {name!r:.60}; those that are read are "
            f"{', '.join(VERSIONS)}"
        )
    return VERSIONS[name]


def _sizes(source: Folder, name: str) -> tuple[int, int]:
    """Width and group_size of a layer, by the first pattern of ``dynamic`` that names it."""
    found: Mapping[str, Any] = {}
    for pattern, values in source.setting("dynamic", dict, {}).items():
        is_of_layers = not pattern.startswith("-:")  # others are left in float
        if is_of_layers and is_named(name, pattern.removeprefix("+:"), f"{source.path}: dynamic"):
            found = values if isinstance(values, Mapping) else {"bits": values}
            break
    bits = found.get("bits", source.setting("bits", int))
    group_size = found.get("group_size", source.setting("group_size", int, -1))
    if type(bits) is not int or bits not in WIDTHS:
        raise FormatError(f"{source.path}: {name} has {bits!r:.60} bits; allowed are {WIDTHS}")
    if type(group_size) is not int or (group_size < 1 and group_size != -1):
        raise FormatError(
            f"{source.path}: {name} has group_size {group_size!r:.60}; it must be 1 or more, or -1 "
            "for rows"
        )
    return bits, group_size


@dataclass(frozen=True)
class _Zeros:
    """Zero points, uint8 ``[groups, out]``, read each time they are asked for."""

    key: str
    stored: StoredTensor
    bits: int
    count: int
    version: int

    def __call__(self) -> torch.Tensor:
        words = self.stored.load()
        zeros = unpack_weights(words, self.bits, layout="dense", dim=1, size=self.count)
        if self.version == 2:
            return zeros
        if (zeros == (1 << self.bits) - 1).any():
            top = (1 << self.bits) - 1
            raise FormatError(
                f"{self.key} holds the code {top} in format 'gptq', which stores a zero point less "
                f"one: some programs read it as {top + 1}, some as 0, and some carry into its "
                "neighbour. Save the model in format 'gptq_v2', or symmetric"
            )
        return zeros.add_(1)


def _layer(source: Folder, name: str, version: int) -> StoredLayer:
    bits, group_size = _sizes(source, name)
    key = partial(key_of, name)
    qweight = source.tensor(key("qweight"), ("int32",), (None, None))
    cols, places = _columns(source, name, bits, qweight.shape[0])
    group, groups = groups_of(group_size, cols)
    scales = scales_of(source, name, groups)
    rows = scales.shape[1]
    source.tensor(key("qweight"), ("int32",), (None, rows))
    qzeros = source.tensor(key("qzeros"), ("int32",), (groups, containers(rows, bits)))
    order = IN_ORDER
    if places is not None:
        order = order_of(places.load(), group or max(cols, 1), groups, key("g_idx"))

    def codes() -> torch.Tensor:
        return unpack_weights(qweight.load(), bits, layout="dense", dim=0, size=cols)

    zeros = _Zeros(f"{source.path}: {key('qzeros')}", qzeros, bits, rows, version)
    return layer_of(source, bits, group, scales, cols, codes, zeros, order)


def _columns(source: Folder, name: str, bits: int, words: int) -> tuple[int, StoredTensor | None]:
    """How many columns there are, and ``g_idx`` if there is one."""
    key = key_of(name, "g_idx")
    cols = words * 32 // bits
    if key not in source.tensors:
        return cols, None
    places = source.tensor(key, ("int32", "int64"), (None,))
    if containers(places.shape[0], bits) != words:
        raise FormatError(
            f"{source.path}: {key} has {places.shape[0]} columns, and {key_of(name, 'qweight')} of "
            f"{bits} bits has {cols}"
        )
    return places.shape[0], places
