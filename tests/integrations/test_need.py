"""A library that is missing or too old is named, with what installs it; others are left alone."""

from __future__ import annotations

import sys

import pytest

torch = pytest.importorskip("torch")

from quantization import integrations, quantize_model
from quantization.ops.extras import need
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


@pytest.mark.parametrize(
    ("library", "least", "text"),
    [
        (
            "no-such-library",
            "1",
            r'no-such-library 1 or later is needed: pip install "qwqa',
        ),
        ("torch", "999.1", r"torch 2\.\S+ is installed, 999\.1 or later is needed: pip install"),
    ],
)
def test_what_is_missing_is_named(library: str, least: str, text: str) -> None:
    with pytest.raises(ImportError, match=text):
        need(library, "transformers", least)


def test_a_library_of_an_unknown_version_does_not_hinder_a_swap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(name: str) -> None:
        raise ImportError(f"{name} needs another version")

    monkeypatch.setitem(sys.modules, "peft", sys)
    monkeypatch.setattr(integrations, "import_module", refuse)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    assert quantize_model(model, "w4").replaced
