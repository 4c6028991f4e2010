"""GGUF, the file of llama.cpp: read into a StoredModel, and written out of one.

The package gguf has the container and the metadata, :mod:`quantization.formats.gguf.blocks` the
blocks, with a table of which scheme each type of block is. Written are, for the layers,

===========================================  ===================================================
scheme                                       type of block
===========================================  ===================================================
``w8g32+f16``, ``w6g64+f16``, ``w8+f16``     Q8_0
``w5g32+f16``, ``w4g32a+f16``                Q5_0
``w4g32+f16``, ``w3g128+f16``, ``w4+f16``    Q4_0
``w4g32af+f16``, ``w5g32af+f16``             Q4_1, Q5_1
``ternaryg256+f16``, ``ternary+f16``         TQ1_0, or TQ2_0 on request; Q4_0 where rows are short
``mxfp4``                                    MXFP4
===========================================  ===================================================

without changing a number, or not at all: scales and minima are float16 in such files, so schemes
need ``+f16``, and float zero points hardly ever fit; ``allow_rounding=True`` rounds them, and the
report says how far. What is not quantized stays float: F32, F16, BF16. Of a known architecture
(llama with mistral, qwen2, qwen3) names, order of rows, config and tokenizer are llama.cpp's, and
transformers opens the file (``from_pretrained(folder, gguf_file=...)``); ``plain=True`` writes and
reads tensors of any model by the names they have.
"""

from __future__ import annotations

import fnmatch
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from quantization.checkpoint.disk.files import new_file
from quantization.checkpoint.disk.stored_tensor import StoredTensor, key_of
from quantization.checkpoint.stored_model import StoredLayer, StoredModel
from quantization.formats.errors import FormatError
from quantization.formats.gguf.blocks import TYPES
from quantization.formats.gguf.config import rope_factors, sizes_of, write_config
from quantization.formats.gguf.names import EMBEDDING, HEAD, Names, architecture_for
from quantization.formats.gguf.packed import blocks_of
from quantization.formats.gguf.reader import PLAIN, PLAIN_KEY, ROPE, read_gguf
from quantization.formats.gguf.tokenizer import save_tokenizer, write_tokenizer
from quantization.formats.gguf.types import type_for
from quantization.ops.extras import need

__all__ = ["WrittenTensor", "read_gguf", "save_tokenizer", "write_gguf"]

_FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
_INTEGERS = {"int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64"}
_OF_LAYERS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class WrittenTensor(NamedTuple):
    """A tensor as it went into a file.

    Attributes:
        name: in the file.
        key: in a state dict.
        type: of its blocks or numbers, as ggml calls it.
        moved: how far a number of it may have moved; 0.0 where none did.
    """

    name: str
    key: str
    type: str
    moved: float


class _Entry(NamedTuple):
    """A tensor that is to be written: ``make`` gives its numbers, and how far they moved."""

    name: str
    key: str
    type: str
    shape: tuple[int, ...]  # of what is written: bytes, where it is blocks
    dtype: np.dtype
    make: Callable[[], tuple[np.ndarray, float]]


def write_gguf(
    stored: StoredModel,
    path: str | os.PathLike[str],
    *,
    plain: bool = False,
    types: Mapping[str, str] | None = None,
    allow_rounding: bool = False,
    overwrite: bool = False,
) -> tuple[WrittenTensor, ...]:
    """Write a model as a GGUF file: the whole file, or none.

    One tensor at a time is in memory.

    Args:
        stored: the model; its config says which architecture it is of, its assets may hold a
            ``tokenizer.json``.
        path: of the file.
        plain: write tensors under the names that they have, without an architecture, with kinds of
            layers and ties beside them. Such a file is for :func:`read_gguf`.
        types: types of blocks, or F32, F16, BF16, by patterns over names of layers (``"*"``,
            ``"lm_head"``), of which the first that matches counts; None: the smallest type that
            holds the scheme of the layer.
        allow_rounding: whether numbers that a type does not hold may be rounded to it.
        overwrite: whether a file at ``path`` may be replaced.

    Returns:
        What was written, tensor by tensor.

    Raises:
        ImportError: if gguf is not installed.
        FileExistsError: if a file is there, without ``overwrite``.
        FormatError: if a layer or tensor has no place in such a file; the message names it, its
            scheme, the reason and what would do.
        ValueError: for a pattern of ``types`` that names no layer.

    Source: the format's description at github.com/ggml-org/ggml, docs/gguf.md.

    Example:
        >>> from quantization import quantize_model
        >>> from quantization.checkpoint.stored_model import stored_model
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False))
        >>> _ = quantize_model(model, "w8g32+f16")
        >>> write_gguf(stored_model(model), "model.gguf", plain=True)  # doctest: +SKIP
        (WrittenTensor(name='0.weight', key='0.weight', type='Q8_0', moved=0.0),)
    """
    gguf = need("gguf", "gguf")
    wanted = _wanted_types(stored, types or {})
    names = None if plain else _names_of(stored)
    entries = list(_entries(stored, names, wanted, allow_rounding))
    with new_file(path, overwrite=overwrite) as temporary:
        architecture = PLAIN if plain else architecture_for(stored.config).name
        writer = gguf.GGUFWriter(temporary, architecture)
        try:
            _write_metadata(writer, stored, entries, Path(path).stem, plain)
            return tuple(_write_tensors(writer, entries))
        finally:
            writer.close()


