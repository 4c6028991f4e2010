"""DDP and FSDP2 around quantized layers: two processes on gloo."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

from launch import PASSED, names_of_checks, outcomes

SCRIPT = Path(__file__).with_name("replica_checks.py")
NAMES = names_of_checks(SCRIPT)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return outcomes(2, SCRIPT, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", NAMES)
def test_processes_together(name: str, found: dict[str, list[str]]) -> None:
    for rank, told in enumerate(found[name]):
        assert told == PASSED, f"process {rank}: {told}"
