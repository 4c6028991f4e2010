"""GPTQ checkpoints (AutoGPTQ, GPTQModel, AutoRound, transformers): read.

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

In format ``gptq_p`` (GPTQModel), the one of 5, 6 and 7 bits there, ``bits`` int32 hold 32 codes in
planes: first the low 4 bits of all (if codes have 4), then the next 2, then the last one. AutoRound
packs 5, 6 and 7 bits densely (:mod:`quantization.formats.auto_round`).

``w[n, k] = (code - zero) * scale``. The settings stand in ``config.json``
(``quantization_config``) or in ``quantize_config.json``.

Source: AutoGPTQ, ``auto_gptq/nn_modules/qlinear/qlinear_cuda.py`` and ``quantization/config.py``;
GPTQModel, ``gptqmodel/nn_modules/qlinear/__init__.py``, ``gptqmodel/utils/model.py`` (versions 1
and 2), ``gptqmodel/utils/planar_packing.py``, ``gptqmodel/quantization/config.py`` (``dynamic``).
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
from quantization.formats import auto_round
from quantization.formats.columns import groups_of, layer_of, scales_of, sizes_of
from quantization.formats.errors import FormatError
from quantization.formats.folders import Folder, containers, is_named, open_folder
from quantization.formats.integers import IN_ORDER, order_of
from quantization.numerics.weight_packing import unpack_weights

__all__ = ["read_gptq"]

VERSIONS = {"gptq": 1, "gptq_v2": 2, "gptq_p": 2}
_DENSE, _ALL = (2, 3, 4, 8), tuple(range(2, 9))
_BLOCK = 32  # codes whose planes stand together
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class _Packing:
    """How codes are packed.

    Attributes:
        version: 1: zero points are stored less one; 2: as they are.
        widths: those that are written so.
        is_planar: whether each 32 codes are parted into planes of bits.
    """

    version: int
    widths: tuple[int, ...] = _DENSE
    is_planar: bool = False

    def words(self, count: int, bits: int) -> int:
        """How many int32 hold so many codes."""
        return bits * -(-count // _BLOCK) if self.is_planar else containers(count, bits)

    def unpack(self, words: torch.Tensor, bits: int, dim: int, size: int) -> torch.Tensor:
        """Codes, uint8, with ``size`` of them along ``dim``."""
        if not self.is_planar:
            return unpack_weights(words, bits, layout="dense", dim=dim, size=size)
        codes = _of_planes(words if dim == 0 else words.t(), bits)[:size]
        return codes if dim == 0 else codes.t()


def _of_planes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 ``[codes, any]`` of ``[words, any]``: of each 32 codes first the low bits of all."""
    blocks = words.reshape(-1, bits, words.shape[1])
    codes, at = torch.zeros(len(blocks) * _BLOCK, words.shape[1], dtype=torch.uint8), 0
    for width in (8, 4, 2, 1):
        if bits & width:
            plane = blocks[:, at : at + width].reshape(-1, words.shape[1])
            codes |= unpack_weights(plane, width, layout="dense", dim=0) << at
            at += width
    return codes


def read_gptq(folder: str | os.PathLike[str]) -> StoredModel:
    """A GPTQ model, lossless: 2..8 bits, with zero points or symmetric, by group or row.

    AutoRound's too, where it is packed so.

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
    methods = ("gptq", *auto_round.METHODS)
    source = open_folder(folder, methods, "quantize_config.json", synonyms)
    packing = _packing(source)
    names = source.names("qweight", "qzeros")
    layers = {name: _layer(source, name, packing) for name in names}
    return source.model(layers, [key_of(name, part) for name in names for part in _PARTS])


def _packing(source: Folder) -> _Packing:
    """Files without a format are older than version 2."""
    name = auto_round.packing_of(source)
    if name is not None:
        if name == auto_round.AWQ:
            raise FormatError(f"{source.path} was packed by AutoRound as AWQ is: read it as 'awq'")
        return _Packing(VERSIONS[name], _ALL)
    name = source.setting("format", str, "gptq").lower()
    if source.settings.get("is_marlin_format"):
        name = "marlin"
    if name not in VERSIONS:
        raise FormatError(
            f"{source.path} is in the layout {name!r:.60}; those that are read are "
            f"{', '.join(VERSIONS)}"
        )
    is_planar = name == "gptq_p"
    return _Packing(VERSIONS[name], _ALL if is_planar else _DENSE, is_planar)


def _own_settings(source: Folder, name: str) -> Mapping[str, Any]:
    """Of a layer, by the first pattern of ``dynamic`` that names it."""
    if source.settings["quant_method"] in auto_round.METHODS:
        return auto_round.own_settings(source, name)
    for pattern, values in source.setting("dynamic", dict, {}).items():
        is_of_layers = not pattern.startswith("-:")  # others are left in float
        if is_of_layers and is_named(name, pattern.removeprefix("+:"), f"{source.path}: dynamic"):
            return values if isinstance(values, Mapping) else {"bits": values}
    return {}


@dataclass(frozen=True)
class _Zeros:
    """Zero points, uint8 ``[groups, out]``, read each time they are asked for."""

    key: str
    stored: StoredTensor
    bits: int
    count: int
    packing: _Packing

    def __call__(self) -> torch.Tensor:
        zeros = self.packing.unpack(self.stored.load(), self.bits, 1, self.count)
        if self.packing.version == 2:
            return zeros
        if (zeros == (1 << self.bits) - 1).any():
            top = (1 << self.bits) - 1
            raise FormatError(
                f"{self.key} holds the code {top} in format 'gptq', which stores a zero point less "
                f"one: some programs read it as {top + 1}, some as 0, and some carry into its "
                "neighbour. Save the model in format 'gptq_v2', or symmetric"
            )
        return zeros.add_(1)


def _layer(source: Folder, name: str, packing: _Packing) -> StoredLayer:
    bits, group_size = sizes_of(source, name, _own_settings(source, name), packing.widths)
    key = partial(key_of, name)
    qweight = source.tensor(key("qweight"), ("int32",), (None, None))
    cols, places = _columns(source, name, bits, qweight.shape[0], packing)
    group, groups = groups_of(group_size, cols)
    scales = scales_of(source, name, groups)
    rows = scales.shape[1]
    source.tensor(key("qweight"), ("int32",), (packing.words(cols, bits), rows))
    qzeros = source.tensor(key("qzeros"), ("int32",), (groups, packing.words(rows, bits)))
    order = IN_ORDER
    if places is not None:
        order = order_of(places.load(), group or max(cols, 1), groups, key("g_idx"))

    def codes() -> torch.Tensor:
        return packing.unpack(qweight.load(), bits, 0, cols)

    zeros = _Zeros(f"{source.path}: {key('qzeros')}", qzeros, bits, rows, packing)
    return layer_of(source, bits, group, scales, cols, codes, zeros, order)


def _columns(
    source: Folder, name: str, bits: int, words: int, packing: _Packing
) -> tuple[int, StoredTensor | None]:
    """How many columns there are, and ``g_idx`` if there is one."""
    key = key_of(name, "g_idx")
    cols = words * 32 // bits
    if key not in source.tensors:
        return cols, None
    places = source.tensor(key, ("int32", "int64"), (None,))
    if packing.words(places.shape[0], bits) != words:
        raise FormatError(
            f"{source.path}: {key} has {places.shape[0]} columns, and {key_of(name, 'qweight')} of "
            f"{bits} bits has {cols}"
        )
    return places.shape[0], places
