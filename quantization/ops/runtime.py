"""Which instruction set runs, and on how many threads: the settings of the process.

``QUANTIZATION_ISA=name`` in the environment makes the choice at import, or raises.
"""

from __future__ import annotations

import os

from quantization import _kernels
from quantization.ops.dtypes import index_of


def isas() -> tuple[str, ...]:
    """Names of the instruction sets that this build has and this CPU runs, best first.

    Example:
        >>> isas()[-1]  # plain C, the definition of every kernel, runs everywhere
        'reference'
    """
    return _kernels.isas()


def active_isa() -> str:
    """Name of the instruction set whose kernels run now.

    Example:
        >>> active_isa() in isas()
        True
    """
    return _kernels.active_isa()


def set_isa(name: str) -> None:
    """Run the kernels of one instruction set from now on, in the whole process.

    Args:
        name: one of :func:`isas`.

    Raises:
        ValueError: if this build does not have it or this CPU does not run it; nothing changes.

    Example:
        >>> before = active_isa()
        >>> set_isa("reference")
        >>> active_isa()
        'reference'
        >>> set_isa(before)
    """
    try:
        _kernels.set_isa(name)
    except ValueError:
        raise ValueError(
            f"instruction set {name!r} is not available here; allowed are {', '.join(isas())}"
        ) from None


def get_num_threads() -> int:
    """Threads that a large enough call uses.

    Example:
        >>> get_num_threads() >= 1
        True
    """
    return _kernels.get_num_threads()


def set_num_threads(threads: int | None) -> None:
    """Choose how many threads a large enough call uses.

    Args:
        threads: ``None`` follows torch (``torch.set_num_threads``) when it is loaded and is 1
            without it, the default; a number uses that many threads of our own, made for each call.

    Raises:
        TypeError: if ``threads`` is neither an integer nor None.
        ValueError: if ``threads`` is below 1 or above 1024.

    Example:
        >>> set_num_threads(2)
        >>> get_num_threads()
        2
        >>> set_num_threads(None)
    """
    if threads is not None and not 1 <= index_of(threads, "threads") <= 1024:
        raise ValueError(f"threads must be 1..1024 or None, not {threads}")
    _kernels.set_num_threads(threads or 0)


if _forced := os.environ.get("QUANTIZATION_ISA"):
    try:
        set_isa(_forced)
    except ValueError as error:
        raise ValueError(f"QUANTIZATION_ISA: {error}") from None
