"""Docstrings: every public callable has a runnable example, and every example runs."""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path

import pytest

import quantization
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

PACKAGE = Path(quantization.__file__).parent
MODULES = sorted(
    ".".join(("quantization", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    )
    for path in PACKAGE.rglob("*.py")
    if path.name != "__main__.py"
)


#: Modules whose examples need a package that is an extra.
NEEDS = {"quantization.formats.onnx": "onnx"}


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    pytest.importorskip("torch")
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if name.startswith("quantization.integrations."):
            pytest.skip(str(error))
        raise
    outcome = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert outcome.failed == 0


@pytest.mark.parametrize("name", quantization.__all__)
def test_public_names_are_documented_with_an_example(name: str) -> None:
    pytest.importorskip("torch")
    value = getattr(quantization, name)
    if not callable(value):
        return
    text = inspect.getdoc(value) or ""
    assert text, f"{name} has no docstring"
    assert ">>>" in text, f"{name} has no example"
