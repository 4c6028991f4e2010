"""Files and folders that appear whole or not at all, and names that stay inside their folder."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = [
    "below",
    "digest_of",
    "free_place",
    "in_place",
    "is_at",
    "member",
    "names_below",
    "new_file",
    "new_folder",
    "put_in_place",
    "read_into",
    "regular",
    "sync",
]

_READ = 1 << 26  # bytes that are read at once
_LENGTH = 12  # of what tells the temporary names beside a path apart


@contextmanager
def new_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside ``path`` to fill, which takes that name once the block ends without error.

    On an error it is removed, and what was at ``path`` is as it was. All files are on the disk
    before the name is given. What a killed process left beside ``path`` is removed by the next.

    Args:
        path: where the folder is to be.
        overwrite: whether a folder there may be replaced.

    Raises:
        FileExistsError: if something is at ``path``: without ``overwrite`` anything but an empty
            folder, with it anything but a folder; or if the current directory is, or is in it.

    Example:
        >>> with tempfile.TemporaryDirectory() as place:
        ...     with new_folder(f"{place}/model") as folder:
        ...         _ = (folder / "config.json").write_text("{}")
        ...     os.listdir(f"{place}/model")
        ['config.json']
    """
    path = free_place(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(path, Path.mkdir) as folder:
        yield folder
        put_in_place(folder, free_place(path, overwrite=overwrite))


def free_place(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """``path``, if a folder may be put there.

    Raises:
        FileExistsError: as :func:`new_folder` says.
    """
    path = Path(path)
    if path.is_symlink():
        raise FileExistsError(
            f"{path} is a link, and is no folder to replace; give the folder that it leads to"
        )
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is there and is no folder")
    here = Path.cwd()
    if path.resolve() in (here, *here.parents):
        raise FileExistsError(f"{path} is or holds the current directory; give a folder of its own")
    if path.exists() and any(path.iterdir()) and not overwrite:
        raise FileExistsError(
            f"the folder {path} is there and not empty; overwrite=True replaces it"
        )
    return path


def put_in_place(folder: Path, path: Path) -> None:
    """Give a finished folder its name; an older folder of that name is removed.

    Where the system can exchange two names at once, there is always one whole folder of that name.
    What fails once the folder has its name is a warning.
    """
    for file in folder.rglob("*"):
        if file.is_file() or file.is_dir():
            sync(file)
    sync(folder)
    old = None
    if not path.exists() or not any(path.iterdir()):
        folder.rename(path)
    elif _exchange(folder, path):
        old = folder
    else:
        old = _replace_in_two_steps(folder, path)
    with in_place(path):
        sync(path.parent)
    with in_place(path):
        if old is not None:
            shutil.rmtree(old)


def _replace_in_two_steps(folder: Path, path: Path) -> Path:
    """Where what was at ``path`` is now."""
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    try:
        path.rename(old / "old")
        try:
            folder.rename(path)
        except BaseException:
            (old / "old").rename(path)
            raise
    except BaseException:
        with suppress(OSError):
            old.rmdir()  # if it is empty: nothing is ever lost
        raise
    return old


def _exchange(a: Path, b: Path) -> bool:
    """Let two names change places in one step; False where that cannot be had (not Linux)."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, bytes(a), here, bytes(b), exchange) == 0


@contextmanager
def new_file(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """The name of a file beside ``path`` to write, which takes its place if the block succeeds.

    Raises:
        FileExistsError: if a file is at ``path``, without ``overwrite``; or no file but a folder.

    Example:
        >>> with tempfile.TemporaryDirectory() as place:
        ...     with new_file(f"{place}/a.txt") as temporary:
        ...         _ = temporary.write_text("whole")
        ...     open(f"{place}/a.txt").read()
        'whole'
    """
    path = Path(path)
    if path.is_dir() or (path.exists() and not overwrite):
        what = "is a folder" if path.is_dir() else "is there; overwrite=True replaces it"
        raise FileExistsError(f"{path} {what}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(path, Path.touch) as temporary:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        with in_place(path):
            sync(path.parent)


# ---- what a killed process leaves ------------------------------------------------------------


@contextmanager
def _temporary(path: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """Something new beside ``path``, gone after the block unless it has another name by then.

    It is locked meanwhile, so that what of that kind is not locked was left by a killed process,
    and is removed.
    """
    for left in _siblings(path):
        _remove_if_left(left)
    made, lock = _make_locked(path, make)
    try:
        yield made
    finally:
        _remove(made)
        os.close(lock)


def _make_locked(path: Path, make: Callable[[Path], None]) -> tuple[Path, int]:
    while True:
        made = path.with_name(f".{path.name}.{secrets.token_hex(_LENGTH // 2)}.tmp")
        make(made)  # with the rights that the system gives to any new file
        try:
            lock = os.open(made, os.O_RDONLY)
        except FileNotFoundError:
            continue  # another save took it for left: it was there and not locked yet
        with suppress(OSError):  # a file system without locks: nothing is removed there
            fcntl.flock(lock, fcntl.LOCK_EX)
        if is_at(lock, made):
            return made, lock
        os.close(lock)


def _siblings(path: Path) -> list[Path]:
    begin, end = f".{path.name}.", ".tmp"
    try:
        names = os.listdir(path.parent)
    except OSError:
        return []
    return [
        path.with_name(name)
        for name in names
        if name.startswith(begin) and name.endswith(end)
        and len(name) == len(begin) + _LENGTH + len(end)
    ]  # fmt: skip


def _remove_if_left(left: Path) -> None:
    with suppress(OSError):
        lock = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_at(lock, left):
                _remove(left)
        finally:
            os.close(lock)


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def is_at(handle: int, path: Path) -> bool:
    """Whether an open file is still what is at ``path``: it may have been removed or replaced."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def in_place(path: Path) -> Iterator[None]:
    """Errors of the block become warnings: what it follows on has succeeded.

    Example:
        >>> with in_place(Path("model")):
        ...     Path("model/left").rmdir()  # doctest: +SKIP
    """
    try:
        yield
    except OSError as error:
        warnings.warn(
            f"{path} is whole and in its place; what was to be done after that failed: {error}",
            stacklevel=3,
        )


def member(folder: str | os.PathLike[str], name: object) -> Path:
    """The file of that name in a folder, for names that come out of a file.

    Raises:
        ValueError: if the name is none of a file right in the folder: a path, ``..``, no text. A
            link is followed, as the caches of model hubs are made of them.
        FileNotFoundError: if there is no such file.

    Example:
        >>> member(".", "../secret")
        Traceback (most recent call last):
            ...
        ValueError: '../secret' is no name of a file in .; names of other places are not followed
    """
    folder = Path(folder)
    is_plain = isinstance(name, str) and name not in ("", ".", "..")
    if not is_plain or any(sign in name for sign in "/\\:\0"):
        raise ValueError(
            f"{name!r} is no name of a file in {folder}; names of other places are not followed"
        )
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no file {name}")
    return path


def below(folder: str | os.PathLike[str], name: str) -> Path:
    """The file of that name in a folder or, with "/" between the names, in a sub-folder.

    Raises:
        ValueError, FileNotFoundError: as :func:`member` says.

    Example:
        >>> below(".", "a/../../secret")
        Traceback (most recent call last):
            ...
        ValueError: 'a/../../secret' is no name of a file below .; names of other places are not \
followed
    """
    *places, last = name.split("/")
    if any(place in ("", ".", "..") or set(place) & set("\\:\0") for place in places):
        raise ValueError(
            f"{name!r} is no name of a file below {folder}; names of other places are not followed"
        )
    return member(Path(folder, *places), last)


def names_below(folder: Path) -> set[str]:
    """The names, for :func:`below`, of all files in a folder and its sub-folders.

    Folders whose names begin with a dot (.git, .cache) are no part of a model and are left out;
    links to folders are not followed.
    """
    names = set()
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names |= {Path(place, name).relative_to(folder).as_posix() for name in files}
    return names


def regular(path: Path) -> os.stat_result:
    """What the system knows of a file, before it is opened: opening a pipe waits for a writer.

    Raises:
        OSError: if there is nothing at ``path``.
        ValueError: if it is a folder, a pipe, a device or a socket.

    Example:
        >>> regular(Path("/dev/null"))
        Traceback (most recent call last):
            ...
        ValueError: /dev/null is no regular file
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is no regular file")
    return found


def read_into(data: Any, path: Path, at: int) -> bool:
    """Fill an array of bytes from a place in a file; False if the file ends before.

    In blocks, between which an interrupt is heard.

    Example:
        >>> data = bytearray(3)
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     _ = Path(file.name).write_bytes(b"12345")
        ...     read_into(data, Path(file.name), 1), read_into(data, Path(file.name), 3)
        (True, False)
    """
    left = memoryview(data)
    with path.open("rb", buffering=0) as file:
        file.seek(at)
        while left:
            count = file.readinto(left[:_READ])
            if not count:
                return False
            left = left[count:]
    return True


def digest_of(path: Path) -> tuple[int, str]:
    """The bytes of a file, and the sha256 of them."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return file.tell(), digest.hexdigest()


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