def _names_of(stored: StoredModel) -> Names:
    """Names of a whole model of a known architecture."""
    architecture = architecture_for(stored.config)
    names = Names(architecture, *sizes_of(stored.config or {}))
    names.check_complete([*stored.tensors, *(f"{name}.weight" for name in stored.layers)])
    return names


def _wanted_types(stored: StoredModel, types: Mapping[str, str]) -> dict[str, str]:
    """The type that is asked for, by name of layer."""
    allowed = [*_OF_LAYERS, *(kind.name for kind in TYPES.values() if kind.encode)]
    wanted: dict[str, str] = {}
    for pattern, kind in types.items():
        if kind not in allowed:
            raise FormatError(f"types says {kind!r} for {pattern!r}; allowed are {allowed}")
        matched = fnmatch.filter(stored.layers, pattern)
        if not matched:
            raise ValueError(f"the pattern {pattern!r} of types matches no quantized layer")
        for name in matched:
            wanted.setdefault(name, kind)
    return wanted


# ---- what is to be written ---------------------------------------------------------------------


def _entries(
    stored: StoredModel, names: Names | None, wanted: Mapping[str, str], allow_rounding: bool
) -> Iterator[_Entry]:
    left = () if names is None else _tied_head(stored)
    for name, layer in stored.layers.items():
        key = key_of(name, "weight")
        if key not in left:
            entry = _layer_entry(name or "the model", layer, wanted.get(name), allow_rounding)
            yield _placed(entry._replace(name=key, key=key), names)
    for key, tensor in stored.tensors.items():
        if key not in left:
            yield _placed(_tensor_entry(key, tensor, names is None, allow_rounding), names)
    factors = None if names is None else rope_factors(stored.config or {})
    if factors is not None:
        yield _Entry(ROPE, ROPE, "F32", factors.shape, factors.dtype, lambda: (factors, 0.0))


def _tied_head(stored: StoredModel) -> tuple[str, ...]:
    """The key of the head, if it is the embedding: such a file leaves it out."""
    ends = [{key.rpartition(".")[0] for key in pair} for pair in stored.ties.items()]
    return (f"{HEAD}.weight",) if {HEAD, EMBEDDING} in ends else ()


def _placed(entry: _Entry, names: Names | None) -> _Entry:
    """With the name and the order of rows that it has in a file."""
    if names is None:
        return entry
    order = names.order(entry.key, entry.shape[0] if entry.shape else 1, into_file=True)
    make = entry.make if order is None else lambda: _in_order(entry.make(), order)
    return entry._replace(name=names.in_file(entry.key), make=make)


def _in_order(made: tuple[np.ndarray, float], order: np.ndarray) -> tuple[np.ndarray, float]:
    return made[0][order], made[1]


