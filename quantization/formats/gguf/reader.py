"""Out of a GGUF file: layers, tensors and config of a model, read when they are asked for."""

from __future__ import annotations

import functools
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from quantization.checkpoint.disk.stored_tensor import StoredTensor
from quantization.checkpoint.stored_model import KINDS, StoredLayer, StoredModel
from quantization.formats.errors import FormatError
from quantization.formats.gguf.blocks import TYPES
from quantization.formats.gguf.config import config_of, sizes_in
from quantization.formats.gguf.header import FileTensor, Header, read_header
from quantization.formats.gguf.names import EMBEDDING, HEAD, Names, architecture_named
from quantization.formats.gguf.packed import packed_of
from quantization.ops.dtypes import SOURCES, source_of
from quantization.ops.extras import need
from quantization.schemes.packed_weights import PackedWeights, pack_matrix
from quantization.schemes.scheme import Scheme, scheme_of

__all__ = ["PLAIN", "PLAIN_KEY", "ROPE", "read_gguf"]

#: The architecture of files without one, and where they say what their layers are.
PLAIN, PLAIN_KEY = "plain", "quantization.model"
#: The factors of rotary angles, which belong to the config.
ROPE = "rope_freqs.weight"

_PIECES = "split.count"
_NUMBERS = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F64": "float64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
}

_log = logging.getLogger("quantization")


class _Place(NamedTuple):
    """A tensor of a file, its key in a state dict, and the order that its rows are to have."""

    tensor: FileTensor
    key: str
    order: np.ndarray | None

    @property
    def type(self) -> str:
        """As ggml calls it."""
        return self.tensor.type

    @property
    def shape(self) -> tuple[int, ...]:
        """As torch has it."""
        return self.tensor.shape

    def ordered(self, rows: Any) -> Any:
        """Rows, of an array or a tensor, in the order of the model."""
        return rows if self.order is None else rows[self.order]


def read_gguf(
    path: str | os.PathLike[str],
    *,
    plain: bool = False,
    dtype: Any = None,
    fallback: Scheme | str = "w8g32",
) -> StoredModel:
    """A model out of a GGUF file: packed layers, other tensors, and the config of transformers.

    The file is mapped, and numbers are read when they are asked for. Which types are read exactly
    is written at the head of :mod:`quantization.formats.gguf.blocks`. Other types of llama.cpp
    (IQ1, IQ2, IQ3, NVFP4) are restored by gguf and packed anew; the logger ``quantization`` says
    which, and with what error.

    Args:
        path: of the file, version 2 or 3, in one piece.
        plain: take tensors by the names that they have, and make no config. Files that
            :func:`write_gguf` wrote so are read so in any case.
        dtype: of all floats: float32, float64, float16 or bfloat16, the last two with zero points
            rounded; None: float32, and by the names they have each as it is stored.
        fallback: the scheme of what is packed anew.

    Raises:
        ImportError: if gguf is not installed.
        FormatError: if the file is damaged, of an unknown architecture (the known ones are named),
            or says what cannot be read.

    Source: the format's description at github.com/ggml-org/ggml, docs/gguf.md.

    Example:
        >>> stored = read_gguf("SmolLM2-135M-Instruct.Q4_1.gguf")  # doctest: +SKIP
        >>> str(stored.layers["model.layers.0.mlp.up_proj"].scheme)  # doctest: +SKIP
        'w4g32af+f16'
    """
    kept = None if dtype is None else source_of(dtype, "a GGUF model").name
    fallback, header = scheme_of(fallback), read_header(path)
    if plain or header.facts.get("general.architecture") == PLAIN:
        return _plain_model(header, kept, fallback)
    return _model(header, kept or "float32", fallback)


def _model(header: Header, dtype: str, fallback: Scheme) -> StoredModel:
    facts, found = header
    architecture = architecture_named(facts.get("general.architecture"))
    if facts.get(_PIECES, 1) != 1:
        raise FormatError(
            f"the file is one of {facts[_PIECES]} pieces; llama.cpp's gguf-split --merge joins them"
        )
    names = Names(architecture, *sizes_in(facts, architecture.name, len(found)))
    places, factors = [], None
    for tensor in found:
        if tensor.name == ROPE:
            factors = tensor.data.reshape(-1)
            continue
        key = names.in_model(tensor.name)
        rows = tensor.shape[0] if tensor.shape else 1
        places.append(_Place(tensor, key, names.order(key, rows, into_file=False)))
    shapes = {place.key: place.shape for place in places}
    names.check_complete(shapes)
    config = config_of(facts, architecture, shapes, factors) | {"dtype": dtype}
    kinds = {EMBEDDING: {"kind": "embedding", "more": {"padding_idx": config["pad_token_id"]}}}
    layers, tensors = _contents(places, kinds, dtype, fallback)
    ties = _tie_head(layers, tensors) if config["tie_word_embeddings"] else {}
    return StoredModel(layers, tensors, ties, config)


