"""What is written for readers: blocks of code run as pasted, and the reference has every name."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import quantization
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

ROOT = Path(__file__).resolve().parent.parent


def blocks(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


#: Those of the README stand alone; those of a page of docs/ go on from each other.
PIECES = [(f"README.md {i}", block) for i, block in enumerate(blocks("README.md"))] + [
    (page, "\n".join(blocks(page)))
    for page in ("docs/index.md", "docs/concepts.md", "docs/inspect.md", "docs/tutorial.md")
]


@pytest.mark.parametrize("code", [code for _, code in PIECES], ids=[name for name, _ in PIECES])
def test_a_block_runs(code: str) -> None:
    pytest.importorskip("torch")
    assert code.strip()
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() or "print(" not in code


def test_the_readme_is_read_in_a_minute() -> None:
    assert len(blocks("README.md")) >= 4
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_the_reference_has_every_public_name_once() -> None:
    pages = "".join(path.read_text() for path in sorted((ROOT / "docs/api").glob("*.md")))
    named = re.findall(r"auto(?:class|function|data):: quantization\.(\w+)$", pages, re.MULTILINE)
    assert sorted(named) == sorted(set(quantization.__all__) - {"__version__"})


def test_every_example_is_in_the_guide() -> None:
    guide = (ROOT / "docs/howto.md").read_text()
    named = set(re.findall(r"literalinclude} \.\./examples/(\S+)", guide))
    assert named == {path.name for path in (ROOT / "examples").glob("*.py")}
