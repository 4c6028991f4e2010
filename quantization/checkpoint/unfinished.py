"""The folder beside a destination that keeps what an unfinished run has finished."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from quantization.checkpoint.disk.files import in_place, is_at, sync
from quantization.checkpoint.disk.json_files import CheckpointError, read_json

__all__ = ["FILES", "keep_only", "partial_folder", "unfinished"]

FILES = "files"  # what becomes the destination
_JOURNAL = "journal.json"  # which run it is; beside it a record of each finished file


def partial_folder(destination: str | os.PathLike[str]) -> Path:
    """Where an unfinished run keeps its files.

    Example:
        >>> partial_folder("models/small").as_posix()
        'models/.small.partial'
    """
    destination = Path(destination)
    return destination.parent / f".{destination.name}.partial"


@contextmanager
def unfinished(destination: Path, key: str, restart: bool, *, is_first: bool) -> Iterator[Path]:
    """The folder of unfinished files, new or of the same run; one process writes at a time."""
    folder = partial_folder(destination)
    if not is_first:  # the first of the ranks holds the lock
        yield folder
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder.with_suffix(".lock"), destination)
    try:
        _resume_or_begin(folder, key, restart)
        yield folder
        with in_place(destination):
            _clear(folder)
        with in_place(destination):
            folder.with_suffix(".lock").unlink(missing_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            shutil.rmtree(folder, ignore_errors=True)  # a full disk needs the room
        raise
    finally:
        os.close(lock)


def _lock(path: Path, destination: Path) -> int:
    """The lock file, open and held by this process alone.

    Who ends removes the file. Who had opened it before, and locks it after, holds a file that
    nobody else can find: that is no lock.
    """
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise CheckpointError(f"another process writes {destination}") from None
        if is_at(lock, path):
            return lock
        os.close(lock)


def keep_only(files: Path, names: Collection[str]) -> None:
    """A kill while a folder was replaced leaves the replaced one's files here."""
    for path in files.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in names:
            path.unlink()


def _resume_or_begin(folder: Path, key: str, restart: bool) -> None:
    """Go on with the run of that key, or begin it."""
    journal, temporary = folder / _JOURNAL, folder / "journal.tmp"
    is_other = not restart and journal.is_file() and read_json(journal).get("key") != key
    if is_other and any(folder.glob("*.safetensors.json")):
        raise CheckpointError(
            f"{folder} holds an unfinished run of another recipe, or of another source or a "
            "source that has changed: restart=True throws it away"
        )
    if restart or is_other:  # of which nothing is finished
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    if not journal.is_file() and any(path != temporary for path in folder.iterdir()):
        raise CheckpointError(f"{folder} is no unfinished run: restart=True throws it away")
    if not journal.is_file():
        temporary.write_text(json.dumps({"key": key}))
        sync(temporary)
        temporary.replace(journal)
        sync(folder)
    (folder / FILES).mkdir(exist_ok=True)


def _clear(folder: Path) -> None:
    """Remove what is left of a finished run; the journal last, so that a kill does no harm."""
    for path in folder.iterdir():
        if path.name != _JOURNAL:
            path.unlink()
    (folder / _JOURNAL).unlink()
    folder.rmdir()
