"""How far something is, on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, TypeVar

__all__ = ["Progress", "progress", "shown", "telling"]

Item = TypeVar("Item")

#: Called with (done, total) while something goes on.
Progress = Callable[[int, int], None]

_PAUSE = 2.0  # seconds between two lines


@contextmanager
def progress(label: str, unit: str = "it", delay: float = 0.0) -> Iterator[Progress]:
    """A function that shows how far something is.

    On a terminal and in a notebook it moves the bar of tqdm, if that is installed, with the time
    that is left; elsewhere it says each tenth, at most every two seconds.

    Args:
        label: what goes on.
        unit: of what is counted; ``"B"`` for bytes.
        delay: seconds before anything is shown.

    Example:
        >>> with progress("reading", "B") as show:
        ...     show(1, 2)
        ...     show(2, 2)
    """
    bars = _bars()
    if bars is None:
        yield _tenths(label)
        return
    with bars(unit=unit, unit_scale=True, desc=label, delay=delay) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


@contextmanager
def shown(
    wanted: Progress | bool | None, label: str, items: Iterable[Item]
) -> Iterator[Iterable[Item]]:
    """The same items, with a word after each of how far they are, if that is wanted.

    Args:
        wanted: True for a bar, a function to call, or False; None: a bar where a reader sits, on a
            terminal or in a notebook, if it takes longer than a second. Nothing is told of items
            without len().
        label: what goes on.
        items: what is gone through.

    Example:
        >>> with shown(print, "reading", "ab") as letters:
        ...     "".join(letters)
        1 2
        2 2
        'ab'
    """
    if not isinstance(items, Sized):
        yield items
        return
    with telling(wanted, label) as show:

        def told() -> Iterator[Item]:
            for done, item in enumerate(items, start=1):
                yield item
                show(done, len(items))

        yield told()


@contextmanager
def telling(wanted: Progress | bool | None, label: str, unit: str = "it") -> Iterator[Progress]:
    """The function that tells how far something is, as ``wanted`` of :func:`shown` says.

    Example:
        >>> with telling(print, "reading") as show:
        ...     show(1, 2)
        1 2
    """
    if callable(wanted):
        yield wanted
    elif wanted is False or (wanted is None and _bars() is None):
        yield lambda done, total: None
    else:
        with progress(label, unit, delay=1.0 if wanted is None else 0.0) as show:
            yield show


def _bars() -> Any:
    """The class of bars that the reader can see; None where there is no reader, or no tqdm."""
    is_notebook = "ipykernel" in sys.modules
    if not is_notebook and not sys.stderr.isatty():
        return None
    try:
        if is_notebook and find_spec("ipywidgets") is not None:
            from tqdm.auto import tqdm
        else:
            from tqdm import tqdm
    except ModuleNotFoundError:
        return None
    return tqdm


def _tenths(label: str) -> Progress:
    last_time, last_tenth = time.monotonic(), 0

    def show(done: int, total: int) -> None:
        nonlocal last_time, last_tenth
        now, tenth = time.monotonic(), 10 * done // total if total else 10
        if tenth > last_tenth and now - last_time > _PAUSE:
            last_time, last_tenth = now, tenth
            print(f"  {label}: {10 * tenth} %", file=sys.stderr, flush=True)

    return show
