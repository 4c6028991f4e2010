"""The package's front: lazy names, life without torch, and the instruction set that is forced."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

import quantization
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

# Importing torch raises, as where it is not installed.
WITHOUT_TORCH = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
"""


NEED_TORCH = {
    "quantization.calibration.budget",
    "quantization.calibration.calibrate",
    "quantization.calibration.evaluate",
    "quantization.calibration.files",
    "quantization.calibration.plans",
    "quantization.inspection.comparison.compare",
    "quantization.inspection.comparison.damage",
    "quantization.inspection.comparison.keep",
    "quantization.checkpoint",
    "quantization.inspection.checking.self_test",
    "quantization.inspection.checking.verify",
    "quantization.inspection.footprint",
    "quantization.inspection.report",
    "quantization.swap.experts",
    "quantization.linear_layer",
    "quantization.layers.arena",
    "quantization.layers.float_layers",
    "quantization.methods.registry",
    "quantization.methods.statistics",
    "quantization.models.recipe",
    "quantization.models.plan",
    "quantization.models.quantizer",
    "quantization.layers.packed_embedding",
    "quantization.layers.packed_layer",
    "quantization.swap.replacement",
}


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_import_loads_neither_torch_nor_the_rooms_above() -> None:
    code = """
import sys, quantization
loaded = {name for name in sys.modules if name.startswith(("torch", "numpy", "quantization"))}
ours = {"quantization." + name for name in ("forks", "swap", "version")}
assert loaded == {"quantization"} | ours, loaded
quantization.quantize_linear, quantization.isas
assert "torch" not in sys.modules
"""
    run = python(code)
    assert run.returncode == 0, run.stderr
    assert run.stdout == run.stderr == ""


def test_without_torch_star_gives_what_works_and_names_say_what_to_install() -> None:
    code = f"""{WITHOUT_TORCH}
from quantization import *
import quantization

assert callable(quantize_linear) and callable(pack_matrix) and "quantize_model" not in globals()
for name in ("quantize_model", "QWQALinearLayer", "load_quantized"):
    try:
        getattr(quantization, name)
    except ImportError as error:
        assert str(error) == f'quantization.{{name}} needs torch: pip install "qwqa[torch]"', error
    else:
        raise SystemExit(name)
assert "torch" not in sys.modules
"""
    run = python(code)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("call", [["inspect", "folder"], []])
def test_without_torch_the_command_line_says_what_to_install(call: list[str]) -> None:
    run = python(f"{WITHOUT_TORCH}\nfrom quantization.cli import main\nsys.exit(main({call!r}))")
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr.startswith('error: torch is needed: pip install "qwqa[torch]" (')


def test_the_numpy_core_works_where_torch_cannot_be_imported() -> None:
    code = f"""{WITHOUT_TORCH}
import numpy as np
from quantization import Granularity, Mode, dequantize_linear, group, pack_matrix, quantize_linear

x = np.linspace(-3, 5, 300, dtype="float32").reshape(10, 30)
for granularity in (Granularity.PerTensor, Granularity.PerDimension(), Granularity.PerGroup(7)):
    for mode in Mode:
        q, params = quantize_linear(x, "int8", granularity, mode)
        assert type(q) is np.ndarray and q.dtype == np.int8
        restored = dequantize_linear(q, params)
        assert restored.dtype == x.dtype
        assert np.abs(restored - x).max() <= params.scale.max() * 0.5001
groups, ungroup = group(x, 6)
assert np.array_equal(ungroup(groups), x)
for scheme in ("w8", "w4g7a", "nf4", "mxfp4", "kmeans3r", "ternary", "w4g16af+dq"):
    packed = pack_matrix(x, scheme)
    assert type(packed.packed_weights) is np.ndarray
    assert np.abs(packed.dequantize() - x).mean() < 1.3
assert "torch" not in sys.modules
"""
    run = python(code)
    assert run.returncode == 0, run.stderr


def test_public_names_have_one_home_each() -> None:
    has_torch = importlib.util.find_spec("torch") is not None
    there = {n for n, home in quantization._HOME_OF.items() if has_torch or home not in NEED_TORCH}
    assert set(quantization.__all__) == there | {"__version__"}
    assert set(quantization._HOME_OF) <= set(dir(quantization))


@pytest.mark.parametrize("name", sorted(quantization._HOME_OF))
def test_public_names_load(name: str) -> None:
    home = quantization._HOME_OF[name]
    if home in NEED_TORCH:
        pytest.importorskip("torch")
    if importlib.util.find_spec(home) is None:
        pytest.fail(f"{home} is missing")
    assert getattr(quantization, name) is getattr(sys.modules[home], name)
    assert name in vars(quantization)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'quantization' has no attribute 'quantise'"):
        quantization.quantise  # noqa: B018


@pytest.mark.parametrize("isa", quantization.isas())
def test_a_forced_instruction_set_is_the_one_that_runs(isa: str) -> None:
    code = "import quantization; print(quantization.active_isa(), quantization.isas()[0])"
    run = python(code, QUANTIZATION_ISA=isa)
    assert run.stdout.split() == [isa, quantization.isas()[0]], run.stderr


def test_without_force_the_best_one_runs() -> None:
    run = python("import quantization; print(quantization.active_isa())", QUANTIZATION_ISA="")
    assert run.stdout.split() == [quantization.isas()[0]], run.stderr


@pytest.mark.parametrize("wrong", ["avx1024", "AVX2 ", "Reference"])
def test_an_unknown_forced_instruction_set_raises(wrong: str) -> None:
    run = python("import quantization; quantization.isas()", QUANTIZATION_ISA=wrong)
    assert run.returncode != 0
    allowed = ", ".join(quantization.isas())
    message = f"QUANTIZATION_ISA: instruction set {wrong!r} is not available here; allowed are"
    assert run.stderr.rstrip().endswith(f"ValueError: {message} {allowed}")


def test_set_isa_changes_or_raises_and_keeps() -> None:
    before = quantization.active_isa()
    try:
        for isa in quantization.isas():
            quantization.set_isa(isa)
            assert quantization.active_isa() == isa
        with pytest.raises(ValueError, match=r"instruction set 'sse9' is not available here"):
            quantization.set_isa("sse9")
        assert quantization.active_isa() == quantization.isas()[-1] == "reference"
    finally:
        quantization.set_isa(before)


def test_threads_are_counted() -> None:
    before = quantization.get_num_threads()
    try:
        quantization.set_num_threads(3)
        assert quantization.get_num_threads() == 3
        for wrong in (0, -1, 1025):
            with pytest.raises(ValueError, match=rf"threads must be 1..1024 or None, not {wrong}"):
                quantization.set_num_threads(wrong)
        for wrong in ("2", 2.0, True):
            with pytest.raises(TypeError, match=rf"threads must be an integer, not {wrong!r}"):
                quantization.set_num_threads(wrong)
        assert quantization.get_num_threads() == 3
    finally:
        quantization.set_num_threads(None)
    assert quantization.get_num_threads() == before
