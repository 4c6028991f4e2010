"""What other libraries need to know of quantized layers, one module a library.

Each is imported by the user, or by the first swap of layers in a process that has the library in
use; importing one is harmless anywhere and twice.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib import import_module, metadata
from typing import Any

__all__ = ["need", "tell"]

# What is in sys.modules once a library holds models -> the module here that knows it.
_HOMES = {"transformers.modeling_utils": "transformers", "peft": "peft"}


def tell(report: Any) -> None:
    """Let every library that is in use take note of a swap of layers.

    A library of a version that is not known here is left alone.

    Args:
        report: the :class:`quantization.ReplacementReport` of the swap.

    Example:
        >>> import torch
        >>> from quantization import quantize_model
        >>> tell(quantize_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), "w4"))
    """
    for library, home in _HOMES.items():
        if library in sys.modules:
            with suppress(ImportError):
                follow = getattr(import_module(f"{__name__}.{home}"), "follow", None)
                if follow is not None:
                    follow(report)


def need(library: str, least: str, extra: str) -> None:
    """Raise unless a library is installed, of that version or a later one.

    Args:
        library: its name.
        least: the least version, numbers and dots.
        extra: of this package, which installs it.

    Raises:
        ImportError: if it is not; the message says what is there and how to get what is needed.

    Example:
        >>> need("torch", "2.10", "torch")
    """
    remedy = f'pip install "quantization[{extra}]"'
    try:
        found = metadata.version(library)
    except metadata.PackageNotFoundError:
        raise ImportError(f"{library} {least} or later is needed: {remedy}") from None
    if _numbers(found) < _numbers(least):
        raise ImportError(f"{library} {found} is installed, {least} or later is needed: {remedy}")


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdigit())
