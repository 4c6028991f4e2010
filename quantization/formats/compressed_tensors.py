"""compressed-tensors checkpoints, which vLLM serves and llm-compressor makes: read and written.

``pack-quantized`` stores, of a linear layer of ``out`` rows and ``in`` columns, as int32 that hold
one dense stream of codes, the first in the lowest bits, and ``code = q + 2**(bits - 1)``:

``weight_packed`` ``[out, ceil(in * bits / 32)]``
    Codes along the rows.
``weight_scale`` ``[out, groups]``
    Floats.
``weight_shape`` int64 ``[2]``
    ``out`` and ``in``.
``weight_zero_point`` ``[ceil(out * bits / 32), groups]``
    Of an asymmetric layer: zero points, packed down the columns.
``weight_g_idx`` int32 ``[in]``
    Of a layer in act-order: the group of each column. Only read: later versions of the library
    refuse it.

``mxfp4-pack-quantized``, which is only read, has two E2M1 floats in each uint8 of ``weight_packed``
``[out, in / 2]``, the first in the low bits, and exponents ``weight_scale``, uint8
``[out, in / 32]``.
``int-quantized``, which is only read, has int8 ``weight`` and ``weight_zero_point`` instead, of
plain ``q``. ``w[n, k] = (q - zero) * scale``; :mod:`quantization.formats.compressed_config` has the
settings.

Source: compressed-tensors, ``compressed_tensors/compressors/pack_quantized`` and
``naive_quantized``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import torch

from quantization.checkpoint.disk.files import new_folder
from quantization.checkpoint.disk.stored_tensor import StoredTensor, key_of
from quantization.checkpoint.stored_model import StoredLayer, StoredModel
from quantization.checkpoint.writing import MAX_SHARD_BYTES, plan_shards, write_beside, write_shard
from quantization.formats.compressed_config import (
    INT,
    METHOD,
    MXFP4,
    PACKED,
    WIDTHS,
    WeightForm,
    group_of,
    groups_from,
    settings_of,
)
from quantization.formats.compressed_experts import is_of_expert, with_family_names
from quantization.formats.errors import FormatError
from quantization.formats.folders import (
    SETTINGS,
    Folder,
    containers,
    granularity_of,
    open_folder,
)
from quantization.formats.integers import (
    IN_ORDER,
    Integers,
    Order,
    integers_of,
    order_of,
    packed_of,
    why_not,
    width_of,
)
from quantization.numerics.granularity import Granularity, PerGroup
from quantization.numerics.parameters import Mode
from quantization.numerics.weight_packing import pack_weights, unpack_weights
from quantization.ops.dtypes import SOURCES
from quantization.schemes.checks import MX_GROUP
from quantization.schemes.codebooks import E2M1
from quantization.schemes.packed_weights import PackedWeights
from quantization.schemes.scheme import Scheme

__all__ = ["read_compressed_tensors", "write_compressed_tensors"]

_PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
_ACTIVATIONS = tuple(
    f"{place}_{part}" for place in ("input", "output") for part in ("scale", "zero_point")
)
_EXPONENTS = ("uint8", "float8_e8m0fnu")
_HEAD = "lm_head"
_log = logging.getLogger("quantization")


# ---- read ------------------------------------------------------------------------------------


def read_compressed_tensors(folder: str | os.PathLike[str]) -> StoredModel:
    """A ``pack-quantized``, ``int-quantized`` or ``mxfp4-pack-quantized`` model, lossless.

    Weights are read when they are asked for.

    If the settings quantize activations or the cache of keys and values too, those stay float here,
    and a warning of the logger ``quantization`` says so.

    Args:
        folder: with safetensors files and a ``config.json``.

    Raises:
        FileNotFoundError: if it is no folder, or has no safetensors files.
        quantization.checkpoint.disk.safetensors_files.CheckpointError: if a file is broken.
        FormatError: for a tensor that is missing or of another form, and settings that are not
            understood; the message names the tensor.

    Example: see :func:`write_compressed_tensors`.
    """
    source = open_folder(folder, METHOD)
    groups = groups_from(source.settings, f"{source.path}")
    layers: dict[str, StoredLayer] = {}
    used: list[str] = []
    has_activations = False
    for name in source.names("weight_packed", "weight_scale"):
        group = group_of(name, groups, f"{source.path}")
        layers[name] = _READERS[group.layout](source, name, group.form)
        parts = ("weight", *_PARTS) if group.layout == INT else _PARTS
        used += [key_of(name, part) for part in (*parts, *_ACTIVATIONS)]
        has_activations |= group.has_activations
    if has_activations:
        _log.warning("%s quantizes activations too; here they stay float", source.path)
    if source.settings.get("kv_cache_scheme"):
        _log.warning("%s quantizes the cache of keys and values too; here it stays float", folder)
    return source.model(layers, used)


def _packed_layer(source: Folder, name: str, form: WeightForm) -> StoredLayer:
    key = partial(key_of, name)
    rows, cols = _shape(source, key("weight_shape"))
    words = source.tensor(key("weight_packed"), ("int32",), (rows, containers(cols, form.bits)))

    def codes() -> torch.Tensor:
        return unpack_weights(words.load(), form.bits, layout="dense", dim=1, size=cols)

    return _layer(source, name, form, (rows, cols), codes)


def _int8_layer(source: Folder, name: str, form: WeightForm) -> StoredLayer:
    key = key_of(name, "weight")
    weight = source.tensor(key, ("int8",), (None, None))
    rows, cols = weight.shape
    where = f"{source.path}: {key}"
    return _layer(source, name, form, (rows, cols), lambda: _unsigned(weight, form.bits, where))


def _mx_layer(source: Folder, name: str, form: WeightForm) -> StoredLayer:
    packed = source.tensor(key_of(name, "weight_packed"), ("uint8",), (None, None))
    rows, cols = packed.shape[0], 2 * packed.shape[1]
    groups = -(-cols // MX_GROUP)
    exponents = source.tensor(key_of(name, "weight_scale"), _EXPONENTS, (rows, groups))
    for part in ("weight_global_scale", "weight_zero_point"):
        if key_of(name, part) in source.tensors:
            raise FormatError(f"{source.path} has {key_of(name, part)}, and {MXFP4} has no such")
    dtype, scheme = source.dtype() or "bfloat16", Scheme.mxfp4()

    def load() -> PackedWeights:
        levels = torch.tensor([E2M1], dtype=getattr(torch, dtype))
        scales = exponents.load().view(torch.uint8)
        parts = {"packed_weights": packed.load(), "scales": scales, "codebook": levels}
        return PackedWeights(scheme, (rows, cols), **parts, dtype=dtype)

    return StoredLayer("linear", scheme, (rows, cols), dtype, load)


_READERS = {PACKED: _packed_layer, INT: _int8_layer, MXFP4: _mx_layer}


def _layer(
    source: Folder,
    name: str,
    form: WeightForm,
    shape: tuple[int, int],
    codes: Callable[[], torch.Tensor],
) -> StoredLayer:
    rows, cols = shape
    groups = 1 if form.group is None else -(-cols // form.group)
    scales = _each_row(source, key_of(name, "weight_scale"), SOURCES, form, (rows, groups))
    zeros = _zeros(source, key_of(name, "weight_zero_point"), form, (rows, groups))
    if form.bits == 1 and zeros is None:  # -1 and 0: codes around the zero point 1
        zeros = partial(torch.ones, (rows, groups), dtype=torch.uint8)
    order, places = IN_ORDER, key_of(name, "weight_g_idx")
    if places in source.tensors:
        order = _order(source, places, form, cols, groups)

    def load(scheme: Scheme, dtype: str) -> PackedWeights:
        found = order.scales(_expanded(scales.load(), rows, groups).t()).t()
        zero_points = None if zeros is None else order.scales(zeros().t()).t()
        sorted_codes = order.codes(codes().t()).t()
        numbers = Integers(form.bits, sorted_codes, found, zero_points, order.columns)
        return packed_of(numbers, scheme, dtype)

    span = Granularity.PerTensor if form.strategy == "tensor" else granularity_of(form.group)
    has_order = order.columns is not None
    return source.layer(shape, form.bits, span, zeros is None, scales, load, has_order)


def _shape(source: Folder, key: str) -> tuple[int, int]:
    rows, cols = source.tensor(key, ("int64", "int32"), (2,)).load().tolist()
    if rows < 0 or cols < 0:
        raise FormatError(f"{source.path}: {key} is {rows}, {cols}; no size is negative")
    return rows, cols


def _each_row(
    source: Folder, key: str, dtypes: Any, form: WeightForm, shape: tuple[int, int]
) -> StoredTensor:
    """A tensor with a number for each row and group, or one for all where the strategy says so."""
    found = source.tensors.get(key)
    if form.strategy == "tensor" and found is not None and found.shape in ((), (1,), (1, 1)):
        return source.tensor(key, dtypes, found.shape)
    if form.strategy == "channel" and found is not None and found.shape == shape[:1]:
        return source.tensor(key, dtypes, found.shape)
    return source.tensor(key, dtypes, shape)


def _expanded(values: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    if values.numel() == 1:
        return values.reshape(1, 1).expand(rows, groups)
    return values.reshape(rows, groups)


def _zeros(
    source: Folder, key: str, form: WeightForm, shape: tuple[int, int]
) -> Callable[[], torch.Tensor] | None:
    """What reads the zero points, uint8 ``[out, groups]``; None where there are none."""
    if form.is_symmetric:
        if key in source.tensors:
            raise FormatError(f"{source.path} has {key}, and its config group is symmetric")
        return None
    rows, groups = shape
    found = source.tensors.get(key)
    if found is not None and found.dtype == "int8":  # not packed: int-quantized, or an old writer
        plain = _each_row(source, key, ("int8",), form, shape)
        where = f"{source.path}: {key}"
        return lambda: _expanded(_unsigned(plain, form.bits, where), rows, groups)
    words = source.tensor(key, ("int32", "int8"), (containers(rows, form.bits), groups))
    return lambda: unpack_weights(words.load(), form.bits, layout="dense", dim=0, size=rows)


def _unsigned(stored: StoredTensor, bits: int, where: str) -> torch.Tensor:
    """int8 numbers around 0 as codes."""
    codes = stored.load().to(torch.int16) + (1 << bits - 1)
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 1 << bits:
        raise FormatError(f"{where} holds numbers beyond the {bits} bits that its group says")
    return codes.to(torch.uint8)


def _order(source: Folder, key: str, form: WeightForm, cols: int, groups: int) -> Order:
    places = source.tensor(key, ("int32", "int64"), (cols,)).load()
    if cols and (places == -1).all():  # how its writer says that there is none
        return IN_ORDER
    return order_of(places, form.group or max(cols, 1), groups, f"{source.path}: {key}")


# ---- write -----------------------------------------------------------------------------------


def write_compressed_tensors(
    stored: StoredModel,
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model as ``pack-quantized``, for vLLM and transformers: whole, or not at all.

    Experts of a mixture (:func:`quantization.unfuse_experts`) get the names that their family has
    on disk, the gate apart from what it gates; they must be symmetric and of one scheme, as readers
    want them.

    Integers of 2..8 bits, symmetric or not, by group or row keep every bit of their codes, scales
    and zero points; binary and ternary weights become 2-bit integers of the same numbers, and
    scales that are double quantized the float32 that they stand for. Scales keep their type; a
    server may round them to that of the model as it loads. Layers are read one at a time.

    ``vllm serve folder`` and ``AutoModelForCausalLM.from_pretrained(folder)`` take the folder;
    transformers takes asymmetric layers with
    ``quantization_config=CompressedTensorsConfig(dequantize=True)``.

    Args:
        stored: a model whose quantized layers are all linear.
        folder: where to write; made with its parents.
        overwrite: replace a folder that is there.
        max_shard_bytes: files are begun anew beyond so many bytes.

    Raises:
        FileExistsError: if the folder is there and not empty, without ``overwrite``.
        FormatError: if the format cannot hold a layer: an embedding, a Conv1D of transformers, a
            table of levels, float zero points, a row that is no whole number of groups, experts of
            a family that keeps them fused; the message names it. Nothing has been written then.
        ImportError: if there are experts, and transformers, which knows their names, is missing.
        OSError: if the disk fills, say. Nothing of the new folder is left then.

    Example:
        >>> import tempfile
        >>> from quantization import quantize_model
        >>> from quantization.checkpoint.stored_model import stored_model
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 8))
        >>> _ = quantize_model(model, {"0": "w4g32a", "1": "w8"})
        >>> with tempfile.TemporaryDirectory() as place:
        ...     write_compressed_tensors(stored_model(model), f"{place}/model")
        ...     again = read_compressed_tensors(f"{place}/model")
        ...     {name: str(layer.scheme) for name, layer in again.layers.items()}
        {'0': 'w4g32a', '1': 'w8'}
    """
    ignored = _ignored(stored)  # by the names of the class, which transformers knows
    stored = with_family_names(stored)
    ignored = list(dict.fromkeys([*ignored, *_ignored(stored)]))
    forms = {name: _form_of(name, layer) for name, layer in stored.layers.items()}
    config = {**(stored.config or {}), SETTINGS: settings_of(forms, ignored)}
    if _HEAD in forms and config.get("tie_word_embeddings"):
        config["tie_word_embeddings"] = False  # a head of its own: a loader would drop it
    plain = StoredModel({}, _tensors(stored, forms), {}, config, stored.assets)
    shards = plan_shards(plain, max_shard_bytes)
    with new_folder(folder, overwrite=overwrite) as made:
        records = {shard.name: write_shard(made / shard.name, plain, shard) for shard in shards}
        write_beside(made, plain, records)


def _form_of(name: str, layer: StoredLayer) -> WeightForm:
    """How a layer is written; the reason where it cannot be."""
    scheme, cols = layer.scheme, layer.shape[1]
    reason = why_not(scheme)
    remedy = "quantize that layer to integers (w4g128, say), or leave it in float"
    if layer.kind == "embedding" or "was_conv1d" in layer.more:
        what = "an embedding" if layer.kind == "embedding" else "a Conv1D of transformers"
        reason, remedy = f"it is {what}, and the format has linear layers only", "leave it in float"
    if reason is None and is_of_expert(name) and scheme.mode is Mode.Asymmetric:
        reason = "it is an expert with zero points, which neither vLLM nor transformers read"
        remedy = "quantize the experts symmetrically"
    group = scheme.group(cols) if scheme.granularity == PerGroup(scheme.group(cols)) else None
    if reason is None and group is not None and cols % group:
        reason = f"its rows of {cols} are no whole number of groups of {group}"
        remedy = f"quantize that layer with groups of a size that divides {cols}"
    if reason is not None:
        raise FormatError(
            f"{METHOD} cannot hold {name or 'the model'} ({scheme}): {reason}; {remedy}"
        )
    is_symmetric = scheme.mode is Mode.Symmetric
    strategy = "channel" if group is None else "group"
    return WeightForm(width_of(scheme, WIDTHS), is_symmetric, strategy, group)


def _ignored(stored: StoredModel) -> list[str]:
    """Float matrices, which might be linear layers; and the head, which may be a tied one."""
    names = [
        key.removesuffix(".weight")
        for key, tensor in stored.tensors.items()
        if key.endswith(".weight") and len(tensor.shape) == 2
    ]
    return names if _HEAD in (*names, *stored.layers) else [*names, _HEAD]


def _tensors(stored: StoredModel, forms: Mapping[str, WeightForm]) -> dict[str, StoredTensor]:
    """Everything that is written, each layer converted when its first tensor is asked for."""

    @lru_cache(maxsize=1)
    def converted(name: str) -> dict[str, torch.Tensor]:
        return _converted(stored.layers[name], forms[name])

    made = {}
    for name, layer in stored.layers.items():
        for part, (dtype, shape) in _parts(layer, forms[name]).items():
            load = partial(lambda name, part: converted(name)[part], name, part)
            made[key_of(name, part)] = StoredTensor(shape, dtype, load)
    return made | {key: value for key, value in stored.tensors.items() if key not in stored.ties}


def _parts(layer: StoredLayer, form: WeightForm) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each tensor of a layer."""
    (rows, cols), bits = layer.shape, form.bits
    scales = layer.scheme.buffers(layer.shape, layer.dtype)["scales"]
    groups = scales.shape[1]
    made = {
        "weight_packed": ("int32", (rows, containers(cols, bits))),
        "weight_scale": ("float32" if layer.scheme.double_quant else scales.dtype, scales.shape),
        "weight_shape": ("int64", (2,)),
    }
    if not form.is_symmetric:
        made["weight_zero_point"] = ("int32", (containers(rows, bits), groups))
    return made


def _converted(layer: StoredLayer, form: WeightForm) -> dict[str, torch.Tensor]:
    numbers = integers_of(layer.load(), form.bits)
    pack = partial(pack_weights, pack_bits=form.bits, dtype="int32", layout="dense")
    made = {
        "weight_packed": pack(numbers.codes, dim=1),
        "weight_scale": numbers.scales,
        "weight_shape": torch.tensor(layer.shape),
    }
    if numbers.zero_points is not None:
        made["weight_zero_point"] = pack(numbers.zero_points, dim=0)
    return made
