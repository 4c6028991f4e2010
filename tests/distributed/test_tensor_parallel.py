"""Several processes share a model: two and four, started by torchrun on gloo."""

from __future__ import annotations

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


@pytest.mark.parametrize("count", [2, 4])
def test_processes_together(count: int, tmp_path: Path) -> None:
    """Layers, modes, gradients: one start of the processes is most of the time that they take."""
    assert failures(count, SCRIPT, tmp_path, *PLAIN) == []


@pytest.mark.parametrize("count", [2, 4])
def test_language_models(count: int, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    assert failures(count, SCRIPT, tmp_path, *LLAMAS) == []


@pytest.mark.parametrize("count", [2, 4])
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
