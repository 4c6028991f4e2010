"""Packages that formats need and that are extras."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

__all__ = ["need"]


def need(module: str, extra: str) -> ModuleType:
    """A module of a package that is an extra.

    Raises:
        ImportError: if it is not installed; the message names the extra.

    Example:
        >>> need("json", "gguf").__name__
        'json'
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f'this needs {module}: pip install "quantization[{extra}]" ({error})'
        ) from error
