"""JSON files of which every key counts: one object, no key twice, else a named error."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["CheckpointError", "parse_json", "read_json"]


class CheckpointError(ValueError):
    """A file or folder is not what it should be; the message names it and what is wrong."""


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    """A JSON object in which no key comes twice.

    Raises:
        CheckpointError: if it is none.

    Example:
        >>> parse_json(b'{"a": 1, "a": 2}', "config.json")
        Traceback (most recent call last):
            ...
        quantization.checkpoint.disk.json_files.CheckpointError: config.json has the key 'a' twice
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise CheckpointError(f"{what} has the key {twice!r} twice")
        return made

    try:
        plain = json.loads(text.decode(), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # of UTF-8, JSON, numbers of too many digits
        raise CheckpointError(f"{what} is not JSON: {error}") from None
    if not isinstance(plain, dict):
        raise CheckpointError(f"{what} is JSON, but no object")
    return plain


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a JSON file, as :func:`parse_json` reads it."""
    return parse_json(Path(path).read_bytes(), str(path))
