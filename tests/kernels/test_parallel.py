"""Threads: forks, several callers, flushed denormals and threads that cannot be had."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from quantization import _kernels
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

ROOT = Path(__file__).resolve().parents[2]
needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed"
)

# A layer that is worth several threads on any plan: 2 M weights, 4 tokens.
SETUP = """
import numpy as np
from quantization import _kernels
rng = np.random.default_rng(0)
weights = rng.integers(-127, 128, (2048, 1024), dtype=np.int8)
x = rng.standard_normal((4, 1024)).astype(np.float32)
def linear(scale=0.01, x=x):
    y = np.empty((4, 2048), np.float32)
    scales = np.full(2048, scale, np.float32)
    kind = _kernels.FLOAT32
    _kernels.linear(y, x, weights, scales, None, 4, 2048, 1024, kind, kind, kind, kind)
    return y
"""

IMPORT_TORCH = """
import torch
from quantization.ops import torch_ops
torch.set_num_threads(2)
"""

FORK = """
import os, time
expected = linear()
def fork_and_answer():
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(linear(), expected) else 3)
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return "the forked child hung"
for _ in range(5):
    answer = fork_and_answer()
    assert answer == 0, answer
    assert np.array_equal(linear(), expected)
"""


def run(*lines: str) -> str:
    """Run a program of its own; its output."""
    program = SETUP + "".join(lines)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def namespace() -> Iterator[dict]:
    """The names of SETUP; threads are torch's again (or one) afterwards."""
    names: dict = {}
    exec(SETUP, names)
    yield names
    _kernels.set_num_threads(0)


@needs_torch
def test_a_forked_child_answers_after_torch_has_used_its_threads() -> None:
    run(IMPORT_TORCH, "torch.randn(1 << 20).add(1).sum()\nlinear()\n", FORK)


def test_a_forked_child_answers_with_threads_of_our_own() -> None:
    run("_kernels.set_num_threads(3)\nlinear()\n", FORK)


def test_without_torch_one_thread_is_the_default() -> None:
    assert run("import sys; print(_kernels.get_num_threads(), 'torch' in sys.modules)") == "1 False"


@needs_torch
def test_torch_decides_the_number_of_threads_but_not_in_a_forked_child() -> None:
    count = """
import os
seen = [_kernels.get_num_threads()]
child = os.fork()
if child == 0:
    os._exit(_kernels.get_num_threads())
seen.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
torch.set_num_threads(1)
print(*seen, _kernels.get_num_threads())
"""
    assert run(IMPORT_TORCH, count) == "2 1 1"


def test_threads_that_cannot_be_had_are_done_without() -> None:
    """With no memory for stacks pthread_create fails; the caller does their share."""
    starve = """
import resource
expected = linear()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (12 << 20), resource.RLIM_INFINITY))
_kernels.set_num_threads(64)
assert np.array_equal(linear(), expected)
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    run(starve)


def test_several_callers_at_once(namespace: dict) -> None:
    linear = namespace["linear"]
    expected = linear()
    for threads in (0, 3):
        _kernels.set_num_threads(threads)
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda _: linear(), range(48)))
        assert all(np.array_equal(answer, expected) for answer in answers)


# Sums of about 0.2 times a scale of 2e-38. Bits are counted: a caller that flushes denormals also
# sees them as zeros.
DENORMALS = """
tiny = np.full((4, 1024), 1e-4, np.float32)
def denormals():
    size = linear(2e-38, tiny).view(np.uint32) & 0x7FFFFFFF
    return int(((size > 0) & (size < 0x00800000)).sum())
for threads in (0, 1, 4):
    _kernels.set_num_threads(threads)
    kept = denormals()
    assert kept > 7000, kept
    torch.set_flush_denormal(True)
    assert [denormals() for _ in range(20)] == [0] * 20, "a worker kept denormals"
    torch.set_flush_denormal(False)
    assert [denormals() for _ in range(20)] == [kept] * 20, "a worker went on flushing"
"""


@needs_torch
def test_every_worker_flushes_denormals_as_the_caller_does() -> None:
    run(IMPORT_TORCH, DENORMALS)


def test_the_number_of_threads_is_remembered(namespace: dict) -> None:
    for threads in (1, 7, 1024):
        _kernels.set_num_threads(threads)
        assert _kernels.get_num_threads() == threads
    for threads in (-1, 1025):
        with pytest.raises(ValueError, match="threads must be"):
            _kernels.set_num_threads(threads)
    assert _kernels.get_num_threads() == 1024
