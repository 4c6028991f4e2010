"""Formats of other programs: which there are, and what reads and writes them.

A conversion is ``writer(b)(reader(a)(source), destination)``; what lies between is a
:class:`quantization.checkpoint.stored_model.StoredModel`, whose tensors are read one at a time. It
is lossless or refused with a :class:`FormatError` that says why.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from quantization.formats.errors import FormatError

__all__ = ["FORMATS", "FormatError", "reader", "writer"]

#: Name -> (module of this package, whether it reads, whether it writes). A module ``m`` has
#: ``read_m(path)`` and ``write_m(stored, path, *, overwrite=False)``.
FORMATS: dict[str, tuple[str, bool, bool]] = {
    "awq": ("awq", True, False),
    "compressed-tensors": ("compressed_tensors", True, True),
    "gguf": ("gguf", True, True),
    "gptq": ("gptq", True, False),
    "onnx": ("onnx", False, True),
}


def reader(name: str) -> Callable[..., Any]:
    """The function that reads a format: path -> StoredModel.

    Raises:
        ValueError: if there is none of that name.

    Example:
        >>> reader("gptq").__name__
        'read_gptq'
        >>> reader("onnx")
        Traceback (most recent call last):
            ...
        ValueError: 'onnx' is none of the formats that can be read: awq, ...
    """
    return _function(name, "read")


def writer(name: str) -> Callable[..., None]:
    """The function that writes a format: (StoredModel, path, overwrite=False) -> None.

    Raises:
        ValueError: if there is none of that name.

    Example:
        >>> writer("compressed-tensors").__name__
        'write_compressed_tensors'
    """
    return _function(name, "write")


def _function(name: str, verb: str) -> Callable[..., Any]:
    able = {key: row[0] for key, row in FORMATS.items() if row[1 if verb == "read" else 2]}
    if name not in able:
        how = {"read": "read", "write": "written"}[verb]
        raise ValueError(
            f"{name!r:.60} is none of the formats that can be {how}: {', '.join(sorted(able))}"
        )
    return getattr(import_module(f"{__name__}.{able[name]}"), f"{verb}_{able[name]}")
