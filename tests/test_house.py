"""The rules of the house, executed: arrows run one way, files stay readable, one announcement each.

CONTRIBUTING.md draws the same picture; this file is what keeps the drawing true.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "quantization"

C_FILES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".c", ".h", ".inc"})
PY_FILES = sorted(PACKAGE.rglob("*.py"))
BENCH_FILES = sorted(
    path for path in (ROOT / "benchmarks").iterdir() if path.suffix in {".py", ".c"}
)

KERNEL_SYSTEM = {"immintrin.h", "arm_neon.h", "string.h", "math.h", "stddef.h", "stdint.h"}
KERNEL_SYSTEM |= {"float.h", "limits.h", "assert.h"}

# What the C files of a folder, or one file and its header, may include, as written below csrc.
KERNEL_HEADERS = ("kernels/kernels.h", "kernels/scalar.h", "kernels/reference.h")
C_ARROWS = {
    ".": (),
    "api": ("qk.h", "api/*.h", "kernels/scalar.h"),
    "api/plan": ("qk.h", "api/plan.h"),
    "api/tiles": ("qk.h", "api/tiles.h"),
    "api/scale": ("qk.h", "api/scale.h", "kernels/scalar.h"),
    "api/codebook": ("api/codebook.h", "kernels/scalar.h"),
    "api/dispatch": ("api/dispatch.h", "kernels/kernels.h", "kernels/isa_list.def"),
    "api/parallel": ("qk.h", "api/parallel.h"),
    "python": ("qk.h", "python/binding.h"),
    "python/binding": ("qk.h", "python/binding.h", "torch/torch_ops.h"),
    "torch": ("qk.h", "torch/torch_call.h", "torch/torch_shim.h"),
    "torch/torch_ops": ("qk.h", "torch/torch_ops.h", "torch/torch_call.h", "api/parallel.h"),
    "torch/torch_shim": (),
    "kernels": ("kernels/*",),
    "kernels/kernels": ("qk.h", "kernels/isa_list.def"),
    "kernels/scalar": ("qk.h",),
    "kernels/inline": (),
    "kernels/reference": ("kernels/reference.h", "kernels/kernels.h"),
    "kernels/quantize": (*KERNEL_HEADERS, "kernels/quantize/*"),
    "kernels/pack": (*KERNEL_HEADERS, "kernels/pack/*", "kernels/codec_list.def"),
    "kernels/linear": (*KERNEL_HEADERS, "kernels/linear/*"),
    "kernels/packed": (*KERNEL_HEADERS, "kernels/packed/*", "kernels/linear/*"),
}

# Floor of each Python module: a module imports only from lower floors (or its own room's list).
FLOORS = {
    "_kernels": 0,
    "dtypes": 1,
    "runtime": 1.5,
    "_native": 2,
    "_torch_checks": 1.4,
    "packed_rows": 1.4,
    "_torch_devices": 1.6,
    "_torch_kernels": 1.7,
    "_torch_ops": 2,
    "granularity": 3,
    "codebooks": 3,
    "packing": 3,
    "parameters": 3.3,
    "scheme_names": 3.6,
    "scheme_rules": 3.6,
    "rules": 3.6,
    "scheme": 3.8,
    "linear_quantizer": 4,
    "weight_pack": 4,
    "linear": 4,
    "stored_scales": 3,
    "grids": 4.3,
    "packed_weights": 4.5,
    "module_walker": 5,
    "target": 5.3,
    "quantized_module": 5.3,
    "report": 5.3,
    "conversion": 5.6,
    "packed_module": 5.6,
    "scheme_conversion": 5.8,
    "swap": 5.8,
    "replacement": 6,
    "linear_layer": 7,
    "packed_layer": 7.3,
    "packed_embedding": 7.3,
    "recipe": 7.3,
    "experts": 7.3,
    "model_quantizer": 7.6,
    "distributed": 7.8,
    "files": 1,
    "extras": 1,
    "json_files": 1,
    "stored_model": 7.6,
    "safetensors_files": 7.7,
    "restore": 7.8,
    "checkpoint": 8.2,
    "integrations": 8.3,
    "demo": 8,
    "model_download": 8,
    "weight_checks": 8,
    "suite_log": 8,
    "model_sources": 9,
    "quality": 10,
    "main": 11,
    "formats": 8.4,
    "cli": 11.5,
    "__main__": 12,
}


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s+[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def ids(paths: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


def is_kernel(path: Path) -> bool:
    return "kernels" in path.relative_to(CSRC).parts


@pytest.mark.parametrize("path", C_FILES, ids=ids(C_FILES))
def test_c_includes_follow_the_arrows(path: Path) -> None:
    names = set(includes(path))
    own = {name for name in names if (CSRC / name).exists()}
    room = path.relative_to(CSRC).with_suffix("").as_posix()
    arrows = C_ARROWS.get(room, C_ARROWS.get(path.parent.relative_to(CSRC).as_posix(), ()))
    reached = {name for name in own if not any(fnmatch(name, arrow) for arrow in arrows)}
    assert not reached, f"{room} reaches {reached}"
    system = names - own
    if is_kernel(path):
        assert system <= KERNEL_SYSTEM, f"{room} reaches {system - KERNEL_SYSTEM}"
        return
    assert "Python.h" not in system or path.name == "binding.h"
    assert "numpy/arrayobject.h" not in system or path.name == "binding.c"
    assert "dlfcn.h" not in system or path.name == "torch_ops.c"
    assert not system & {"immintrin.h", "arm_neon.h"} or path.name == "parallel.c"


@pytest.mark.parametrize("path", C_FILES, ids=ids(C_FILES))
def test_c_includes_are_written_from_the_root(path: Path) -> None:
    quoted = re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE)
    missing = [name for name in quoted if not (CSRC / name).exists()]
    assert not missing, f"{path.name}: {missing} is no path below csrc"


@pytest.mark.parametrize("path", C_FILES, ids=ids(C_FILES))
def test_kernels_own_nothing(path: Path) -> None:
    if not is_kernel(path):
        pytest.skip("not a kernel")
    text = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
    assert not re.search(r"\b(malloc|calloc|realloc|free|pthread_\w+|printf|abort)\s*\(", text)


def _imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            parts = node.module.split(".")
            if parts[0] == "quantization":
                found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "quantization" and len(parts) > 1:
                    found.add(parts[1])
    return found


def _room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


@pytest.mark.parametrize("path", PY_FILES, ids=ids(PY_FILES))
def test_python_imports_run_downwards(path: Path) -> None:
    room = _room(path)
    if room == "__init__":
        return
    assert room in FLOORS, f"{room} has no floor: add it to FLOORS where it belongs"
    for name in _imports(path) & set(FLOORS):
        if room in {"main", "demo", "model_sources"} or room == name:
            assert FLOORS[name] <= FLOORS[room], f"{room} reaches up to {name}"
        elif {room, name} in (
            {"linear_layer", "replacement"},
            {"linear_layer", "packed_layer"},
            {"_native", "_torch_ops"},
        ):
            continue  # re-exported names, layers that become each other, two halves of one door
        else:
            assert FLOORS[name] < FLOORS[room], f"{room} reaches {name}, which is not below it"


def test_only_the_door_imports_the_extension() -> None:
    for path in PY_FILES:
        if "_kernels" in _imports(path):
            assert path.name in {"_native.py", "_torch_kernels.py", "runtime.py"}, path.name


@pytest.mark.parametrize(
    "path", C_FILES + PY_FILES + BENCH_FILES, ids=ids(C_FILES + PY_FILES + BENCH_FILES)
)
def test_files_can_be_read_in_one_sitting(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= 400, f"{path.name} has {lines} lines: split it by responsibility"


def test_the_benchmarks_stand_outside() -> None:
    """They use the package as anyone may; the package knows nothing of them."""
    for path in BENCH_FILES:
        if path.suffix == ".py":
            reached = _imports(path) & set(FLOORS)
            assert reached <= {"model_sources", "quality", "demo"}, (
                f"{path.name} reaches into {reached}"
            )
    for path in PY_FILES:
        assert "benchmarks" not in path.read_text(), f"{path.name} names the benchmarks"


def test_functions_of_the_benchmarks_are_short() -> None:
    for path in BENCH_FILES:
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or 0) - node.lineno
                assert lines < 60, f"{path.name}: {node.name} has {lines} lines"


def test_compiled_files_and_headers_have_names_of_their_own() -> None:
    names = [path.name for path in C_FILES if path.suffix != ".inc"]
    assert len(names) == len(set(names))


def test_test_files_have_names_of_their_own() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), "pytest imports test files by their bare names"


def test_an_isa_is_announced_in_one_row_and_one_file() -> None:
    rows = re.findall(r"^QK_ISA\((\w+),", (CSRC / "kernels/isa_list.def").read_text(), re.MULTILINE)
    assert rows[-1] == "reference"
    for isa in rows:
        assert (CSRC / f"kernels/{isa}.c").exists()
        naming = [p for p in C_FILES if re.search(rf"qk_use_{isa}\b", p.read_text())]
        assert naming == [CSRC / f"kernels/{isa}.c"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file with nm")
def test_the_extension_exports_only_its_init() -> None:
    from quantization import _kernels

    try:
        listed = subprocess.run(
            ["nm", "-D", "--defined-only", _kernels.__file__],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except FileNotFoundError:
        pytest.skip("nm is not installed")
    names = [line.split()[-1] for line in listed.splitlines() if " T " in line or " D " in line]
    assert names == ["PyInit__kernels"]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_pages_name_only_files_that_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    named = set(re.findall(r"`((?:csrc|quantization|tests|tools|benchmarks)/[\w./-]+)`", text))
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing
