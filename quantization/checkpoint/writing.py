"""The files of a checkpoint: planned by their sizes, written layer by layer."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantization.checkpoint.disk.files import digest_of, names_below, new_folder
from quantization.checkpoint.disk.safetensors_files import INDEX, TensorWriter
from quantization.checkpoint.disk.stored_tensor import key_of, nbytes_of
from quantization.checkpoint.format import (
    CONFIG,
    FILE,
    Document,
    FileRecord,
    OtherFile,
    parts_of,
    tensors_of,
)
from quantization.checkpoint.plain_config import ENTRY, entry_of
from quantization.checkpoint.stored_model import StoredModel
from quantization.layers.quantized_module import placeholder
from quantization.ops.dtypes import index_of

__all__ = [
    "MAX_SHARD_BYTES",
    "Shard",
    "finish",
    "plan_shards",
    "write_beside",
    "write_checkpoint",
    "write_shard",
]

MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Shard:
    """A file to be written: its name, its layers and its other tensors, and the form of all."""

    name: str
    layers: tuple[str, ...]
    keys: tuple[str, ...]
    forms: Mapping[str, tuple[str, tuple[int, ...]]] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(nbytes_of(*form) for form in self.forms.values())


def write_checkpoint(
    stored: StoredModel,
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write what is stored elsewhere, or held by a model, as a checkpoint.

    Layers are loaded one at a time, so that memory is that of the largest.

    Args:
        stored: of a reader, or of :func:`quantization.checkpoint.stored_model.stored_model`.
        folder: as for :func:`save_quantized`.
        overwrite: as for :func:`save_quantized`.
        max_shard_bytes: as for :func:`save_quantized`.
        extra: further JSON files, name -> plain values.

    Raises:
        FileExistsError, OSError: as for :func:`save_quantized`.
        CheckpointError: if a tensor is not of the dtype or shape that its layer says.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from quantization.checkpoint.stored_model import stored_model
        >>> with tempfile.TemporaryDirectory() as place:
        ...     write_checkpoint(stored_model(nn.Linear(4, 2)), f"{place}/model")
        ...     sorted(os.listdir(f"{place}/model"))
        ['model.safetensors', 'quantization.json']
    """
    shards = plan_shards(stored, max_shard_bytes)
    with new_folder(folder, overwrite=overwrite) as made:
        records = {shard.name: write_shard(made / shard.name, stored, shard) for shard in shards}
        finish(made, stored, records, extra)


def plan_shards(stored: StoredModel, max_shard_bytes: int = MAX_SHARD_BYTES) -> list[Shard]:
    """The files of a checkpoint: layers, then other tensors, in order, none parted.

    With a config of transformers, an empty tensor stands under the name of each float weight: it
    stops a transformers that does not know the format.

    Example:
        >>> from torch import nn
        >>> from quantization.checkpoint.stored_model import stored_model
        >>> [shard.name for shard in plan_shards(stored_model(nn.Linear(4, 2)), 32)]
        ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    if index_of(max_shard_bytes, "max_shard_bytes") < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; it must be 1 or more")
    units = [(name, "", forms) for name, forms in _layer_forms(stored)]
    if stored.config is not None:
        for name, _, forms in units:
            forms[key_of(name, "weight")] = ("uint8", (0, 0))
    units += [
        ("", key, {key: (tensor.dtype, tensor.shape)})
        for key, tensor in stored.tensors.items()
        if key not in stored.ties
    ]
    groups: list[list[Any]] = [[]]
    filled = 0
    for unit in units:
        nbytes = sum(nbytes_of(*form) for form in unit[2].values())
        if groups[-1] and filled + nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(unit)
        filled += nbytes
    return [_shard(group, i, len(groups)) for i, group in enumerate(groups, start=1)]


def _layer_forms(stored: StoredModel) -> list[tuple[str, dict[str, Any]]]:
    """Layers with the form of each tensor that is written for them, without tied ones."""
    made = []
    for name, layer in stored.layers.items():
        forms = {key_of(name, part): form for part, form in parts_of(layer).items()}
        made.append((name, {key: form for key, form in forms.items() if key not in stored.ties}))
    return [(name, forms) for name, forms in made if forms]


def _shard(units: list[Any], number: int, count: int) -> Shard:
    name = "model" if count == 1 else f"model-{number:05}-of-{count:05}"
    forms = {key: form for _, _, made in units for key, form in made.items()}
    keys = tuple(key for _, key, _ in units if key)
    layers = tuple(name for name, key, _ in units if not key)
    return Shard(f"{name}.safetensors", layers, keys, forms)


def write_shard(
    path: Path,
    stored: StoredModel,
    shard: Shard,
    advance: Callable[[str, int], None] = lambda name, nbytes: None,
) -> FileRecord:
    """Write one file, layer by layer; ``advance`` hears the name and bytes of each unit written."""
    with TensorWriter(path, shard.forms, {"format": "pt"}) as writer:
        for name in shard.layers:
            nbytes = 0
            for part, tensor in tensors_of(stored.layers[name]).items():
                key = key_of(name, part)
                if key in shard.forms:
                    writer.write(key, tensor)
                    nbytes += tensor.nbytes
            if key_of(name, "weight") in shard.forms:
                writer.write(key_of(name, "weight"), placeholder())
            advance(name, nbytes)
        for key in shard.keys:
            tensor = stored.tensors[key].load()
            writer.write(key, tensor)
            advance(key, tensor.nbytes)
            del tensor  # before the next is read
        return FileRecord(writer.nbytes, writer.header_sha256, writer.sha256)


def finish(
    folder: Path,
    stored: StoredModel,
    records: Mapping[str, FileRecord],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write what stands beside the tensors: the index, the config, the assets, and the document.

    A config tells transformers which layers there are. The document, which is last, records every
    other file.
    """
    config = stored.config and {**stored.config, ENTRY: entry_of(stored)}
    write_beside(folder, replace(stored, config=config), records)
    for name, plain in (extra or {}).items():
        (folder / name).write_text(json.dumps(plain, indent=2) + "\n")
    names = sorted(names_below(folder) - {*records, FILE})
    others = {name: OtherFile(*digest_of(folder / name)) for name in names}
    document = Document(records, stored.layers, stored.ties, others)
    (folder / FILE).write_text(document.to_json())


def write_beside(folder: Path, stored: StoredModel, records: Mapping[str, FileRecord]) -> None:
    """Write what any folder of safetensors has beside them: the index, the config, the assets."""
    if len(records) > 1:
        sizes = sum(record.nbytes for record in records.values())
        index = {
            "metadata": {"total_size": sizes},
            "weight_map": {key: name for name, record in records.items() for key in record.sha256},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    if stored.config is not None:
        (folder / CONFIG).write_text(json.dumps(stored.config, indent=2) + "\n")
    for asset in stored.assets:
        shutil.copyfile(asset, folder / asset.name)
    for name, path in stored.inner.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
