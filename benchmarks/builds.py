"""Another commit of this repository, built in a temporary folder: what a speed is held against."""

from __future__ import annotations

import atexit
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class BuildError(Exception):
    """The commit cannot be built here; the message says why."""


def build(commit: str) -> Path:
    """A folder with the commit's package and its extension, gone when the program ends.

    Args:
        commit: anything that git takes for one.

    Raises:
        BuildError: without git, this repository's history, such a commit, or a compiler.
    """
    folder = Path(tempfile.mkdtemp(prefix="quantization-against-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    archive = folder / "source.tar"
    _run(["git", "archive", "--output", str(archive), commit], ROOT)
    shutil.unpack_archive(archive, folder, filter="data")
    _run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], folder)
    return folder


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise BuildError(f"{' '.join(command)}: {''.join(last)}")
