"""AWQ checkpoints (AutoAWQ, GPTQModel, transformers) of version ``gemm``: read.

Of a layer of ``in`` features and ``out`` rows there are:

``qweight`` int32 ``[in, out / 8]``
    Eight codes of 4 bits each, of neighbouring rows in the order 0, 2, 4, 6, 1, 3, 5, 7, the first
    in the lowest bits.
``qzeros`` int32 ``[in / group_size, out / 8]``
    Zero points in the same order, as they are.
``scales`` ``[in / group_size, out]``
    Floats.

``w[n, k] = (code - zero) * scale``. The settings stand in ``config.json``
(``quantization_config``) or in ``quant_config.json``.

Source: AutoAWQ, ``awq/modules/linear/gemm.py``, ``awq/utils/packing_utils.py`` and
``awq/models/_config.py``.
"""

from __future__ import annotations

import os
from functools import partial

import torch

from quantization.checkpoint.disk.stored_tensor import StoredTensor, key_of
from quantization.checkpoint.stored_model import StoredLayer, StoredModel
from quantization.formats.columns import groups_of, layer_of, scales_of
from quantization.formats.errors import FormatError
from quantization.formats.folders import Folder, open_folder
from quantization.numerics.weight_packing import unpack_weights

__all__ = ["read_awq"]

BITS, VERSION = 4, "gemm"
#: Where the codes of rows 0..7 stand in their int32.
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
_PARTS = ("qweight", "qzeros", "scales")


def read_awq(folder: str | os.PathLike[str]) -> StoredModel:
    """An AWQ model, lossless.

    Zero points are read now, weights when they are asked for. The scales by which AWQ weighs
    activations are part of the other weights already.

    Args:
        folder: with safetensors files and settings.

    Raises:
        FileNotFoundError: if it is no folder, or has no safetensors files.
        quantization.checkpoint.disk.safetensors_files.CheckpointError: if a file is broken.
        FormatError: for a tensor that is missing or of another form, another width than 4 bits and
            another version than ``gemm`` (gemv, marlin).

    Example:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> from safetensors.torch import save_file
        >>> tensors = {  # rows 0..7 have the codes 0..7 around 2
        ...     "up.qweight": torch.full((64, 1), 0x75316420, dtype=torch.int32),
        ...     "up.qzeros": torch.full((2, 1), 0x22222222, dtype=torch.int32),
        ...     "up.scales": torch.ones(2, 8, dtype=torch.float16),
        ... }
        >>> with tempfile.TemporaryDirectory() as place:
        ...     save_file(tensors, f"{place}/model.safetensors")
        ...     settings = {"w_bit": 4, "q_group_size": 32, "version": "GEMM"}
        ...     _ = Path(f"{place}/quant_config.json").write_text(json.dumps(settings))
        ...     layer = read_awq(place).layers["up"]
        ...     str(layer.scheme), layer.load().dequantize()[:, 0].tolist()
        ('w4g32a', [-2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    """
    synonyms = {"version": "format", "w_bit": "bits", "q_group_size": "group_size"}
    source = open_folder(folder, "awq", "quant_config.json", synonyms)
    group_size = _group_size(source)
    names = source.names("qweight", "qzeros")
    layers = {name: _layer(source, name, group_size) for name in names}
    return source.model(layers, [key_of(name, part) for name in names for part in _PARTS])


def _group_size(source: Folder) -> int:
    bits = source.setting("bits", int)
    version = source.setting("format", str, VERSION).lower()
    if bits != BITS or version != VERSION:
        raise FormatError(
            f"{source.path} has {bits} bits in the layout {version!r:.60}; {BITS} bits in "
            f"{VERSION!r} are read"
        )
    group_size = source.setting("group_size", int)
    if group_size < 1 and group_size != -1:
        raise FormatError(
            f"{source.path} has group_size {group_size}; it must be 1 or more, or -1 for rows"
        )
    return group_size


def _layer(source: Folder, name: str, group_size: int) -> StoredLayer:
    key = partial(key_of, name)
    qweight = source.tensor(key("qweight"), ("int32",), (None, None))
    cols, words = qweight.shape
    group, groups = groups_of(group_size, cols)
    qzeros = source.tensor(key("qzeros"), ("int32",), (groups, words))
    scales = scales_of(source, name, groups)
    if scales.shape[1] != words * len(PLACES):
        raise FormatError(
            f"{source.path}: {key('scales')} has {scales.shape[1]} rows, and {key('qweight')} "
            f"{words * len(PLACES)}"
        )
    codes, zeros = partial(_unpacked, qweight), partial(_unpacked, qzeros)
    return layer_of(source, BITS, group, scales, cols, codes, zeros)


def _unpacked(stored: StoredTensor) -> torch.Tensor:
    """Codes in the order of their rows, uint8 ``[any, out]``."""
    codes = unpack_weights(stored.load(), BITS, layout="dense", dim=1)
    return codes.view(len(codes), -1, len(PLACES))[:, :, list(PLACES)].reshape(codes.shape)
