"""Tables, sizes and progress for a reader."""

from __future__ import annotations

import io
import sys

import pytest

from quantization.console import columns, progress
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


def test_sizes_have_one_digit_after_the_point() -> None:
    texts = [columns.size(n) for n in (0, 999, 1000, 999_949, 999_950, 10**9, 10**13)]
    assert texts == ["0 B", "999 B", "1.0 kB", "999.9 kB", "1.0 MB", "1.0 GB", "10.0 TB"]


def test_progress_off_a_terminal_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.progress("reading", "B") as show:
        for done in range(101):
            now[0] += 0.5
            show(done, 100)
    lines = out.getvalue().splitlines()
    assert lines[0] == "  reading: 10 %" and lines[-1] == "  reading: 100 %" and len(lines) == 10


def test_progress_on_a_terminal_is_a_bar_that_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    monkeypatch.setattr(sys, "stderr", out)
    with progress.progress("reading", "B") as show:
        show(0, 10)
        show(10, 10)
    assert "reading: 100%" in out.getvalue()


def test_what_is_short_or_unseen_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    for terminal in (False, True):
        monkeypatch.setattr(out, "isatty", lambda terminal=terminal: terminal, raising=False)
        for wanted in (None, False):
            with progress.shown(wanted, "working", range(9)) as told:
                assert list(told) == [*range(9)]
    assert out.getvalue() == ""
    with progress.shown(True, "working", range(9)) as told:
        list(told)
    assert "working" in out.getvalue()
