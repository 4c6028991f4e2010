"""DDP and FSDP2 around quantized layers: two processes on gloo."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

from tests.distributed.launch import failures
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

SCRIPT = Path(__file__).with_name("replica_checks.py")


def test_processes_together(tmp_path: Path) -> None:
    """Every check of the program: one start of two processes is most of the time they take."""
    assert failures(2, SCRIPT, tmp_path) == []
