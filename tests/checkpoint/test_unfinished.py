"""The folder of an unfinished run is of one process at a time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from quantization.checkpoint import CheckpointError, unfinished
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


def begin(destination: Path) -> Any:
    return unfinished.unfinished(destination, "key", False, is_first=True)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with begin(tmp_path / "new") as folder:
        with (
            pytest.raises(CheckpointError, match="another process writes"),
            begin(tmp_path / "new"),
        ):
            pass
        (folder / "files").rmdir()  # it has become the destination


def test_a_lock_file_that_is_gone_is_no_lock(tmp_path: Path, monkeypatch) -> None:
    """The other process ends, and removes the file, between our opening and our locking of it."""
    lock_file, opened = tmp_path / ".new.lock", []

    def open_too_early(path: Any, *arguments: Any) -> int:
        handle = os.open(path, *arguments)
        if path == lock_file and not opened:
            lock_file.unlink()
        opened.append(path)
        return handle

    monkeypatch.setattr(unfinished, "os", _With(os, open=open_too_early))
    with begin(tmp_path / "new") as folder:
        third = os.open(lock_file, os.O_RDWR)
        with pytest.raises(BlockingIOError):  # who comes now finds the very file that is held
            fcntl.flock(third, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(third)
        (folder / "files").rmdir()
    assert not lock_file.exists() and opened.count(lock_file) == 2


class _With:
    """A module with some of its functions replaced."""

    def __init__(self, module: Any, **changes: Any) -> None:
        self.__dict__ |= vars(module) | changes


def test_what_fails_when_all_is_done_is_a_warning(tmp_path: Path, monkeypatch) -> None:
    def fail(folder: Path) -> None:
        raise OSError("the disk went away")

    monkeypatch.setattr(unfinished, "_clear", fail)
    with (
        pytest.warns(UserWarning, match="new is whole and in its place; .*the disk went away"),
        begin(tmp_path / "new"),
    ):
        pass
