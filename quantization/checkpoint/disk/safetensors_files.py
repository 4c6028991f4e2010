"""safetensors files: strict headers, tensors as views of the mapped file, writing in pieces.

Reading goes through the safetensors library; what it lets pass is refused here before: duplicate
keys, names with control characters, tensors of other sizes than their shapes say.

Source: the format, https://github.com/huggingface/safetensors#format (8 bytes of length, a JSON
header, the data without holes).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from quantization.checkpoint.disk.files import member, read_into, regular
from quantization.checkpoint.disk.json_files import CheckpointError, parse_json, read_json
from quantization.checkpoint.disk.stored_tensor import StoredTensor

__all__ = [
    "INDEX",
    "Entry",
    "Header",
    "TensorFile",
    "TensorFolder",
    "TensorWriter",
    "read_header",
]

INDEX = "model.safetensors.index.json"
_STEMS = ("model", "diffusion_pytorch_model")  # of files of transformers, of diffusers
Shape = tuple[int, ...]
Room = Callable[..., torch.Tensor]  # makes a tensor without numbers yet, of a shape and dtype
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "U16": "uint16",
    "U32": "uint32", "U64": "uint64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F4": "float4_e2m1fn_x2", "C64": "complex64",
}  # fmt: skip
_TOGETHER = {"F4": 2}  # numbers that torch has in one element: its last dimension is shorter
_NAMES = {name: short for short, name in _DTYPES.items()}
_LARGEST_HEADER = 100_000_000  # bytes, as the library has it
_ALIGNMENT = 64
_MOST_DIMENSIONS = 64  # as many as arrays of NumPy have
_LARGEST_EMPTY = 1 << 24  # size of a tensor without numbers, whose bytes bound nothing


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: torch's name of its dtype, its shape, and its first and last byte."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """What stands at the head of a file.

    Attributes:
        entries: tensors by key, in the order of the header.
        metadata: texts by name.
        sha256: of the header with its length, in hexadecimal.
        nbytes: of the whole file.
    """

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    sha256: str
    nbytes: int


def read_header(path: str | os.PathLike[str]) -> Header:
    """The header of a safetensors file, checked against the file.

    Raises:
        OSError: if the file cannot be read.
        CheckpointError: if it is none: cut short, not JSON, keys twice, an unknown dtype, sizes
            that differ from shapes, bytes that are no tensor's or two tensors'.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        ...     save_file({"a": torch.ones(2, 3)}, file.name)
        ...     read_header(file.name).entries["a"].shape
        (2, 3)
    """
    path = Path(path)
    try:
        nbytes = regular(path).st_size
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(nbytes - 8, _LARGEST_HEADER):
            raise CheckpointError(
                f"{path} is no safetensors file, or cut short: it has {nbytes} bytes, and its "
                f"header would take {length}"
            )
        text = file.read(length)
    plain = parse_json(text, str(path))
    metadata = plain.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: the metadata of the header are not texts")
    begin = 8 + length
    entries = {key: _entry(path, key, value, begin) for key, value in plain.items()}
    _check_coverage(path, entries, begin, nbytes)
    return Header(entries, metadata, hashlib.sha256(prefix + text).hexdigest(), nbytes)


def _entry(path: Path, key: str, value: Any, begin: int) -> Entry:
    if any(ord(sign) < 32 for sign in key):
        raise CheckpointError(f"{path}: the key {key!r} has control characters")
    match value:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(first), int(last)]}:
            pass
        case _:
            raise CheckpointError(f"{path}: {key} has no dtype, shape and data_offsets")
    if dtype not in _DTYPES:
        raise CheckpointError(
            f"{path}: {key} has the dtype {dtype}; known are {', '.join(_DTYPES)}"
        )
    together, are_sizes = _TOGETHER.get(dtype, 1), all(type(n) is int and n >= 0 for n in shape)
    if not are_sizes or not 0 <= first <= last or (shape or [1])[-1] % together:
        raise CheckpointError(
            f"{path}: {key} has a negative or broken size: {shape!s:.200}, {first}..{last}"
        )
    shape[-1:] = [size // together for size in shape[-1:]]
    size = math.prod(shape) * getattr(torch, _DTYPES[dtype]).itemsize
    if size != last - first:
        raise CheckpointError(
            f"{path}: {key} is {dtype} {shape!s:.200}, {size} bytes, "
            f"and its place has {last - first}"
        )
    if len(shape) > _MOST_DIMENSIONS or (not size and max(shape) > _LARGEST_EMPTY):
        raise CheckpointError(
            f"{path}: {key} has the shape {shape!s:.200}; at most {_MOST_DIMENSIONS} dimensions "
            f"are read, and in tensors without numbers sizes up to {_LARGEST_EMPTY}"
        )
    return Entry(_DTYPES[dtype], tuple(shape), begin + first, begin + last)


def _check_coverage(path: Path, entries: Mapping[str, Entry], begin: int, nbytes: int) -> None:
    """No byte of the data is of no tensor, or of two."""
    at = begin
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != at:
            what = "overlaps another tensor" if entry.start < at else "begins behind a hole"
            raise CheckpointError(f"{path}: {key} {what} at byte {entry.start}")
        at = entry.stop
    if at != nbytes:
        raise CheckpointError(
            f"{path} has {nbytes} bytes, and its tensors end at {at}: it is cut short or too long"
        )


class TensorFile:
    """A safetensors file whose header is checked.

    Args:
        path: of the file.

    Raises:
        CheckpointError: as :func:`read_header` does.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.header = read_header(path)
        self._mapped: Any = None

    def tensor(self, key: str) -> torch.Tensor:
        """A tensor as a view of the mapped file: pages are read when they are touched.

        Writing to it changes memory of this process only, never the file.
        """
        if self._mapped is None:
            try:
                self._mapped = safe_open(self.path, "pt")
            except SafetensorError as error:
                raise CheckpointError(f"{self.path}: {error}") from None
        return self._mapped.get_tensor(key)

    def read(self, key: str, room: Room) -> torch.Tensor:
        """A tensor in memory that `room` gives; the file is closed again."""
        entry = self.header.entries[key]
        return self._read(entry.dtype, entry.shape, entry.start, room)

    def rows(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a tensor in memory of their own, read without mapping the file."""
        entry, inner = self.header.entries[key], self.header.entries[key].shape[1:]
        at = entry.start + start * math.prod(inner) * _itemsize(entry.dtype)
        return self._read(entry.dtype, (stop - start, *inner), at)

    def _read(self, dtype: str, shape: Shape, at: int, room: Room = torch.empty) -> torch.Tensor:
        made = room(shape, dtype=getattr(torch, dtype))
        if not read_into(made.reshape(-1).view(torch.uint8).numpy(), self.path, at):
            raise CheckpointError(f"{self.path} became shorter while it was read")
        return made

    def stored(self, key: str) -> StoredTensor:
        """A tensor that is read when it is asked for."""
        entry = self.header.entries[key]
        return StoredTensor(entry.shape, entry.dtype, partial(self.tensor, key))

    def to_read(self, key: str) -> StoredTensor:
        """The same in memory of its own: of a mapped file, all pages ever touched stay resident."""
        entry = self.header.entries[key]
        load = partial(self._read, entry.dtype, entry.shape, entry.start)
        return StoredTensor(entry.shape, entry.dtype, load, partial(self.rows, key))


class TensorFolder:
    """All safetensors files of a model: one file, or a folder with one, or with shards.

    Attributes:
        path: what was given.
        files: the files by name.
        file_of: the file that has a key.

    Args:
        path: a file, or a folder with ``model.safetensors.index.json``, ``model.safetensors``, the
            same of diffusers, or any other files of that kind: the first that is there counts.

    Raises:
        FileNotFoundError: if there are none.
        CheckpointError: if a file is broken, the index names a file elsewhere or a key that its
            file lacks, or two files have the same key.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.files: dict[str, TensorFile] = {}
        self.file_of: dict[str, TensorFile] = {}
        at, index = self._index()
        for file in self._paths(at, index):
            opened = self.files[file.name] = TensorFile(file)
            for key in opened.header.entries:
                if key in self.file_of:
                    both = f"{self.file_of[key].path.name} and {file.name}"
                    raise CheckpointError(f"{self.path}: {key} is both in {both}")
                self.file_of[key] = opened
        for key, name in index.items():
            if key not in self.file_of or self.file_of[key].path.name != name:
                raise CheckpointError(f"{at} has {key} in {name}, which lacks it")

    def _index(self) -> tuple[Path, dict[str, str]]:
        """The index, and which file it says has which key."""
        paths = [self.path / f"{stem}.safetensors.index.json" for stem in _STEMS]
        path = next(filter(Path.is_file, paths), paths[0])
        if not path.is_file():
            return path, {}
        index = read_json(path).get("weight_map")
        if not isinstance(index, dict):
            raise CheckpointError(f"{path} has no weight_map")
        return path, index

    def _paths(self, at: Path, index: dict[str, str]) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        if not self.path.is_dir():
            raise FileNotFoundError(f"{self.path} is neither a folder nor a file")
        try:
            named = [member(self.path, name) for name in dict.fromkeys(index.values())]
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{at}: {error}") from None
        singles = (self.path / f"{stem}.safetensors" for stem in _STEMS)
        found = named or [*filter(Path.is_file, singles)][:1]
        found = found or sorted(self.path.glob("*.safetensors"))
        if not found:
            raise FileNotFoundError(f"the folder {self.path} has no safetensors files")
        return found

    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor by its key, to be read when asked for."""
        return {key: file.stored(key) for key, file in self.file_of.items()}

    def entry(self, key: str) -> Entry:
        """Shape, dtype and place of a tensor."""
        return self.file_of[key].header.entries[key]


class TensorWriter:
    """Writes a safetensors file whose tensors come one by one, in any order.

    The largest numbers stand first, so that each tensor begins at a multiple of its numbers' size;
    among equals keys are sorted, so that the same tensors give the same file.

    Args:
        path: of the file, which is made new.
        tensors: dtype (torch's name) and shape by key.
        metadata: texts for the header.

    Raises:
        CheckpointError: for a key or a dtype that such files cannot have.

    Attributes:
        sha256: of each tensor's bytes, once it is written.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import load_file
        >>> with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        ...     with TensorWriter(file.name, {"a": ("float32", (2,))}) as writer:
        ...         writer.write("a", torch.tensor([1.0, 2.0]))
        ...     load_file(file.name)
        {'a': tensor([1., 2.])}
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        tensors: Mapping[str, tuple[str, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        self.sha256: dict[str, str] = {}
        self._wanted = dict(tensors)
        head: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        self._starts: dict[str, int] = {}
        for key, (dtype, shape) in self._wanted.items():
            _check_writable(key, dtype, shape)
        at = 0
        for key in sorted(self._wanted, key=lambda key: (-_itemsize(self._wanted[key][0]), key)):
            dtype, shape = self._wanted[key]
            self._starts[key], end = at, at + math.prod(shape) * _itemsize(dtype)
            kind, sizes = _NAMES[dtype], [*shape]
            sizes[-1:] = [size * _TOGETHER.get(kind, 1) for size in sizes[-1:]]
            head[key] = {"dtype": kind, "shape": sizes, "data_offsets": [at, end]}
            at = end
        text = json.dumps(head, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        self._head = struct.pack("<Q", len(text)) + text
        self.header_sha256 = hashlib.sha256(self._head).hexdigest()
        self.nbytes = len(self._head) + at

    def __enter__(self) -> Self:
        self._file = self.path.open("wb")
        self._file.write(self._head)
        return self

    def write(self, key: str, tensor: torch.Tensor) -> None:
        """Write a tensor, on any device, to its place.

        Raises:
            CheckpointError: if it has another dtype or shape than was announced, or is on meta.
        """
        dtype, shape = self._wanted[key]
        given = str(tensor.dtype).removeprefix("torch.")
        if (given, tuple(tensor.shape)) != (dtype, tuple(shape)):
            raise CheckpointError(
                f"{key} was announced as {dtype} {shape} and is {given} {tuple(tensor.shape)}"
            )
        if tensor.is_meta:
            raise CheckpointError(f"{key} is on meta: it has no numbers to write")
        plain = tensor.detach().resolve_conj().resolve_neg()
        flat = plain.cpu().contiguous().reshape(-1)
        data = memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")
        self._file.seek(len(self._head) + self._starts[key])
        self._file.write(data)
        self.sha256[key] = hashlib.sha256(data).hexdigest()

    def __exit__(self, kind: Any, *rest: Any) -> None:
        with self._file:
            if kind is not None:
                return
            lost = [key for key in self._wanted if key not in self.sha256]
            if lost:
                raise CheckpointError(f"{self.path}: {lost[0]} was announced and not written")
            self._file.flush()
            os.fsync(self._file.fileno())


def _check_writable(key: str, dtype: str, shape: tuple[int, ...]) -> None:
    is_text = all(ord(sign) >= 32 and not 0xD800 <= ord(sign) < 0xE000 for sign in key)
    if not is_text or key == "__metadata__":
        raise CheckpointError(f"{key!r} cannot be the key of a tensor in a safetensors file")
    if dtype not in _NAMES or (_NAMES[dtype] in _TOGETHER and not shape):
        raise CheckpointError(
            f"safetensors files have no dtype {dtype}, as {key} has: {', '.join(_NAMES)}"
        )


def _itemsize(dtype: str) -> int:
    return getattr(torch, dtype).itemsize
