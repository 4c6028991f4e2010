"""Every script in examples/ runs as a reader would run it, says something, and stays short.

A script that needs an extra says so in its first line, ``# needs: transformers, peft``: names to
import. Where one of them cannot be imported, the script is skipped.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

pytest.importorskip("torch")

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


def needs(script: Path) -> list[str]:
    first = script.read_text().partition("\n")[0]
    match = re.fullmatch(r"# needs: ([\w, .]+)", first)
    return [name.strip() for name in match[1].split(",")] if match else []


@pytest.mark.deep
@pytest.mark.parametrize("script", SCRIPTS, ids=[script.name for script in SCRIPTS])
def test_example_runs(script: Path, tmp_path: Path) -> None:
    for name in needs(script):
        pytest.importorskip(name)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "2",
    }
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "an example shows something"


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.name for script in SCRIPTS])
def test_example_can_be_read_at_a_glance(script: Path) -> None:
    assert len(script.read_text().splitlines()) <= 60
