"""Regular expressions end on any text, and say what ``re`` says."""

from __future__ import annotations

import doctest
import random
import re
import time

import pytest

pytest.importorskip("torch")

from quantization.swap import regular
from quantization.swap.regular import Regular, RegularError
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

RUNAWAYS = [
    "(a+)+$", "(a|a)*b", "(a|aa)+$", "(.*)*x", "(.*a){20}x", "(a?){40}a{41}", "((a*)*)*b",
    ".*.*.*.*.*.*.*x", "(?:(?:){1000}){1000}b", "((((a{0,9}){0,9}){0,9}){0,9}){0,9}b", "(?i)(A+)+$",
    "(?=(a+)+b)a", "(?!(a+)+$)b", r"(\w+\.)*q", r"(a+)+(?<=ab)$", "(a|(a|(a|a)*)*)*b",
]  # fmt: skip


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(regular).failed == 0


@pytest.mark.parametrize("pattern", RUNAWAYS)
def test_no_pattern_runs_away(pattern: str) -> None:
    begin = time.perf_counter()
    assert not Regular(pattern).match("a" * 40 + "!")
    assert not Regular(pattern).search("a" * 40 + "!")
    assert time.perf_counter() - begin < 2


def test_what_takes_too_long_is_refused() -> None:
    with pytest.raises(RegularError, match="takes too long on 'aaa"):
        Regular(r"(a+)\1+(b+)+$").match("a" * 40)
    with pytest.raises(RegularError, match="takes too long on 'aaa"):
        Regular("(a+)+$").search("a" * 100_000)
    with pytest.raises(RegularError, match="at most 10000 are read"):
        Regular("a" * 10_001)
    with pytest.raises(RegularError, match="is no regular expression"):
        Regular("(" * 3000)


def drawn(draw: random.Random, depth: int) -> str:
    """A pattern of those parts that the search of our own knows."""
    kind = draw.random()
    if depth == 0 or kind < 0.3:
        return draw.choice(["a", "b", ".", "[ab]", "[^a]", r"\w", "^", "$", r"\b"])
    inner = drawn(draw, depth - 1)
    if kind < 0.5:
        return f"(?:{inner}){draw.choice(['*', '+', '?', '{0,2}', '{2}', '{1,3}', '*?', '+?'])}"
    if kind < 0.65:
        return f"({inner}|{drawn(draw, depth - 1)})"
    if kind < 0.75:
        return f"{draw.choice(['(?=', '(?!'])}{inner})"
    return inner + drawn(draw, depth - 1) + drawn(draw, depth - 1)


def test_both_searches_find_what_re_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regular, "_FEW_WAYS", 0)  # so that all go the road of our own
    draw = random.Random(0)
    for _ in range(300):
        pattern = drawn(draw, 4)
        ours, theirs = Regular(pattern), re.compile(pattern)
        for _ in range(3):
            text = "".join(draw.choice("ab.") for _ in range(draw.randrange(7)))
            assert ours.match(text) == (theirs.match(text) is not None), (pattern, text)
            assert ours.search(text) == (theirs.search(text) is not None), (pattern, text)
