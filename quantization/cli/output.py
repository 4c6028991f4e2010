"""What commands print: tables and bars where a terminal is, plain lines or one JSON object else."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

__all__ = ["Output"]


class Output:
    """The output of one command.

    Args:
        as_json: print one JSON object at the end, and nothing else, to stdout.

    Example:
        >>> out = Output(as_json=True)
        >>> out.line("only for readers")
        >>> out.finish({"layers": 2})
        {"layers": 2}
    """

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json

    def line(self, text: str = "") -> None:
        """A line for readers."""
        if not self._as_json:
            print(text, flush=True)

    def table(self, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Columns, words aligned left and numbers right; by rich on a terminal.

        Example:
            >>> Output(as_json=False).table(("layer", "bits"), [("a", 4), ("head", 16)])
            layer  bits
            a         4
            head     16
        """
        if self._as_json:
            return
        cells = [[str(cell) for cell in row] for row in rows]
        if not (sys.stdout.isatty() and _by_rich(head, cells)):
            columns = list(zip(head, *cells, strict=True))
            widths = [max(map(len, column)) for column in columns]
            for row in (head, *cells):
                places = zip(head, row, widths, strict=True)
                print("  ".join(f"{cell:{_side(name)}{w}}" for name, cell, w in places).rstrip())

    @contextmanager
    def bar(self, what: str) -> Iterator[Callable[[int, int], None] | None]:
        """A bar over bytes with the time that is left, if tqdm and a terminal are there."""
        try:
            from tqdm import tqdm
        except ModuleNotFoundError:
            tqdm = None
        if tqdm is None or not sys.stderr.isatty():
            yield None
            return
        with tqdm(unit="B", unit_scale=True, desc=what) as bar:

            def tell(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            yield tell

    def finish(self, result: dict[str, Any]) -> None:
        """The result, if it is to be JSON, which has no NaN: null stands for it.

        Example:
            >>> Output(as_json=True).finish({"bits": float("nan")})
            {"bits": null}
        """
        if self._as_json:
            print(json.dumps(_finite(result)))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_WORDS = {"layer", "tensor", "what", "kernel", "scheme"}


def _side(name: str) -> str:
    return "<" if name in _WORDS else ">"


def _by_rich(head: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        return False
    table = Table(header_style="bold", box=None, pad_edge=False)
    for name in head:
        table.add_column(name, justify="left" if _side(name) == "<" else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(markup=False, highlight=False).print(table)  # a name with [..] is no markup
    return True
