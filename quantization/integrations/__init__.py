"""What other libraries need to know of quantized layers, one module a library.

Each is imported by the user, or by the first swap of layers in a process that has the library in
use; importing one is harmless anywhere and twice.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib import import_module
from typing import Any

__all__ = ["note_swap"]

# What is in sys.modules once a library holds models -> the module here that knows it.
_HOMES = {
    "transformers.modeling_utils": "transformers",
    "peft": "peft",
    "diffusers": "foreign_saves",
    "sentence_transformers": "foreign_saves",
}


def note_swap(model: Any) -> None:
    """Let every library that is in use take note of a swap of layers.

    A library of a version that is not known here is left alone.

    Args:
        model: what layers were swapped in.

    Example:
        >>> import torch
        >>> from quantization import quantize_model
        >>> note_swap(quantize_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), "w4").model)
    """
    for library, home in _HOMES.items():
        if library in sys.modules:
            with suppress(ImportError):
                note = getattr(import_module(f"{__name__}.{home}"), "note_swap", None)
                if note is not None:
                    note(model)
