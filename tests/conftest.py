"""What the tests share: the instruction sets of this machine, seeded numbers, thread counts."""

from __future__ import annotations

import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from quantization import _kernels

if "PYTEST_XDIST_WORKER" in os.environ:  # one process a core: torch's own threads would only wait
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

try:
    import hypothesis
except ImportError:
    pass
else:  # the same examples on every run where a red test must mean a red change
    hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, database=None)
    if os.environ.get("CI"):
        hypothesis.settings.load_profile("ci")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test draws the same numbers from torch, alone or in company."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(params=_kernels.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn, active for the test; the earlier one comes back after it."""
    before = _kernels.active_isa()
    _kernels.set_isa(request.param)
    yield request.param
    _kernels.set_isa(before)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers that depend on the test's name alone (the ISA aside: each sees the same)."""
    name = request.node.name
    for each in _kernels.isas():
        name = name.replace(each, "isa")
    return np.random.default_rng(zlib.crc32(name.encode()))


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """Whatever thread count the test sets, the default comes back."""
    yield
    _kernels.set_num_threads(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test that runs on one instruction set with its name, for the summary."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec and "isa" in callspec.params:
            item.user_properties.append(("isa", str(callspec.params["isa"])))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many tests passed on each instruction set, and what the emulators ran."""
    properties = [
        pair
        for report in terminalreporter.stats.get("passed", [])
        for pair in report.user_properties
    ]
    passed = Counter(value for name, value in properties if name == "isa")
    emulated = [value for name, value in properties if name == "emulated"]
    if passed or emulated:
        terminalreporter.section("instruction sets")
    for isa, count in passed.items():
        terminalreporter.write_line(f"isa {isa}: {count} tests passed")
    for line in emulated:
        terminalreporter.write_line(line)
