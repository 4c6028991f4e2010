"""Regular expressions that come to an end on any text.

``re`` tries one way through a pattern after the other, and ``(a+)+$`` has a way for each parting of
thirty letters, more than anybody waits for. A config that came with a download must not stop the
process: where the ways are few, ``re`` searches as ever; else all ways are gone at once, as a set
of places that can be reached, so that each part of the pattern meets each place once.

Source: K. Thompson, "Regular expression search algorithm" (1968).
"""

from __future__ import annotations

import re
from re import _compiler, _parser  # type: ignore[attr-defined]  # the only trees of patterns
from typing import Any

__all__ = ["Regular", "RegularError"]

_FEW_WAYS = 20_000  # some milliseconds
_MOST_STEPS = 20_000  # the same, of the other search
_LONGEST = 10_000  # letters of a pattern or a text
_REPEATS = (_parser.MAX_REPEAT, _parser.MIN_REPEAT)
_ASSERTS = (_parser.ASSERT, _parser.ASSERT_NOT)
_LETTERS = (_parser.LITERAL, _parser.NOT_LITERAL, _parser.ANY, _parser.IN)


class RegularError(ValueError):
    """A text that is no regular expression, or one that takes too long."""


class Regular:
    """A regular expression.

    Args:
        pattern: as ``re`` has it. Backreferences, atomic groups and conditions will do only where
            few ways lead through the pattern.

    Raises:
        RegularError: if it is none, or very long.

    Example:
        >>> Regular("(a+)+$").search("a" * 40 + "b")
        False
        >>> Regular(r".*[.](q|k)_proj").match("layers.0.q_proj")
        True
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        try:
            if len(pattern) > _LONGEST:
                raise ValueError(f"it has {len(pattern)} letters; at most {_LONGEST} are read")
            self._tree: Any = _parser.parse(pattern)
            self._compiled = re.compile(pattern)
            self._items: dict[int, Any] = {}
        except (re.error, ValueError, OverflowError, RecursionError) as error:
            raise RegularError(f"{pattern!r:.80} is no regular expression: {error}") from None

    def match(self, text: str) -> bool:
        """Whether it fits the begin of a text.

        Raises:
            RegularError: if that would take too long.
        """
        if _ways(self._tree, len(text)) <= _FEW_WAYS:
            return self._compiled.match(text) is not None
        return self._walk(text, 1)

    def search(self, text: str) -> bool:
        """Whether it fits anywhere in a text.

        Raises:
            RegularError: if that would take too long.
        """
        if _ways(self._tree, len(text)) * len(text) <= _FEW_WAYS:
            return self._compiled.search(text) is not None
        return self._walk(text, (2 << len(text)) - 1)

    def _walk(self, text: str, places: int) -> bool:
        try:
            if len(text) > _LONGEST:
                raise _TooLongError
            return _Walk(text, self._items).through(self._tree, places) != 0
        except (_TooLongError, RecursionError):
            raise RegularError(
                f"the regular expression {self.pattern!r:.80} takes too long on {text!r:.80}: "
                "write it without repeats inside of repeats and without references to groups"
            ) from None


class _TooLongError(Exception):
    pass


def _ways(tree: Any, length: int) -> int:
    """At most how many ways ``re`` tries on a text; a number above the few where it is large."""
    ways = 1
    for kind, value in tree:
        if kind in _REPEATS or kind is _parser.POSSESSIVE_REPEAT:
            ways *= _ways_of_repeat(*value, length)
        elif kind is _parser.BRANCH:
            ways *= sum(_ways(part, length) for part in value[1])
        elif kind is _parser.GROUPREF_EXISTS:
            ways *= sum(_ways(part, length) for part in value[1:] if part)
        elif kind is _parser.SUBPATTERN or kind in _ASSERTS:
            ways *= _ways(value[-1], length)
        elif kind is _parser.ATOMIC_GROUP:
            ways *= _ways(value, length)
        if ways > _FEW_WAYS:
            return _FEW_WAYS + 1
    return ways


def _ways_of_repeat(least: int, most: int, body: Any, length: int) -> int:
    inner = _ways(body, length)
    if body.getwidth()[0] == 0:  # it can be repeated without going on
        inner = max(inner, 2)
    longest = min(int(most), length)
    if inner == 1:
        return max(longest - least, 0) + 1
    return (longest + 1) * inner**longest if longest < 16 and most < 16 else _FEW_WAYS + 1


class _Walk:
    """All ways through a pattern at once. Places are bits of a number: bit i, before letter i.

    Args:
        text: what it is to fit.
        items: remembers the compiled items of the pattern.
    """

    def __init__(self, text: str, items: dict[int, Any]) -> None:
        self.text, self.steps, self._items = text, 0, items
        self._fits: dict[int, int] = {}
        self._letters = dict.fromkeys(text, 0)
        for i, letter in enumerate(text):
            self._letters[letter] |= 1 << i

    def through(self, tree: Any, places: int) -> int:
        """The places behind a pattern that begins at one of some places."""
        for item in tree.data:
            if places:
                places = self._one(tree, item, places)
        return places

    def _one(self, tree: Any, item: tuple[Any, Any], places: int) -> int:
        kind, value = item
        self.steps += 1
        if self.steps > _MOST_STEPS:
            raise _TooLongError
        if kind in _LETTERS:
            return (places & self._where(tree, item)) << 1
        if kind is _parser.AT:
            return places & self._where(tree, item)
        if kind in _REPEATS:
            return self._repeated(*value, places)
        if kind is _parser.SUBPATTERN and not value[1] and not value[2]:  # no flags of its own
            return self.through(value[3], places)
        if kind is _parser.BRANCH:
            return self._either(value[1], places)
        if kind in _ASSERTS:
            wanted = kind is _parser.ASSERT
            bits = [1 << i for i in range(places.bit_length()) if places >> i & 1]
            return sum(bit for bit in bits if self._is_beside(*value, bit) == wanted)
        raise _TooLongError  # an item that looks at more than the place

    def _where(self, tree: Any, item: tuple[Any, Any]) -> int:
        """The places that an item of one letter, or of none, fits."""
        found = self._fits.get(id(item))
        if found is None:
            fits = self._items.get(id(item))
            if fits is None:
                fits = _compiler.compile(_parser.SubPattern(tree.state, [item])).match
                self._items[id(item)] = fits
            if item[0] is _parser.AT:
                found = sum(1 << i for i in range(len(self.text) + 1) if fits(self.text, i))
            else:
                found = sum(places for letter, places in self._letters.items() if fits(letter))
            self._fits[id(item)] = found
        return found

    def _either(self, parts: Any, places: int) -> int:
        found = 0
        for part in parts:
            found |= self.through(part, places)
        return found

    def _repeated(self, least: int, most: int, body: Any, places: int) -> int:
        for _ in range(min(least, len(self.text) + 1)):  # after as many, nothing changes
            places = self.through(body, places)
        fresh, count = places, least
        while fresh and count < most:
            fresh = self.through(body, fresh) & ~places
            places |= fresh
            count += 1
        return places

    def _is_beside(self, direction: int, body: Any, place: int) -> bool:
        """Whether a pattern fits ahead of a place, or ends at it."""
        if direction > 0:
            return self.through(body, place) != 0
        return self.through(body, place >> body.getwidth()[0]) & place != 0
