"""What the formats raise, and how they reach for packages that are extras."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["FormatError", "need"]


class FormatError(ValueError):
    """A file is damaged, or what is to be read or written has no place in the format."""


def need(module: str, extra: str) -> ModuleType:
    """A module of a package that is an extra.

    Raises:
        ImportError: if it is not installed; the message names the extra.

    Example:
        >>> need("json", "gguf").__name__
        'json'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'this needs {module}: pip install "quantization[{extra}]" ({error})'
        ) from error
