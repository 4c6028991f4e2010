"""JSON files of which every key counts: one object, no key twice, else a named error.

Values of Python take many times the bytes of their text, 24 times for ``[],[],[]``, so how many
there may be is counted before one of them is made.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from quantization.checkpoint.disk.files import regular

__all__ = ["CheckpointError", "parse_any", "parse_json", "read_json", "read_text"]

_MOST_BYTES = 100_000_000  # of a file
_MOST_BRACKETS = 2_000_000  # lists and objects; a header has three for each tensor
_MOST_VALUES = 8_000_000


class CheckpointError(ValueError):
    """A file or folder is not what it should be; the message names it and what is wrong."""


def parse_any(text: bytes, what: str) -> Any:
    """A JSON value in which no key of an object comes twice.

    Raises:
        CheckpointError: if it is none, or of more values than any checkpoint has.

    Example:
        >>> parse_any(b'[1, {"a": 2}]', "modules.json")
        [1, {'a': 2}]
    """
    brackets = text.count(b"[") + text.count(b"{")
    values = brackets + text.count(b",")
    if len(text) > _MOST_BYTES or brackets > _MOST_BRACKETS or values > _MOST_VALUES:
        raise CheckpointError(
            f"{what} has {len(text)} bytes, {brackets} lists and objects and {values} values; at "
            f"most {_MOST_BYTES}, {_MOST_BRACKETS} and {_MOST_VALUES} are read, which is more than "
            "any checkpoint needs"
        )

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise CheckpointError(f"{what} has the key {twice!r:.200} twice")
        return made

    try:
        return json.loads(text.decode(), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # of UTF-8, JSON, numbers of too many digits
        raise CheckpointError(f"{what} is not JSON: {error}") from None


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    """A JSON object in which no key comes twice.

    Raises:
        CheckpointError: if it is none, as :func:`parse_any` says.

    Example:
        >>> parse_json(b'{"a": 1, "a": 2}', "config.json")
        Traceback (most recent call last):
            ...
        quantization.checkpoint.disk.json_files.CheckpointError: config.json has the key 'a' twice
    """
    plain = parse_any(text, what)
    if not isinstance(plain, dict):
        raise CheckpointError(f"{what} is JSON, but no object")
    return plain


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a JSON file, as :func:`parse_json` reads it."""
    return parse_json(read_text(path), str(path))


def read_text(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a JSON file.

    Raises:
        OSError: if it cannot be read.
        CheckpointError: if it is no file, or too large for one of JSON.
    """
    path = Path(path)
    try:
        nbytes = regular(path).st_size
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if nbytes > _MOST_BYTES:
        raise CheckpointError(
            f"{path} has {nbytes} bytes; JSON of at most {_MOST_BYTES} bytes is read"
        )
    return path.read_bytes()
