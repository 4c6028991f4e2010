"""What is quantized in a forked child does not wait for threads that stayed in the parent."""

from __future__ import annotations

import doctest
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantization import forks
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

PROGRAM = """
import os, torch, quantization
torch.set_num_threads(2)
torch.zeros(1 << 20).add(1)  # torch's threads begin here
layers = [torch.nn.Linear(300, 400, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
layers[0].weight.data = torch.randn(300, 400).t()
child = os.fork()
if child == 0:
    for layer in layers:
        for scheme in ("w8a16", "w4g4a", "nf4"):
            model = quantization.quantize_model(torch.nn.Sequential(layer), scheme).model
            model[0].weight
            if hasattr(model[0], "dequantize"):
                model[0].dequantize()
    assert quantization.forks.is_child() and torch.get_num_threads() == 2
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(forks).failed == 0


def test_a_child_quantizes_though_nothing_was_loaded_before_the_fork() -> None:
    pytest.importorskip("torch")
    root = Path(__file__).resolve().parent.parent
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.stdout.strip() == "7", ended.stderr
