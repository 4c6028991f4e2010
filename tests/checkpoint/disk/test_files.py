"""Folders and files appear whole or not at all."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from quantization.checkpoint.disk import files
from quantization.checkpoint.disk.files import member, new_file, new_folder
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


def names(path: Path) -> list[str]:
    return sorted(child.name for child in path.iterdir())


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a/b/new") as folder:
        (folder / "x").write_text("1")
        assert names(tmp_path / "a/b") == [folder.name]
    assert names(tmp_path / "a/b") == ["new"] and names(tmp_path / "a/b/new") == ["x"]
    assert (tmp_path / "a/b/new").stat().st_mode & 0o777 == (tmp_path / "a").stat().st_mode & 0o777


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there(error: BaseException, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old/x").write_text("old")
    with pytest.raises(type(error)), new_folder(tmp_path / "old", overwrite=True) as folder:
        (folder / "x").write_text("new")
        raise error
    assert names(tmp_path) == ["old"] and (tmp_path / "old/x").read_text() == "old"
    with pytest.raises(type(error)), new_file(tmp_path / "old/x", overwrite=True) as file:
        file.write_text("new")
        raise error
    assert names(tmp_path / "old") == ["x"] and (tmp_path / "old/x").read_text() == "old"


@pytest.mark.parametrize("can_exchange", [True, False])
def test_overwriting_replaces_the_folder(can_exchange: bool, tmp_path: Path, monkeypatch) -> None:
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    (tmp_path / "old").mkdir()
    (tmp_path / "old/gone").write_text("old")
    with new_folder(tmp_path / "old", overwrite=True) as folder:
        (folder / "x").write_text("new")
    assert names(tmp_path) == ["old"] and names(tmp_path / "old") == ["x"]


def test_what_is_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "full")
    for path, overwrite, message in [
        ("file", True, "is there and is no folder"),
        ("link", True, "is a link, and is no folder to replace"),
        ("full", False, "not empty; overwrite=True replaces it"),
    ]:
        with (
            pytest.raises(FileExistsError, match=message),
            new_folder(tmp_path / path, overwrite=overwrite),
        ):
            pass
    with new_folder(tmp_path / "empty"):
        pass
    with pytest.raises(FileExistsError, match="is a folder"), new_file(tmp_path / "full"):
        pass
    with pytest.raises(FileExistsError, match="overwrite=True"), new_file(tmp_path / "file"):
        pass
    assert names(tmp_path) == ["empty", "file", "full", "link"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/x", "..\\x", "C:x", "a\0", None, 3])
def test_names_stay_in_their_folder(name: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no name of a file in"):
        member(tmp_path, name)
    with pytest.raises(FileNotFoundError, match="has no file x"):
        member(tmp_path, "x")


# ---- processes that were killed, threads that look on -----------------------------------------


@pytest.mark.parametrize("make", [new_folder, new_file])
def test_what_a_killed_save_left_is_removed_by_the_next(make: Any, tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with make(tmp_path / "model") as made:
            assert made.exists()
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (left,) = names(tmp_path)
    (tmp_path / ".model.other.tmp").touch()  # of somebody else
    with make(tmp_path / "model"), make(tmp_path / "model", overwrite=True):
        assert left not in names(tmp_path) and len(names(tmp_path)) == 3  # the other save goes on
        (tmp_path / "probe").touch()
    assert names(tmp_path) == [".model.other.tmp", "model", "probe"]


@pytest.mark.parametrize("make", [new_folder, new_file])
def test_the_umask_is_obeyed_and_never_opened(make: Any, tmp_path: Path, monkeypatch) -> None:
    before = os.umask(0o027)
    monkeypatch.setattr(os, "umask", None)  # it is of the whole process
    try:
        with make(tmp_path / "model"):
            pass
        assert (tmp_path / "model").stat().st_mode & 0o777 in (0o750, 0o640)
    finally:
        monkeypatch.undo()
        os.umask(before)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_what_fails_after_the_replacing_is_a_warning(
    can_exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    with new_folder(tmp_path / "model") as folder:
        (folder / "x").write_text("old")

    def fail(*args: Any, **options: Any) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(files.shutil, "rmtree", fail)
    with (
        pytest.warns(UserWarning, match=r"model is whole and in its place; .* failed: not yours"),
        new_folder(tmp_path / "model", overwrite=True) as folder,
    ):
        (folder / "x").write_text("new")
    assert (tmp_path / "model/x").read_text() == "new"


def test_a_pipe_in_a_folder_is_not_waited_for(tmp_path: Path) -> None:
    with new_folder(tmp_path / "model") as folder:
        os.mkfifo(folder / "pipe")
    assert names(tmp_path / "model") == ["pipe"]
