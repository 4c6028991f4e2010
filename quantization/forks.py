"""Whether this process was forked, and torch's operators where its threads did not come along.

After one parallel operator in the parent, the next one in a forked child waits for ever for threads
that stayed behind. The kernels know (csrc/api/parallel.c); here is the rest.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_here = {"is_child": False}


def is_child() -> bool:
    """Whether this process was forked after the package was imported.

    Example:
        >>> is_child()
        False
    """
    return _here["is_child"]


@contextmanager
def alone() -> Iterator[None]:
    """In a forked child, torch's operators inside run on one thread; elsewhere nothing changes.

    Example:
        >>> with alone():
        ...     pass
    """
    torch = sys.modules.get("torch") if is_child() else None
    threads = torch.get_num_threads() if torch is not None else 1
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _here.update(is_child=True))
