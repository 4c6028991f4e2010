"""A hint at the name that was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean"]


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of a message about a name that there is not; empty where none is near.

    Example:
        >>> did_you_mean("gptk", ["lsq", "gptq"]), did_you_mean("x", ["lsq"])
        ("; did you mean 'gptq'?", '')
    """
    near = difflib.get_close_matches(str(name), list(map(str, names)), 1)
    return f"; did you mean {near[0]!r}?" if near else ""
