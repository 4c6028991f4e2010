"""What commands print: tables and bars where a terminal is, plain lines or one JSON object else."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from quantization.console.tables import is_text, table_lines

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
        if not (sys.stdout.isatty() and _by_rich(head, rows)):
            print(*table_lines([head, *rows]), sep="\n")

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


def _by_rich(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> bool:
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        return False
    table = Table(header_style="bold", box=None, pad_edge=False)
    for name in head:
        table.add_column(name, justify="left" if is_text(name) else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(str, row))
    Console(markup=False, highlight=False).print(table)  # a name with [..] is no markup
    return True
