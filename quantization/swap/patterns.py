"""Patterns that name modules of a model, and the nearest names where one matches none."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from quantization.swap.regular import Regular
from quantization.swap.walker import Site, inherit, walk

#: What may name modules: a name, a glob, ``re:...``, a module type, or predicate(name, module).
Pattern = str | type[nn.Module] | Callable[[str, nn.Module], bool]


def match_patterns(sites: list[Site], patterns: Pattern | Iterable[Pattern]) -> dict[int, str]:
    """Ids of the modules that a pattern names, or that such a module holds -> the pattern's text.

    Args:
        sites: all places of the model.
        patterns: one pattern or several. A plain text is a child name (``"lm_head"``) or a dotted
            name (``"encoder.layers.0"``); with ``*``, ``?`` or ``[`` it is a glob over either;
            ``"re:..."`` is a regular expression searched for in the dotted name; a module type
            matches its instances; a callable is asked with (dotted name, module).

    Raises:
        TypeError: for a pattern of another kind (None included: no patterns are ``()``).
        ValueError: for a pattern that matches no module of the model, with the nearest names.

    Example:
        >>> from quantization.swap.walker import walk
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
        >>> sorted(match_patterns(list(walk(model)), "1").values())
        ["'1'", "'1'"]
    """
    if isinstance(patterns, str) or callable(patterns) or not isinstance(patterns, Iterable):
        patterns = [patterns]
    own: dict[int, str] = {}
    for pattern in patterns:
        own |= dict.fromkeys(matching(sites, pattern), pattern_text(pattern))
    return inherit(sites, own)


def matching(sites: list[Site], pattern: Pattern) -> list[int]:
    """Ids of the modules that one pattern names itself, whatever these hold.

    Raises:
        TypeError: for a pattern of another kind.
        ValueError: for a pattern that matches no module of the model, with the nearest names.

    Example:
        >>> from quantization.swap.walker import walk
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
        >>> len(matching(list(walk(model)), nn.Linear))
        2
    """
    test = _compile(pattern)
    matched = [id(site.module) for site in sites if test(site)]
    if not matched:
        raise ValueError(_no_match(pattern, sites))
    return matched


def exact_pattern(model: nn.Module, name: str) -> str:
    """What names this module and no other: its name, or that as a regular expression.

    Example:
        >>> model = nn.Sequential(nn.Sequential(nn.ReLU()), nn.ReLU())
        >>> exact_pattern(model, "0.0"), exact_pattern(model, "0")
        ('0.0', 're:^0$')
    """
    if name and len(matching(list(walk(model)), name)) == 1:
        return name
    return f"re:^{re.escape(name)}$"


def _compile(pattern: Any) -> Callable[[Site], bool]:
    if isinstance(pattern, type) and issubclass(pattern, nn.Module):
        return lambda site: isinstance(site.module, pattern)
    if isinstance(pattern, str):
        return _compile_text(pattern)
    if callable(pattern) and not isinstance(pattern, type | nn.Module):
        return lambda site: bool(pattern(site.name, site.module))
    raise TypeError(
        f"cannot choose modules by {pattern!r}; a pattern is a child name, a dotted name, a glob, "
        "'re:<regular expression>', a module type or a predicate(name, module)"
    )


def _compile_text(pattern: str) -> Callable[[Site], bool]:
    if pattern.startswith("re:"):
        regular = Regular(pattern.removeprefix("re:"))
        return lambda site: regular.search(site.name)
    if any(sign in pattern for sign in "*?["):
        glob = re.compile(fnmatch.translate(pattern)).match
        return lambda site: (
            glob(site.name) is not None or glob(site.key) is not None or site.name == pattern
        )
    return lambda site: site.parent is not None and pattern in (site.name, site.key)


def pattern_text(pattern: Pattern) -> str:
    """A pattern for reading.

    Example:
        >>> pattern_text("lm_head"), pattern_text(nn.Linear)
        ("'lm_head'", 'Linear')
    """
    if isinstance(pattern, str):
        return repr(pattern)
    return getattr(pattern, "__qualname__", None) or repr(pattern)


def _no_match(pattern: Pattern, sites: list[Site]) -> str:
    if isinstance(pattern, str):
        names = dict.fromkeys(name for site in sites for name in (site.name, site.key) if name)
        wanted = pattern.removeprefix("re:")
    else:
        names = dict.fromkeys(type(site.module).__name__ for site in sites)
        wanted = getattr(pattern, "__name__", "")
    short = [name for name in names if len(name) <= 200]
    near = difflib.get_close_matches(wanted, short, n=3, cutoff=0.5) or short[:3]
    return (
        f"the pattern {pattern_text(pattern)} matches no module of the model, so nothing was "
        "changed; the nearest names are "
        f"{', '.join(map(repr, near)) or 'none: the model has no children'}"
    )
