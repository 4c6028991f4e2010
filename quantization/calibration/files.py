"""Statistics of a model as a safetensors file, read layer by layer when they are asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

from quantization.checkpoint.disk.files import new_file
from quantization.checkpoint.disk.json_files import CheckpointError
from quantization.checkpoint.disk.safetensors_files import TensorFile, TensorWriter
from quantization.methods.statistics import ModelStatistics, Statistics

__all__ = ["load_statistics", "save_statistics"]

_FORMAT = "statistics of layer inputs, version 1"


def save_statistics(
    statistics: ModelStatistics,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write statistics as one safetensors file, whole or not at all.

    Tensors are ``<layer>.moments`` and ``<layer>.hessian``, once for all layers that share them;
    the header says which those are, and how many rows were seen.

    Args:
        statistics: of a model, as :func:`quantization.calibrate` gives them.
        path: of the file.
        overwrite: whether a file there may be replaced.
        metadata: further texts for the header.

    Raises:
        FileExistsError: if something is at ``path``, without ``overwrite``.

    Example:
        >>> import tempfile, torch
        >>> known = ModelStatistics({"0": Statistics.of(torch.ones(2, 3))}, source="ones")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_statistics(known, f"{folder}/known.safetensors")
        ...     load_statistics(f"{folder}/known.safetensors")
        ModelStatistics(1 layers: ones)
    """
    shared = statistics.shares
    counts: dict[str, int] = {}
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in dict.fromkeys(shared.values()):
        known = statistics[name]
        counts[name] = known.count
        tensors |= {key: _described(tensor) for key, tensor in _tensors(name, known).items()}
    head = dict(metadata or {}) | {
        "format": _FORMAT,
        "layers": json.dumps(shared),
        "counts": json.dumps(counts),
        "unseen": json.dumps(statistics.unseen),
        "source": statistics.source,
    }
    with (
        new_file(path, overwrite=overwrite) as temporary,
        TensorWriter(temporary, tensors, head) as writer,
    ):
        for name in counts:
            for key, tensor in _tensors(name, statistics[name]).items():
                writer.write(key, tensor)


def load_statistics(path: str | os.PathLike[str]) -> ModelStatistics:
    """Statistics that :func:`save_statistics` wrote; those of a layer are read when asked for.

    Raises:
        OSError: if the file cannot be read.
        CheckpointError: if it is no such file, or broken.

    Example:
        >>> load_statistics("nowhere.safetensors")
        Traceback (most recent call last):
            ...
        FileNotFoundError: [Errno 2] No such file or directory: 'nowhere.safetensors'
    """
    file = TensorFile(path)
    head = file.header.metadata
    if head.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path} holds no {_FORMAT!r}, which save_statistics writes, but "
            f"{head.get('format', 'tensors without such a word')!r}"
        )
    try:
        shared, counts = json.loads(head["layers"]), json.loads(head["counts"])
        unseen, source = json.loads(head["unseen"]), head["source"]
        missing = [n for n in counts if f"{n}.moments" not in file.header.entries]
        unknown = [name for name, first in shared.items() if first not in counts]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path}: its header is broken: {error!r}") from None
    if missing or unknown:
        raise CheckpointError(f"{path}: {(missing + unknown)[0]} has no moments or no count")
    alive: WeakValueDictionary[str, Statistics] = WeakValueDictionary()
    read = {first: partial(_read, file, alive, first, count) for first, count in counts.items()}
    layers = {name: read[first] for name, first in shared.items()}
    return ModelStatistics(layers, unseen=unseen, source=source)


def _read(
    file: TensorFile, alive: WeakValueDictionary[str, Statistics], first: str, count: int
) -> Statistics:
    """What a layer has, one object for all that share it as long as anyone has it."""
    known = alive.get(first)
    if known is None:
        entries = file.header.entries
        moments = file.to_read(f"{first}.moments").load()
        key = f"{first}.hessian"
        hessian = file.to_read(key).load() if key in entries else None
        try:
            known = alive[first] = Statistics(moments, hessian, count)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{file.path}: {first}: {error}") from None
    return known


def _tensors(name: str, known: Statistics) -> dict[str, Any]:
    parts = {f"{name}.moments": known.moments, f"{name}.hessian": known.hessian}
    return {key: tensor for key, tensor in parts.items() if tensor is not None}


def _described(tensor: Any) -> tuple[str, tuple[int, ...]]:
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