def _layer_entry(name: str, layer: StoredLayer, wanted: str | None, allow_rounding: bool) -> _Entry:
    rows, cols = layer.shape
    if wanted in _OF_LAYERS:
        shape, dtype = (rows, cols), _dtype_of(wanted)

        def make() -> tuple[np.ndarray, float]:
            return _floats(layer.load().dequantize("float32"), wanted, name, allow_rounding)

        return _Entry(name, name, wanted, shape, dtype, make)
    kind = type_for(layer.scheme, cols, name, wanted)
    shape = (rows, cols // kind.length * kind.nbytes)
    return _Entry(
        name,
        name,
        kind.name,
        shape,
        np.dtype("uint8"),
        lambda: blocks_of(layer.load(), kind, name, allow_rounding),
    )


def _tensor_entry(key: str, tensor: StoredTensor, plain: bool, allow_rounding: bool) -> _Entry:
    """A tensor in a type of GGUF; vectors of a known architecture are F32, as in llama.cpp."""
    kind = (_FLOATS | _INTEGERS).get(tensor.dtype)
    is_narrow = not plain and (len(tensor.shape) < 2 or kind == "F64")
    if kind in _FLOATS.values() and (is_narrow or (kind == "BF16" and not tensor.shape)):
        kind = "F32"
    if kind is None:
        allowed = ", ".join(_FLOATS | _INTEGERS)
        raise FormatError(f"{key} is {tensor.dtype}; GGUF has {allowed}")
    if len(tensor.shape) > 4:
        raise FormatError(f"{key} has {len(tensor.shape)} dimensions; GGUF has up to 4")

    def make() -> tuple[np.ndarray, float]:
        if kind in _INTEGERS.values():
            return tensor.load().cpu().numpy(), 0.0
        return _floats(tensor.load(), kind, key, allow_rounding)

    return _Entry(key, key, kind, tensor.shape, _dtype_of(kind), make)


def _dtype_of(kind: str) -> np.dtype:
    names = {short: name for name, short in (_FLOATS | _INTEGERS).items()}
    return np.dtype("uint16" if kind == "BF16" else names[kind])


def _floats(
    numbers: torch.Tensor, kind: str, name: str, allow_rounding: bool
) -> tuple[np.ndarray, float]:
    """Numbers in a float type, bfloat16 as its bits, and how far they moved."""
    dtypes = {short: getattr(torch, dtype) for dtype, short in _FLOATS.items()}
    numbers = numbers.detach().cpu()
    cast, moved = numbers.to(dtypes[kind]), 0.0
    if torch.promote_types(cast.dtype, numbers.dtype) != cast.dtype and cast.numel():
        moves = (cast.double() - numbers.double()).abs()
        moved = float(moves.nan_to_num(nan=0.0, posinf=np.inf).max())
        if moved and not (allow_rounding and np.isfinite(moved)):
            raise FormatError(
                f"{name} has numbers that {kind} does not hold; allow_rounding=True rounds them"
            )
    if kind == "BF16":
        return cast.view(torch.int16).numpy().view("uint16"), moved
    return cast.numpy(), moved


# ---- writing -----------------------------------------------------------------------------------


def _write_metadata(
    writer: Any, stored: StoredModel, entries: list[_Entry], name: str, plain: bool
) -> None:
    gguf = need("gguf", "gguf")
    writer.add_type("model")
    writer.add_name(name)
    counts = Counter(entry.type for entry in entries if len(entry.shape) == 2)
    most = counts.most_common(1)[0][0] if counts else "F32"
    by_name = {"F32": "ALL_F32", "MXFP4": "MOSTLY_MXFP4_MOE"}
    file_type = getattr(gguf.LlamaFileType, by_name.get(most, f"MOSTLY_{most}"), None)
    if file_type is not None:
        writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if plain:
        writer.add_string(PLAIN_KEY, json.dumps(_description_of(stored)))
    else:
        write_config(writer, stored.config or {})
        write_tokenizer(writer, stored.assets, stored.config or {})


def _description_of(stored: StoredModel) -> dict[str, Any]:
    """What a file without an architecture says about a model, for JSON."""
    layers = {
        name: {"kind": layer.kind, "dtype": layer.dtype, "more": dict(layer.more)}
        for name, layer in stored.layers.items()
    }
    return {"layers": layers, "ties": dict(stored.ties)}


def _write_tensors(writer: Any, entries: list[_Entry]) -> Iterator[WrittenTensor]:
    gguf = need("gguf", "gguf")
    for entry in entries:
        kind = gguf.GGMLQuantizationType[entry.type]
        size = int(np.prod(entry.shape, dtype=np.int64)) * entry.dtype.itemsize
        writer.add_tensor_info(entry.name, entry.shape, entry.dtype, size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries:
        numbers, moved = entry.make()
        writer.write_tensor_data(np.ascontiguousarray(numbers))
        yield WrittenTensor(entry.name, entry.key, entry.type, moved)
