"""Save and load quantized models."""

from __future__ import annotations

import json
import os
from typing import Any

from torch import nn

from quantization.checkpoint.format import CONFIG
from quantization.checkpoint.reading import read_checkpoint
from quantization.checkpoint.restore import restore_model
from quantization.checkpoint.source.skeleton import (
    first_float,
    is_of_transformers,
    skeleton_of_config,
)
from quantization.checkpoint.stored_model import stored_model, unwrapped
from quantization.checkpoint.writing import MAX_SHARD_BYTES, write_checkpoint

__all__ = ["load_quantized", "save_quantized"]


def save_quantized(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model, quantized or not, to a new folder: whole, or not at all.

    Every tensor of the state dict is written once; what is tied stays tied. Where the model has a
    ``config`` of transformers, its ``config.json`` and ``generation_config.json`` are written too,
    and :func:`load_quantized` builds the model by itself. What ``torch.compile``, DataParallel or
    DistributedDataParallel wraps around a model is left away.

    Args:
        model: the model; its own dtypes are kept.
        folder: where to write; made with its parents.
        overwrite: replace a folder that is there. Files that are mapped from it stay readable.
        max_shard_bytes: files are begun anew beyond so many bytes.

    Raises:
        FileExistsError: if the folder is there and not empty, without ``overwrite``.
        TypeError, ValueError: if the model is none, lazy, or has a state that is no tensor.
        OSError: if the disk fills, say. Nothing of the new folder is left then.

    Example:
        >>> import tempfile
        >>> from quantization import quantize_model
        >>> model = nn.Sequential(nn.Linear(64, 32))
        >>> _ = quantize_model(model, "w4g32a")
        >>> with tempfile.TemporaryDirectory() as place:
        ...     save_quantized(model, f"{place}/model")
        ...     again = load_quantized(f"{place}/model", nn.Sequential(nn.Linear(64, 32)))
        >>> again
        Sequential(
          (0): PackedLinearLayer(in_features=64, out_features=32, bias=True, dtype=float32, \
weights=w4g32a, 1,440 bytes)
        )
    """
    model = unwrapped(model)
    config = _plain_config(getattr(model, "config", None))
    if config is not None:  # what it is now, and not what it was loaded as
        config = dict(sorted((config | {"architectures": [type(model).__name__]}).items()))
    stored = stored_model(model, config)
    extra = {}
    generation = _plain_config(getattr(model, "generation_config", None)) if config else None
    if generation is not None:
        extra["generation_config.json"] = generation
    write_checkpoint(
        stored, folder, overwrite=overwrite, max_shard_bytes=max_shard_bytes, extra=extra
    )


def _plain_config(config: Any) -> dict[str, Any] | None:
    to_json = getattr(config, "to_json_string", None)
    return json.loads(to_json()) if callable(to_json) else None


def load_quantized(
    folder: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    verify: bool = False,
    pages: str | None = None,
    mmap: bool | None = None,
) -> nn.Module:
    """The model of a folder that :func:`save_quantized` or a conversion wrote, on the CPU.

    With ``pages="memory"`` every tensor is read once into memory of the process's own, on huge
    pages where the system offers them, and the files are closed: each token is then faster, and the
    first one comes later. With ``pages="file"`` tensors are views of the mapped files: opening
    takes no time, what is not used is not read, and processes that load the same folder share its
    memory. Writing to one copies its pages in this process; the files never change. As of any
    mapped file, if somebody makes one shorter while the model is in use, the system ends the
    process (SIGBUS) when it touches what is gone: replace such files, as :func:`save_quantized`
    does, never write into them.

    Args:
        folder: the folder.
        model: what to put the tensors in, float or quantized, of any dtype, also on meta: it is
            changed in place, as :func:`quantization.checkpoint.restore.restore_model` says. None:
            the class that ``config.json`` names is built; needs transformers.
        verify: check the hash of every tensor and of every other file first, which reads all of
            them, as ``verify_checkpoint`` does.
        pages: ``"memory"`` or ``"file"``; None: memory where that is worth while, that is, where
            huge pages are offered and the files, of 2 MB or more, take at most half of what the
            system, or the container's limit, has left; else the files.
        mmap: True is another word for ``pages="file"``, False for ``pages="memory"``.

    Returns:
        The model; the very module that was given, unless that is itself a quantized layer. One that
        was built here is in eval mode.

    Raises:
        FileNotFoundError: if a file is missing.
        CheckpointError: if a file is broken, or of a later version; the message names what.
        RestoreError: if the checkpoint does not fit the model, which is then as it was.
        ValueError: for other ``pages``, or if ``mmap`` says the contrary.
        ImportError: if transformers would be needed and is not installed.

    Example:
        >>> import tempfile
        >>> from quantization import QWQALinearLayer
        >>> with tempfile.TemporaryDirectory() as place:
        ...     save_quantized(QWQALinearLayer(16, 32), f"{place}/layer")
        ...     layer = load_quantized(f"{place}/layer", nn.Linear(16, 32), verify=True)
        >>> layer.int8_weights.shape
        torch.Size([32, 16])
    """
    stored = read_checkpoint(folder, verify=verify, pages=_pages(pages, mmap))
    if model is None:
        if stored.config is None or not is_of_transformers(stored.config):
            kind = "" if stored.config is None else " of transformers"
            raise ValueError(
                f"{folder} has no {CONFIG}{kind} that would tell the class of the model: give the "
                "model, float or on meta, as load_quantized(folder, model)"
            )
        dtypes = (tensor.dtype for tensor in stored.tensors.values())
        model = skeleton_of_config(folder, first_float(dtypes))
    return restore_model(stored, model)


def _pages(pages: str | None, mmap: bool | None) -> str | None:
    if mmap is None:
        return pages
    meant = "file" if mmap else "memory"
    if pages not in (None, meant):
        raise ValueError(f"pages={pages!r} and mmap={mmap} say different things: give one of them")
    return meant
