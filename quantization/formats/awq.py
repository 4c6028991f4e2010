"""AWQ checkpoints (AutoAWQ, GPTQModel, AutoRound, transformers) of version ``gemm``: read.

Of a layer of ``in`` features and ``out`` rows there are:

``qweight`` int32 ``[in, out / 8]``
    Eight codes of 4 bits each, of neighbouring rows in the order 0, 2, 4, 6, 1, 3, 5, 7, the first
    in the lowest bits. AutoRound's 5, 6 and 7 bits are one dense stream in that order.
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
from quantization.formats import auto_round
from quantization.formats.columns import groups_of, layer_of, scales_of, sizes_of
from quantization.formats.errors import FormatError
from quantization.formats.folders import Folder, open_folder
from quantization.numerics.weight_packing import unpack_weights

__all__ = ["read_awq"]

VERSION = "gemm"
_WIDTHS, _WIDTHS_OF_AUTO_ROUND = (4,), (4, 5, 6, 7)
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
    methods = ("awq", *auto_round.METHODS)
    source = open_folder(folder, methods, "quant_config.json", synonyms)
    is_auto_round = _is_auto_round(source)
    names = source.names("qweight", "qzeros")
    layers = {name: _layer(source, name, is_auto_round) for name in names}
    return source.model(layers, [key_of(name, part) for name in names for part in _PARTS])


def _is_auto_round(source: Folder) -> bool:
    packing = auto_round.packing_of(source)
    if packing is not None:
        if packing != auto_round.AWQ:
            raise FormatError(
                f"{source.path} was packed by AutoRound as GPTQ is: read it as 'gptq'"
            )
        return True
    source.setting("group_size", int)  # AutoAWQ always says it
    version = source.setting("format", str, VERSION).lower()
    if version != VERSION:
        raise FormatError(
            f"{source.path} is in the layout {version!r:.60}; {VERSION!r} is the one that is read"
        )
    return False


def _layer(source: Folder, name: str, is_auto_round: bool) -> StoredLayer:
    own = auto_round.own_settings(source, name) if is_auto_round else {}
    widths = _WIDTHS_OF_AUTO_ROUND if is_auto_round else _WIDTHS
    bits, group_size = sizes_of(source, name, own, widths)
    key = partial(key_of, name)
    qweight = source.tensor(key("qweight"), ("int32",), (None, None))
    cols, words = qweight.shape
    group, groups = groups_of(group_size, cols)
    qzeros = source.tensor(key("qzeros"), ("int32",), (groups, words))
    scales = scales_of(source, name, groups)
    rows = words * 32 // bits
    if scales.shape[1] != rows or rows % len(PLACES):
        raise FormatError(
            f"{source.path}: {key('scales')} has {scales.shape[1]} rows, and {key('qweight')} "
            f"of {bits} bits {words * 32 / bits:g}"
        )
    codes, zeros = partial(_unpacked, qweight, bits), partial(_unpacked, qzeros, bits)
    return layer_of(source, bits, group, scales, cols, codes, zeros)


def _unpacked(stored: StoredTensor, bits: int) -> torch.Tensor:
    """Codes in the order of their rows, uint8 ``[any, out]``."""
    codes = unpack_weights(stored.load(), bits, layout="dense", dim=1)
    return codes.view(len(codes), -1, len(PLACES))[:, :, list(PLACES)].reshape(codes.shape)
