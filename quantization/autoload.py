"""Lets transformers read folders of this package without an import, where it is installed.

transformers has no entry points for quantizers. torch has: at the end of its import it calls what
packages name in the group ``torch.backends`` (``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` turns that off).
So :func:`register` is called, and waits for transformers to load its table of quantizers; what it
puts there loads this package when a folder asks for it, and costs nothing before.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from typing import Any

__all__ = ["METHOD", "METHODS", "register"]

#: What stands in ``config.json`` as ``quant_method``: where nobody knows it, that is what is shown.
METHOD = "quantization (first: import quantization.integrations.transformers)"
METHODS = (METHOD, "quantization")

_HOME = "quantization.integrations.transformers"
_TABLES = "transformers.quantizers.auto"


def register() -> None:
    """Add the quantizer to transformers, now or when it is imported; whatever fails is passed over.

    Example:
        >>> register()
    """
    with suppress(Exception):
        module = sys.modules.get(_TABLES)
        if module is None or not _add(module):
            sys.meta_path.insert(0, _Finder())


def _add(module: Any) -> bool:
    """Fill the tables of a module that has them by now."""
    names = ("AUTO_QUANTIZATION_CONFIG_MAPPING", "AUTO_QUANTIZER_MAPPING")
    tables = [vars(module).get(name) for name in names]
    for table in tables:
        for method in METHODS if table is not None else ():
            table.setdefault(method, _Config)
    return None not in tables


class _Config:
    """Stands for the config until one is asked for, whose import fills the tables anew."""

    @staticmethod
    def from_dict(*args: Any, **kwargs: Any) -> Any:
        """The real one's."""
        return import_module(_HOME).QuantizationConfig.from_dict(*args, **kwargs)


class _Finder(MetaPathFinder):
    """Sees the module with the tables being imported, once."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """That of the others; what they load is filled."""
        if name != _TABLES:
            return None
        with suppress(ValueError):
            sys.meta_path.remove(self)
        spec = find_spec(name)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            original = loader.exec_module

            def load(module: Any) -> None:
                original(module)
                with suppress(Exception):
                    _add(module)

            loader.exec_module = load
        return spec
