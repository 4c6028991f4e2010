"""Weight quantization for PyTorch on C kernels: every part exposed.

>>> import torch
>>> from quantization import QWQALinearLayer, Target, replace_linear_layers_with_w8a16
>>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
>>> report = replace_linear_layers_with_w8a16(model, Target.Linear(QWQALinearLayer), ["2"])
>>> type(model[0]).__name__, type(model[2]).__name__
('QWQALinearLayer', 'Linear')

Names are loaded when first used, so the NumPy core works where torch is not installed; there
``from quantization import *`` gives what works, and any other name says what to install.
"""

import ast
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quantization import forks  # noqa: F401  hears of forks from now on
from quantization.swap import OBSERVERS
from quantization.version import VERSION

__version__ = VERSION

_STUB = Path(__file__).with_suffix(".pyi")  # where each name stands once, for checkers and for us
_HOME_OF = {
    alias.name: str(node.module)
    for node in ast.parse(_STUB.read_text(encoding="utf-8")).body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}


def __getattr__(name: str) -> Any:
    value: Any
    if name == "__all__":
        value = ["__version__", *(name for name, home in _HOME_OF.items() if _is_there(home))]
    elif name not in _HOME_OF:
        raise AttributeError(f"module 'quantization' has no attribute {name!r}")
    else:
        value = getattr(_home(name), name)
    globals()[name] = value
    return value


def _home(name: str) -> Any:
    try:
        return import_module(_HOME_OF[name])
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        remedy = import_module("quantization.ops.extras").install_command("torch")
        raise ImportError(f"quantization.{name} needs torch: {remedy}", name="torch") from error


def _has_torch() -> bool:
    try:
        return find_spec("torch") is not None
    except ImportError:
        return False


def _is_there(home: str) -> bool:
    """Whether names of a module can be had: without torch, not all of them."""
    try:
        return _has_torch() or bool(import_module(home))
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return False


def _notify_integrations(model: Any) -> None:
    import_module("quantization.integrations").note_swap(model)


OBSERVERS.append(_notify_integrations)


def __dir__() -> list[str]:
    return sorted(set(globals()) | {"__all__", *_HOME_OF})
