"""Packages that only some features need: the extras."""

from __future__ import annotations

from importlib import import_module, metadata
from types import ModuleType

__all__ = ["install_command", "need"]

#: Name of the distribution on a package index, where ``quantization`` is somebody else's.
DISTRIBUTION = "qwqa"


def install_command(extra: str) -> str:
    """What a user types to get the packages of an extra.

    Example:
        >>> install_command("gguf")
        'pip install "qwqa[gguf]"'
    """
    return f'pip install "{DISTRIBUTION}[{extra}]"'


def need(module: str, extra: str, least: str = "") -> ModuleType:
    """A module of a package that is an extra.

    Args:
        module: its name.
        extra: of this package, which installs it.
        least: the least version that will do, numbers and dots.

    Raises:
        ImportError: if it is not installed, or older; the message says what is there and how to get
            what is needed.

    Example:
        >>> need("json", "gguf").__name__
        'json'
    """
    remedy = install_command(extra)
    wanted = f"{module} {least} or later" if least else module
    try:
        found = metadata.version(module) if least else ""
        if _numbers(found) >= _numbers(least):
            return import_module(module)
    except (ImportError, metadata.PackageNotFoundError) as error:
        raise ImportError(f"{wanted} is needed: {remedy} ({error})") from error
    raise ImportError(f"{module} {found} is installed, {least} or later is needed: {remedy}")


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdigit())
