"""77 hostile cases, each in a child with a time limit: models that people make, files that lie."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from benchmarks.hostile import in_child, table
from benchmarks.hostile_cases import CASES
from benchmarks.hostile_libraries import OURS
from tests.hostile.file_cases import CASES as FILES
from tests.hostile.server import outcome
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


def test_there_are_as_many_as_the_documentation_says() -> None:
    assert len(CASES) == 47 and len(FILES) == 30 and not CASES.keys() & FILES.keys()


@pytest.mark.parametrize("name", list(CASES))
def test_models(name: str) -> None:
    assert outcome(name) == "ok"


@pytest.mark.parametrize("name", list(FILES))
def test_files(name: str) -> None:
    assert outcome(name) == "ok"


def test_the_runner_tells_of_errors_crashes_and_hangs() -> None:
    import os
    import signal
    import time

    def fail() -> None:
        raise AssertionError("wrong")

    assert in_child(lambda: None) == "ok"
    assert in_child(fail) == "wrong"
    assert in_child(lambda: {}["x"]) == "KeyError: 'x'"
    assert in_child(lambda: os.kill(os.getpid(), signal.SIGTERM)) == "dies by SIGTERM"
    assert in_child(lambda: time.sleep(60), 0.2) == "hangs (0.2 s)"


def test_the_table_counts_and_shows_what_differs() -> None:
    outcomes = {f"{OURS.name} {OURS.version}": dict.fromkeys(CASES, "ok") | {"odd K": "a|b"}}
    text = table([OURS], outcomes, "python -m benchmarks hostile")
    assert "| **passed** | 46 |" in text and "| odd K | a/b |" in text
    assert "All pass: zero row, all zeros" in text and "47 cases" in text
