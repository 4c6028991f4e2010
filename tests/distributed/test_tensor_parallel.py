"""Several processes share a model: two and four, started by torchrun on gloo."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

from quantization.demo.model_download import cached
from tests.distributed.launch import ROOT, failures, names_of_checks, torchrun
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

SCRIPT = Path(__file__).with_name("shared_checks.py")
EXAMPLE = ROOT / "examples" / "tensor_parallel.py"
NAMES = names_of_checks(SCRIPT)
LLAMAS = [name for name in NAMES if "llama" in name or "heads" in name]
PLAIN = [name for name in NAMES if name not in LLAMAS]


COUNTS = pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.deep)])


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[str]]:
    """What went wrong among so many processes: one start of them is most of the time they take."""
    names = NAMES if importlib.util.find_spec("transformers") else PLAIN

    @functools.cache
    def run(count: int) -> list[str]:
        return failures(count, SCRIPT, tmp_path_factory.mktemp("checks"), *names)

    return run


def of(names: list[str], found: list[str]) -> list[str]:
    return [text for text in found if text.partition(",")[0] in names]


@COUNTS
def test_processes_together(count: int, failed: Callable[[int], list[str]]) -> None:
    """Layers, modes, gradients."""
    assert of(PLAIN, failed(count)) == []


@COUNTS
def test_language_models(count: int, failed: Callable[[int], list[str]]) -> None:
    pytest.importorskip("transformers")
    assert of(LLAMAS, failed(count)) == []


@COUNTS
def test_the_example(count: int) -> None:
    pytest.importorskip("transformers")
    told = torchrun(count, EXAMPLE)
    assert "largest difference of a logit" in told
    assert_even(told, count)


@pytest.mark.parametrize("count", [2, 4])
def test_the_real_model(count: int) -> None:
    for module in ("transformers", "gguf", "accelerate"):
        pytest.importorskip(module)
    if not cached("smollm2").is_dir():
        pytest.skip(
            "smollm2 is not in the cache: python -m quantization --model smollm2 fetches it"
        )
    told = torchrun(count, EXAMPLE, "--model", "smollm2", timeout=600)
    assert "largest difference of a logit" in told
    assert_even(told, count)


def assert_even(told: str, count: int) -> None:
    """Each process holds 1/n of the bytes of the quantized layers, and says so."""
    shares = [line.split("(")[1].rstrip(")") for line in told.splitlines() if "process " in line]
    assert len(shares) == count
    assert all(abs(float(share) - 1 / count) < 0.001 for share in shares), told
