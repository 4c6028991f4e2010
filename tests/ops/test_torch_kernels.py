"""Which kernels the torch operators have, and that those in Python do the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")


from quantization.ops import torch_kernels
from quantization.ops.operators import OPERATORS, Operator
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

ROOT = Path(__file__).resolve().parents[2]


# ---- which kernels -----------------------------------------------------------------------------


def test_a_torch_with_the_shim_gets_the_kernels_in_c() -> None:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if os.environ.get("QUANTIZATION_TORCH_OPS"):
        pytest.skip("forced by QUANTIZATION_TORCH_OPS")
    expected = "c" if version >= (2, 10) else "python"
    assert expected == torch_kernels.KERNELS


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_the_registered_schemas_are_those_of_the_table(operator: Operator) -> None:
    """C writes them again; exported programs hold them."""
    registered = getattr(torch.ops.quantization, operator.name).default._schema
    assert str(registered) == f"quantization::{operator.schema}"


def test_an_unknown_choice_of_kernels_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from quantization.ops import torch_ops"],
        cwd=ROOT,
        env=os.environ | {"QUANTIZATION_TORCH_OPS": "rust"},
        capture_output=True,
        text=True,
    )
    assert "QUANTIZATION_TORCH_OPS is 'rust'; allowed are 'c' and 'python'" in done.stderr


@pytest.mark.parametrize(
    "which",
    [
        "values or batches or arguments or order or vmap",
        pytest.param("not inductor", marks=pytest.mark.deep),
    ],
)
def test_the_kernels_in_python_pass_the_same_tests(which: str) -> None:
    if os.environ.get("QUANTIZATION_TORCH_OPS"):
        pytest.skip("already forced by QUANTIZATION_TORCH_OPS")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", which, "tests/ops/test_torch_ops.py"],
        cwd=ROOT,
        env=os.environ | {"QUANTIZATION_TORCH_OPS": "python", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
