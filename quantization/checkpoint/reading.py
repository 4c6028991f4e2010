"""Folders that were written, checked before anything of them is used."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from quantization.checkpoint.disk.files import below, digest_of, member, names_below
from quantization.checkpoint.disk.json_files import CheckpointError, read_json
from quantization.checkpoint.disk.safetensors_files import INDEX, TensorFile
from quantization.checkpoint.disk.stored_tensor import StoredTensor, key_of
from quantization.checkpoint.format import (
    CONFIG,
    FILE,
    Document,
    FileRecord,
    packed_of,
    parts_of,
)
from quantization.checkpoint.stored_model import StoredLayer, StoredModel
from quantization.console.progress import shown
from quantization.layers.arena import HUGE, Arena, fits, offers_huge_pages
from quantization.schemes.packed_weights import PackedWeights

__all__ = ["check_hashes", "check_record", "read_checkpoint", "verify_checkpoint"]


#: What may be asked for: views of mapped files, or memory of the process's own.
PAGES = ("file", "memory")


def read_checkpoint(
    folder: str | os.PathLike[str], *, verify: bool = False, pages: str | None = "file"
) -> StoredModel:
    """What a folder holds, checked: files against their records, tensors against their layers.

    Args:
        folder: as for :func:`load_quantized`.
        verify: as for :func:`load_quantized`.
        pages: as for :func:`load_quantized`.

    Raises:
        FileNotFoundError, CheckpointError, ValueError: as for :func:`load_quantized`.

    Example:
        >>> import tempfile
        >>> from quantization.checkpoint import save_quantized
        >>> with tempfile.TemporaryDirectory() as place:
        ...     save_quantized(torch.nn.Linear(4, 2), f"{place}/model")
        ...     list(read_checkpoint(f"{place}/model").tensors)
        ['weight', 'bias']
    """
    if pages not in (None, *PAGES):
        raise ValueError(f"pages is {pages!r}; it is one of {', '.join(map(repr, PAGES))}, or None")
    folder, document, files = _open(folder)
    if verify:
        _verify_hashes(document, files)
        _verify_others(folder, document)
    is_copied = pages == "memory" or (pages is None and _pays_to_copy(files))
    reader = _Reader(folder, document, files, Arena() if is_copied else None)
    layers = {name: reader.layer(name, layer) for name, layer in document.layers.items()}
    used = {key_of(name, "weight") for name in document.layers}  # placeholders
    used |= {key_of(name, part) for name, layer in document.layers.items()
            for part in parts_of(layer)}  # fmt: skip
    written = [key for record in document.files.values() for key in record.sha256]
    keys = dict.fromkeys([*written, *document.ties])
    tensors = {key: reader.stored(key) for key in keys if key not in used}
    config = folder / CONFIG
    own = {*document.files, FILE, INDEX, CONFIG}
    return StoredModel(
        layers,
        tensors,
        document.ties,
        read_json(config) if config.is_file() else None,
        tuple(sorted(path for path in folder.iterdir() if path.is_file() and path.name not in own)),
        _inner(folder, document),
    )


def verify_checkpoint(folder: str | os.PathLike[str]) -> int:
    """Check a folder to the last byte: all that reading checks, and the hash of all that is there.

    Of every tensor, of every other file (config, index, tokenizer), and of the document itself.
    A warning names what cannot be checked: files that came later, and all but the tensors of a
    folder that was written before other files were recorded. A folder whose ``config.json`` or
    tokenizer was saved anew, by transformers say, is no longer the one that was written:
    :func:`load_quantized` and transformers load it, and this function names the file.

    Returns:
        How many bytes of tensors were checked.

    Raises:
        FileNotFoundError, CheckpointError: as for :func:`load_quantized`; a wrong hash names its
            tensor and file, or its file.

    Example:
        >>> import tempfile
        >>> from quantization.checkpoint import save_quantized
        >>> with tempfile.TemporaryDirectory() as place:
        ...     save_quantized(torch.nn.Linear(4, 2), f"{place}/model")
        ...     verify_checkpoint(f"{place}/model")
        40
    """
    read_checkpoint(folder, verify=True)
    _, _, files = _open(folder)
    entries = (entry for file in files.values() for entry in file.header.entries.values())
    return sum(entry.stop - entry.start for entry in entries)


def _open(folder: str | os.PathLike[str]) -> tuple[Path, Document, dict[str, TensorFile]]:
    folder = Path(folder)
    if not (folder / FILE).is_file():
        what = "no folder" if not folder.is_dir() else f"a folder without {FILE}"
        raise FileNotFoundError(
            f"{folder} is {what}; save_quantized and quantize_checkpoint write one, whole"
        )
    document = Document.from_json((folder / FILE).read_bytes(), str(folder / FILE))
    files = {}
    for name, record in document.files.items():
        try:
            file = files[name] = TensorFile(member(folder, name))
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(f"{folder / FILE}: {error}") from None
        check_record(file, record)
    return folder, document, files


def check_record(file: TensorFile, record: FileRecord) -> None:
    """Raise CheckpointError if a file is not the one that was recorded; its data are not read."""
    if file.header.nbytes != record.nbytes:
        raise CheckpointError(
            f"{file.path} has {file.header.nbytes} bytes; {record.nbytes} were written"
        )
    if file.header.sha256 != record.header_sha256:
        raise CheckpointError(f"{file.path}: its header is not the one that was written")
    if file.header.entries.keys() != record.sha256.keys():
        odd = min(file.header.entries.keys() ^ record.sha256.keys())
        raise CheckpointError(f"{file.path}: {odd} is not both in the file and in {FILE}")


def check_hashes(file: TensorFile, record: FileRecord) -> None:
    """Raise CheckpointError if a tensor of a file has other bytes than were written."""
    with file.path.open("rb", buffering=0) as raw:
        for key, entry in file.header.entries.items():
            raw.seek(entry.start)
            digest, left = hashlib.sha256(), entry.stop - entry.start
            while left:
                block = raw.read(min(left, 1 << 22))
                if not block:
                    raise CheckpointError(f"{file.path} became shorter while it was read")
                digest.update(block)
                left -= len(block)
            if digest.hexdigest() != record.sha256[key]:
                raise CheckpointError(
                    f"{file.path}: {key} has other bytes than were written (its sha256 differs)"
                )


def _verify_hashes(document: Document, files: Mapping[str, TensorFile]) -> None:
    with shown(None, "verifying", files.items()) as told:
        for name, file in told:
            check_hashes(file, document.files[name])


def _verify_others(folder: Path, document: Document) -> None:
    """Raise for a file without tensors that is gone or changed; warn of what was not recorded."""
    recorded = document.others or {}
    for name, record in recorded.items():
        try:
            path = below(folder, name)
        except FileNotFoundError:
            raise CheckpointError(
                f"{folder} lacks {name}, which was written with it: take it from where the folder "
                "came from, or write the folder anew"
            ) from None
        except ValueError as error:
            raise CheckpointError(f"{folder / FILE}: {error}") from None
        if digest_of(path) != (record.nbytes, record.sha256):
            raise CheckpointError(
                f"{path} has other bytes than were written (its sha256 differs): take the file "
                "from where the folder came from, or write the folder anew if that was on purpose"
            )
    unknown = sorted(names_below(folder) - {*recorded, *document.files, FILE})
    if not document.is_sealed or document.others is None:
        unknown.insert(0, FILE)
    if unknown:
        warnings.warn(
            f"{folder}: the tensors are checked; {FILE} has no hash to check of: "
            f"{', '.join(unknown)}. Where that is too little, write the folder anew",
            stacklevel=4,
        )


def _pays_to_copy(files: Mapping[str, TensorFile]) -> bool:
    """Whether memory of one's own is faster than the files', and large enough."""
    nbytes = sum(file.header.nbytes for file in files.values())
    return nbytes >= HUGE and offers_huge_pages() and fits(nbytes)


class _Reader:
    """Tensors of a folder by their keys; tied keys give one tensor."""

    def __init__(
        self,
        folder: Path,
        document: Document,
        files: Mapping[str, TensorFile],
        arena: Arena | None,
    ) -> None:
        self.ties, self.arena = document.ties, arena
        self.where = str(folder)
        self.file_of: dict[str, TensorFile] = {}
        self._loaded: dict[str, torch.Tensor] = {}
        for file in files.values():
            for key in file.header.entries:
                if key in self.file_of:
                    raise CheckpointError(f"{folder}: {key} is in two files")
                self.file_of[key] = file
        for key, first in self.ties.items():
            if first not in self.file_of or key in self.file_of:
                raise CheckpointError(f"{folder / FILE} ties {key} to {first}, which cannot be")

    def stored(self, key: str) -> StoredTensor:
        """A tensor that is there, under its own key or as a tied one."""
        first = self.ties.get(key, key)
        if first not in self.file_of:
            raise CheckpointError(f"{self.where}: {key} is in none of its files")
        entry = self.file_of[first].header.entries[first]
        return StoredTensor(entry.shape, entry.dtype, partial(self._tensor, first))

    def _tensor(self, key: str) -> torch.Tensor:
        if key not in self._loaded:
            file = self.file_of[key]
            arena = self.arena
            self._loaded[key] = file.tensor(key) if arena is None else file.read(key, arena.empty)
        return self._loaded[key]

    def layer(self, name: str, layer: StoredLayer) -> StoredLayer:
        """A layer that reads its weight, all its tensors being there as they should."""
        found: dict[str, StoredTensor] = {}
        for part, (dtype, shape) in parts_of(layer).items():
            key = key_of(name, part)
            tensor = found[part] = self.stored(key)
            if (tensor.dtype, tensor.shape) != (dtype, shape):
                raise CheckpointError(
                    f"{self.where}: {key} is {tensor.dtype} {tensor.shape}; layer {name!r} of "
                    f"scheme {layer.scheme} needs {dtype} {shape}"
                )
        return replace(layer, load=partial(_packed, layer, found))


def _inner(folder: Path, document: Document) -> dict[str, Path]:
    """The recorded files of sub-folders that are there."""
    found = {}
    for name in document.others or {}:
        try:
            path = below(folder, name)
        except FileNotFoundError:
            continue  # verify_checkpoint says so
        except ValueError as error:
            raise CheckpointError(f"{folder / FILE}: {error}") from None
        if "/" in name:
            found[name] = path
    return found


def _packed(layer: StoredLayer, found: Mapping[str, StoredTensor]) -> PackedWeights:
    return packed_of(layer, {part: tensor.load() for part, tensor in found.items()})