def _plain_model(header: Header, dtype: str | None, fallback: Scheme) -> StoredModel:
    try:
        told = json.loads(header.facts.get(PLAIN_KEY, "{}"))
        kinds, ties = dict(told.get("layers", {})), dict(told.get("ties", {}))
        for name, each in kinds.items():
            is_known = each["kind"] in KINDS and each["dtype"] in SOURCES
            if not is_known or not _are_more(each.get("more", {})):
                raise ValueError(f"{name} is {each}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FormatError(f"the metadata {PLAIN_KEY} is damaged: {error}") from None
    places = [_Place(tensor, tensor.name, None) for tensor in header.tensors]
    layers, tensors = _contents(places, kinds, dtype, fallback)
    for key, first in ties.items():
        if _form_in(layers, tensors, key) != _form_in(layers, tensors, first):
            raise FormatError(
                f"the metadata {PLAIN_KEY} is damaged: it ties {key!r:.80} to {first!r:.80}, which "
                "is no tensor of that form in the file"
            )
    return StoredModel(layers, tensors, ties)


def _are_more(more: Any) -> bool:
    """Whether it is what a layer may have besides its weight."""
    known = {"padding_idx": (int, type(None)), "was_conv1d": (bool,)}
    return isinstance(more, dict) and all(type(more[n]) in known.get(n, ()) for n in more)


def _form_in(
    layers: Mapping[str, StoredLayer], tensors: Mapping[str, StoredTensor], key: Any
) -> Any:
    """What tied tensors have in common: shape and dtype, or scheme and part; else like no other."""
    if not isinstance(key, str):
        return object()
    if key in tensors:
        return tensors[key].shape, tensors[key].dtype
    name, _, part = key.rpartition(".")
    return (layers[name].shape, layers[name].scheme, part) if name in layers else object()


def _tie_head(layers: dict[str, StoredLayer], tensors: dict[str, StoredTensor]) -> dict[str, str]:
    """Make the head of the embedding, where a file has but one of them; what is tied."""
    if EMBEDDING in layers:
        table = layers[EMBEDDING]
        load = functools.cache(table.load)  # the same tensors for both
        layers[EMBEDDING] = StoredLayer(
            "embedding", table.scheme, table.shape, table.dtype, load, table.more
        )
        layers[HEAD] = StoredLayer("linear", table.scheme, table.shape, table.dtype, load)
        parts = table.scheme.buffers(table.shape)
    else:
        tensors[f"{HEAD}.weight"] = tensors[f"{EMBEDDING}.weight"]
        parts = {"weight": None}
    return {f"{HEAD}.{part}": f"{EMBEDDING}.{part}" for part in parts}


# ---- layers and tensors ------------------------------------------------------------------------


def _contents(
    places: list[_Place],
    kinds: Mapping[str, Mapping[str, Any]],
    dtype: str | None,
    fallback: Scheme,
) -> tuple[dict[str, StoredLayer], dict[str, StoredTensor]]:
    layers: dict[str, StoredLayer] = {}
    tensors: dict[str, StoredTensor] = {}
    anew: Counter[str] = Counter()
    for place in places:
        name, _, last = place.key.rpartition(".")
        if place.type in _NUMBERS:
            tensors[place.key] = _tensor(place, dtype)
        elif last == "weight" and len(place.shape) == 2:
            layers[name] = _layer(place, kinds.get(name, {}), dtype, fallback)
            anew[place.type] += place.type not in TYPES
        else:
            _check_dequantizer(place)
            kept = dtype or "float32"
            load = functools.partial(_restored, place, kept)
            tensors[place.key] = StoredTensor(place.shape, kept, load)
    for kind, count in anew.items():
        if count:
            _log.warning(
                "%d tensors of %s have no scheme: packed anew as %s", count, kind, fallback
            )
    return layers, tensors


def _tensor(place: _Place, dtype: str | None) -> StoredTensor:
    stored = _NUMBERS[place.type]
    kept = stored if dtype is None or stored.startswith("int") else dtype

    def load() -> torch.Tensor:
        data = place.tensor.data
        numbers = torch.from_numpy(data.view("int16") if stored == "bfloat16" else data)
        if stored == "bfloat16":
            numbers = numbers.view(torch.bfloat16)
        return place.ordered(numbers).to(getattr(torch, kept))

    return StoredTensor(place.shape, kept, load)


def _layer(
    place: _Place, told: Mapping[str, Any], dtype: str | None, fallback: Scheme
) -> StoredLayer:
    kept = dtype or told.get("dtype", "float32")
    kind, more = told.get("kind", "linear"), told.get("more", {})
    kind = "linear" if kind == "int8_linear" else kind
    load: Callable[[], PackedWeights]
    if place.type in TYPES:
        scheme = Scheme.parse(TYPES[place.type].scheme)
        load = functools.partial(_packed, place, kept)
    else:
        _check_dequantizer(place)
        scheme, load = fallback, functools.partial(_packed_anew, place, kept, fallback)
    return StoredLayer(kind, scheme, place.shape, kept, load, more)


def _packed(place: _Place, dtype: str) -> PackedWeights:
    return packed_of(place.ordered(place.tensor.data), TYPES[place.type], place.key, dtype)


def _packed_anew(place: _Place, dtype: str, scheme: Scheme) -> PackedWeights:
    weight = _restored(place, dtype)
    try:
        packed = pack_matrix(weight, scheme, name=place.key)
    except ValueError as error:
        raise FormatError(f"{place.key} ({place.type}) cannot be packed anew: {error}") from None
    loss = (packed.dequantize("float32") - weight.float()).norm() / weight.float().norm()
    _log.warning("%s: %s packed anew as %s, error %.2g", place.key, place.type, scheme, loss)
    return packed


def _restored(place: _Place, dtype: str) -> torch.Tensor:
    gguf = need("gguf", "gguf")
    numbers = gguf.dequantize(place.tensor.data, gguf.GGMLQuantizationType[place.type])
    return torch.from_numpy(place.ordered(numbers)).to(getattr(torch, dtype))


def _check_dequantizer(place: _Place) -> None:
    gguf = need("gguf", "gguf")
    kind = gguf.GGMLQuantizationType[place.type]
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), "uint8"), kind)
    except NotImplementedError as error:
        raise FormatError(f"{place.key} is {place.type}, which gguf cannot restore") from error
