"""What commands print: plain lines and tables for readers, or one JSON object."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection
from html import escape
from typing import Any

from quantization.console.table import Tabular

__all__ = ["Output", "as_flags"]


class Output:
    """The output of one command.

    Args:
        form: ``"text"``; ``"markdown"`` or ``"html"``: tables as that; ``"json"``: one object at
            the end, and nothing else.
        flags: options of the command; words of Python in a line are told as these.

    Example:
        >>> out = Output("json")
        >>> out.line("only for readers")
        >>> out.finish({"layers": 2})
        {"layers": 2}
    """

    def __init__(self, form: str, flags: Collection[str] = ()) -> None:
        self._form, self._flags = form, flags

    def line(self, text: str = "") -> None:
        """A line for readers."""
        if self._form == "html":
            text = f"<p>{escape(text)}</p>"
        if self._form != "json":
            print(as_flags(text, self._flags), flush=True)

    def table(self, table: Tabular[Any]) -> None:
        """A table: as wide as the terminal, or Markdown, or HTML.

        Example:
            >>> from quantization.console.table import table_of
            >>> Output("text").table(table_of(("layer", "bits"), [("a", 4), ("head", 16)]))
            layer  bits
            a         4
            head     16
        """
        make = {"markdown": table.to_markdown, "html": table.to_html}.get(self._form, table.__str__)
        if self._form != "json":
            print(as_flags(make(), self._flags), flush=True)

    def finish(self, result: dict[str, Any]) -> None:
        """The result, if it is to be JSON, which has no NaN: null stands for it.

        Example:
            >>> Output("json").finish({"bits": float("nan")})
            {"bits": null}
        """
        if self._form == "json":
            print(json.dumps(_finite(result)))


def as_flags(text: str, flags: Collection[str]) -> str:
    """A message with the options of a command in the place of arguments of Python.

    Example:
        >>> as_flags("it is there; overwrite=True replaces it", ["overwrite", "nonfinite"])
        'it is there; --overwrite replaces it'
        >>> as_flags("nonfinite='mark' makes it NaN", ["overwrite", "nonfinite"])
        '--nonfinite mark makes it NaN'
    """

    def flag(match: re.Match[str]) -> str:
        name, value = match[1], match[2].strip("'\"")
        if name not in flags:
            return match[0]
        return f"--{name.replace('_', '-')}" + ("" if value == "True" else f" {value}")

    return re.sub(r"\b(\w+)=(True|'\w+'|\"\w+\")", flag, text)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
