"""The header of a GGUF file, read with nothing in it trusted, and its tensors as views.

The package gguf has a reader, too. It believes each length, so that one that lies can make it count
for hours, and it walks over each token of a tokenizer, seconds for a large one. Here lengths, types
and offsets are held against the size of the file, and arrays of metadata are passed over.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from quantization.checkpoint.disk.files import regular
from quantization.formats.errors import FormatError
from quantization.ops.extras import need

__all__ = ["FileTensor", "Header", "read_header"]

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_STRING, _ARRAY, _UINT32 = 8, 9, 4
_FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FEWEST_BYTES = {"values of metadata": 13, "tensors": 24, "strings": 8}
_MOST_DIMENSIONS = 4
_LARGEST_EMPTY = 1 << 24  # size of a tensor without numbers, whose bytes bound nothing
_ALIGNMENT = "general.alignment"
_DTYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "BF16": "<u2"}
_DTYPES |= {f"I{8 * size}": f"<i{size}" for size in (1, 2, 4, 8)}


class FileTensor(NamedTuple):
    """A tensor of a file.

    Attributes:
        name: in the file.
        type: of its blocks or numbers, as ggml calls it.
        shape: as torch has it.
        data: a view of the file, which stays as it is if this is written to: numbers in that shape
            (bfloat16 as its bits, uint16), or the bytes of blocks, uint8 ``[..., bytes of a row]``.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    data: np.ndarray


class Header(NamedTuple):
    """What a file says: its metadata but for arrays, by key, and its tensors."""

    facts: dict[str, Any]
    tensors: tuple[FileTensor, ...]


def read_header(path: str | os.PathLike[str]) -> Header:
    """The header of a GGUF file, once all of it is sound.

    Raises:
        ImportError: if gguf is not installed, which knows the types.
        FileNotFoundError: if there is no such file.
        FormatError: if it is no GGUF file, or not a whole one.

    Example:
        >>> read_header("model.gguf").facts["general.architecture"]  # doctest: +SKIP
        'llama'
    """
    gguf, path = need("gguf", "gguf"), Path(path)
    if path.is_dir():
        raise FormatError(f"{path} is a folder, no GGUF file")
    try:
        regular(path)
    except ValueError as error:
        raise FormatError(f"{error}, so no GGUF file") from None
    with path.open("rb") as stream:
        if stream.read(len(_MAGIC)) != _MAGIC:
            raise FormatError(f"{path} is no GGUF file: it does not start with {_MAGIC!r}")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                walk = _Walk(data, gguf)
                facts, entries = walk.whole()
            except (FormatError, UnicodeDecodeError) as error:
                raise FormatError(f"{path} is damaged: {error}") from None
    content = np.memmap(path, mode="c")
    return Header(facts, tuple(_view(content, *entry) for entry in entries))


class _Entry(NamedTuple):
    name: str
    type: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def _view(
    content: np.ndarray, name: str, kind: str, shape: tuple[int, ...], start: int, nbytes: int
) -> FileTensor:
    data = np.asarray(content[start : start + nbytes])
    if kind in _DTYPES:
        return FileTensor(name, kind, shape, data.view(_DTYPES[kind]).reshape(shape))
    row = nbytes // max(math.prod(shape[:-1]), 1)
    return FileTensor(name, kind, shape, data.reshape(*shape[:-1], row))


class _Walk:
    """A walk through the bytes of a header, from its start to its end."""

    def __init__(self, data: mmap.mmap, gguf: Any) -> None:
        self.data, self.at = data, len(_MAGIC)
        self.alignment = gguf.GGUF_DEFAULT_ALIGNMENT
        self.kinds = {int(kind): (kind.name, *both) for kind, both in gguf.GGML_QUANT_SIZES.items()}

    def whole(self) -> tuple[dict[str, Any], list[_Entry]]:
        """Metadata and tensors; FormatError unless all is known, and where and as long as said."""
        (version,) = self._read("I")
        if version not in _VERSIONS:
            raise FormatError(
                f"it is of version {version}; versions {_VERSIONS} in little endian are read"
            )
        tensors, values = self._read("QQ")
        self._check_count(values, "values of metadata")
        facts = self._metadata(values)
        self._check_count(tensors, "tensors")
        entries = [self._entry() for _ in range(tensors)]
        start = -(-self.at // self.alignment) * self.alignment
        entries = [entry._replace(start=start + entry.start) for entry in entries]
        self._check_places(entries)
        return facts, entries

    def _read(self, form: str) -> tuple[Any, ...]:
        size = struct.calcsize("<" + form)
        self._skip(size)
        return struct.unpack_from("<" + form, self.data, self.at - size)

    def _skip(self, size: int) -> None:
        if self.at + size > len(self.data):
            raise FormatError(
                f"it ends at byte {len(self.data)}, and {size} bytes of its header should be at "
                f"{self.at}"
            )
        self.at += size

    def _text(self) -> str:
        (length,) = self._read("Q")
        self._skip(length)
        return self.data[self.at - length : self.at].decode("utf-8")

    def _check_count(self, count: int, what: str) -> None:
        if count * _FEWEST_BYTES[what] > len(self.data) - self.at:
            raise FormatError(f"it says that it has {count} {what}, more than its bytes can hold")

    # ---- metadata ----------------------------------------------------------------------------

    def _metadata(self, count: int) -> dict[str, Any]:
        keys: set[str] = set()
        facts = {}
        for _ in range(count):
            key = self._text()
            if key in keys:
                raise FormatError(f"it has the metadata {key} twice")
            keys.add(key)
            (kind,) = self._read("I")
            if kind == _ARRAY:
                self._skip_array(key)
            else:
                facts[key] = self._value(key, kind)
            if key == _ALIGNMENT:
                self.alignment = _checked_alignment(kind, facts.get(key))
        return facts

    def _value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind not in _FORMS:
            raise FormatError(f"the metadata {key} is of the unknown type {kind}")
        return self._read(_FORMS[kind])[0]

    def _skip_array(self, key: str) -> None:
        kind, count = self._read("IQ")
        if kind in _FORMS:
            self._skip(count * struct.calcsize("<" + _FORMS[kind]))
        elif kind == _STRING:
            self._check_count(count, "strings")
            for _ in range(count):
                self._skip(self._read("Q")[0])
        else:
            raise FormatError(f"the metadata {key} is an array of the unknown type {kind}")

    # ---- tensors -----------------------------------------------------------------------------

    def _entry(self) -> _Entry:
        """The next tensor, its start counted from that of all tensors."""
        name = self._text()
        (dimensions,) = self._read("I")
        if dimensions > _MOST_DIMENSIONS:
            raise FormatError(f"the tensor {name} says that it has {dimensions} dimensions")
        shape = self._read(f"{dimensions}Q")[::-1]
        kind, start = self._read("IQ")
        if kind not in self.kinds:
            raise FormatError(f"the tensor {name} is of the unknown type {kind}")
        if 0 in shape and max(shape) > _LARGEST_EMPTY:
            raise FormatError(f"the tensor {name} has no numbers, and the shape {shape}")
        if start % self.alignment:
            raise FormatError(f"the tensor {name} is at {start}, no multiple of {self.alignment}")
        type_name, length, size = self.kinds[kind]
        if length > 1 and (not shape or shape[-1] % length):
            raise FormatError(f"rows of the tensor {name} are no whole blocks of {length}: {shape}")
        return _Entry(name, type_name, shape, start, math.prod(shape) // length * size)

    def _check_places(self, entries: list[_Entry]) -> None:
        """Raise unless all tensors lie in the file, none over another, each name once."""
        names: set[str] = set()
        end, last = 0, ""
        for name, _, _, start, nbytes in sorted(entries, key=lambda entry: entry[3:]):
            if name in names:
                raise FormatError(f"it has the tensor {name} twice")
            names.add(name)
            if start + nbytes > len(self.data):
                raise FormatError(
                    f"the tensor {name} should end at byte {start + nbytes}, and the file ends at "
                    f"{len(self.data)}"
                )
            if start < end and nbytes:
                raise FormatError(f"the tensors {last} and {name} lie over each other")
            if nbytes:
                end, last = start + nbytes, name


def _checked_alignment(kind: int, value: Any) -> int:
    if kind != _UINT32 or value < 1 or value & (value - 1):
        raise FormatError(f"{_ALIGNMENT} is no power of two as a 32-bit number")
    return value
