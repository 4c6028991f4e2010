"""``python -m unittest`` runs what pytest runs, and says so case by case."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

HERE = Path(__file__).resolve().parent
FILES = sorted(HERE.rglob("test_*.py"))

MADE = """
import pytest
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

@pytest.mark.parametrize("number", [1, 2])
def test_passes(number, tmp_path):
    assert tmp_path.is_dir() and number

def test_fails():
    print("seen on the way")
    number = 2 + 2
    assert number == 5

def test_skips():
    pytest.skip("not today")

@pytest.fixture
def broken():
    raise OSError("no fixture")

def test_errs(broken):
    pass

@pytest.mark.xfail
def test_is_known_to_fail():
    assert False
"""


def unittest_over(folder: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and words of ``python -m unittest``."""
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTEST_ADDOPTS": ""}
    done = subprocess.run(
        [sys.executable, "-m", "unittest", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("made")
    (made / "test_made.py").write_text(MADE)
    return made


def test_every_case_is_told(folder: Path) -> None:
    code, said = unittest_over(folder, "-v", "test_made.py")
    assert code == 1
    for line in (
        "test_made.py::test_passes[1] ... ok",
        "test_made.py::test_passes[2] ... ok",
        "test_made.py::test_fails ... FAIL",
        "test_made.py::test_skips ... skipped 'not today'",
        "test_made.py::test_errs ... ERROR",
        "test_made.py::test_is_known_to_fail ... expected failure",
        "Ran 6 tests",
        "FAILED (failures=1, errors=1, skipped=1, expected failures=1)",
    ):
        assert line in said, said
    assert "assert 4 == 5" in said and "seen on the way" in said and "no fixture" in said


def test_cases_can_be_chosen(folder: Path) -> None:
    code, said = unittest_over(folder, "-v", "-k", "passes", "test_made.py")
    assert code == 0 and "Ran 2 tests" in said and "OK" in said


def test_the_first_failure_may_be_the_last_case(folder: Path) -> None:
    code, said = unittest_over(folder, "-v", "-f", "test_made.py")
    assert code == 1 and "Ran 3 tests" in said


def test_a_file_that_cannot_be_collected_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "test_made.py").write_text(
        MADE + '\n@pytest.mark.parametrize("other", [1])\ndef test_wrong(): ...\n'
    )
    code, said = unittest_over(tmp_path, "test_made.py")
    assert code == 1 and "uses no argument 'other'" in said


@pytest.mark.parametrize("path", FILES, ids=[path.relative_to(HERE).as_posix() for path in FILES])
def test_every_test_file_answers_unittest(path: Path) -> None:
    assert "\nload_tests = pytest_cases(__file__)\n" in path.read_text()
    assert (path.parent / "__init__.py").exists(), "what is imported as a part of tests"


def test_every_folder_answers_unittest() -> None:
    for folder in {path.parent for path in FILES}:
        text = (folder / "__init__.py").read_text()
        assert "\nload_tests = pytest_cases(__file__)\n" in text, folder
