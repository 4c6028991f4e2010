"""The kernels on processors that this machine is not: each target of `emulated/targets.py` here."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.emulated import targets
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

ROOT = Path(__file__).resolve().parent.parent
BY_NAME = {target.name: target for target in targets.TARGETS}

# AVX2 in main: an emulator of an older processor must refuse it, or its runs prove nothing.
AVX2_PROGRAM = """
#include <immintrin.h>
int main(int count, char **names)
{
    (void)names;
    __m256i v = _mm256_set1_epi32(count);
    return _mm256_extract_epi32(_mm256_add_epi32(v, v), 7) == 2 * count ? 0 : 1;
}
"""

CORE_PROGRAM = """
import numpy as np, quantization as q
assert q.isas() == ("reference",), q.isas()
weights = np.random.default_rng(0).standard_normal((37, 65), dtype=np.float32)
grouped = q.Granularity.PerGroup(32, dim=1)
codes, params = q.quantize_linear(weights, "uint4", grouped, q.Mode.Asymmetric)
error = np.abs(q.dequantize_linear(codes, params) - weights)
assert error.max() <= params.scale.max() / 2 * 1.001
unpacked = q.unpack_weights(q.pack_weights(codes, 4), 4)
assert np.array_equal(unpacked[:37], codes), (unpacked.shape, codes.shape)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the programs are built, each once."""
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture(scope="module")
def outcome(folder: Path) -> Callable[[str], targets.Result]:
    """Runs a target, once in this module."""
    done: dict[str, targets.Result] = {}

    def run(name: str) -> targets.Result:
        reason = targets.missing(BY_NAME[name]) or targets.needless(BY_NAME[name])
        if reason:
            pytest.skip(reason)
        if name not in done:
            done[name] = targets.run(BY_NAME[name], folder)
        return done[name]

    return run


#: A harness is a build of all kernels, and repeats at length what `tests/kernels` shows.
HARNESS = pytest.mark.deep

#: Tests of one target stay in one process of pytest-xdist (``--dist loadgroup``): one build each.
TARGETS = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in BY_NAME]


@HARNESS
@pytest.mark.parametrize("name", TARGETS)
def test_every_kernel_agrees_with_the_reference(
    name: str, outcome: Callable[[str], targets.Result], record_property: Callable[..., None]
) -> None:
    result = outcome(name)
    assert result.returncode == 0, result.text
    for isa, cases in result.cases.items():
        record_property("emulated", f"{name}: isa {isa}, {cases} cases")
        assert cases > 1000, result.text
        assert result.failures[isa] == 0, result.text
    expected = BY_NAME[name].expected
    assert tuple(result.cases)[: len(expected)] == expected


@HARNESS
@pytest.mark.parametrize("name", [each for each in TARGETS if each.values != ("native",)])
def test_the_reference_gives_the_same_bytes_everywhere(
    name: str, outcome: Callable[[str], targets.Result]
) -> None:
    assert outcome(name).digest == outcome("native").digest


@HARNESS
def test_the_harness_sees_a_broken_kernel(folder: Path) -> None:
    reason = targets.missing(BY_NAME["native"])
    if reason:
        pytest.skip(reason)
    program = targets.build(BY_NAME["native"], folder)
    for flaw in ("value", "overrun", "overread"):
        done = subprocess.run([program, f"--flaw={flaw}"], capture_output=True, text=True)
        assert done.returncode != 0, f"{flaw} went unseen:\n{done.stdout}"
    done = subprocess.run([program, "no_such_isa"], capture_output=True, text=True)
    assert done.returncode != 0


@pytest.mark.parametrize("name", ["x86-64-opteron-g1", "x86-64-nehalem"])
def test_the_emulated_baseline_refuses_avx2(name: str, tmp_path: Path) -> None:
    target = BY_NAME[name]
    reason = targets.missing(target)
    if reason:
        pytest.skip(reason)
    source, program = tmp_path / "avx2.c", tmp_path / "avx2"
    source.write_text(AVX2_PROGRAM)
    command = [targets.compiler(target), "-mavx2", "-static", str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    assert subprocess.run([*target.emulator, program], capture_output=True).returncode != 0


def test_numpy_core_runs_on_a_cpu_without_avx() -> None:
    emulator = shutil.which("qemu-x86_64")
    if not emulator or platform.machine() != "x86_64":
        pytest.skip("qemu-x86_64 is not installed, or this is no x86-64 machine")
    done = subprocess.run(
        [emulator, "-cpu", "Nehalem", sys.executable, "-c", CORE_PROGRAM],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OPENBLAS_CORETYPE": "Nehalem", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
