"""The code blocks of the README run, in order, in one interpreter, as a reader would type them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

README = Path(__file__).resolve().parent.parent / "README.md"


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


def test_every_block_runs() -> None:
    pytest.importorskip("torch")
    blocks = python_blocks()
    assert blocks, "the README lost its tour"
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
