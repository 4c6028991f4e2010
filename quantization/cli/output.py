"""What commands print: plain lines and tables for readers, or one JSON object."""

from __future__ import annotations

import json
import math
from typing import Any

from quantization.console.table import Tabular

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

    def table(self, table: Tabular[Any]) -> None:
        """A table as wide as the terminal.

        Example:
            >>> from quantization.console.table import table_of
            >>> Output(as_json=False).table(table_of(("layer", "bits"), [("a", 4), ("head", 16)]))
            layer  bits
            a         4
            head     16
        """
        self.line(str(table))

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
