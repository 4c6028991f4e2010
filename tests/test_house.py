"""The rules of the house, executed: arrows run one way, files stay readable, one announcement each.

CONTRIBUTING.md draws the same picture; this file is what keeps the drawing true.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "quantization"

C_FILES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".c", ".h", ".inc"})
PY_FILES = sorted(PACKAGE.rglob("*.py"))
TEST_FILES = sorted((ROOT / "tests").rglob("*.py"))
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
    "api/descent": ("api/descent.h", "kernels/kernels.h", "kernels/scalar.h"),
    "api/codebook": ("api/codebook.h", "kernels/scalar.h"),
    "api/dispatch": ("api/dispatch.h", "kernels/kernels.h", "kernels/isa_list.def"),
    "api/parallel": ("qk.h", "api/parallel.h"),
    "python": ("qk.h", "python/binding.h"),
    "python/binding": ("qk.h", "python/binding.h", "torch/torch_ops.h", "api/parallel.h"),
    "torch": ("qk.h", "torch/torch_call.h", "torch/torch_shim.h"),
    "torch/torch_ops": ("qk.h", "torch/torch_ops.h", "torch/torch_call.h", "api/parallel.h"),
    "torch/torch_shim": (),
    "kernels": ("kernels/*",),
    "kernels/kernels": ("qk.h", "kernels/isa_list.def"),
    "kernels/scalar": ("qk.h",),
    "kernels/inline": (),
    "kernels/reference": ("kernels/reference.h", "kernels/kernels.h"),
    "kernels/quantize": (*KERNEL_HEADERS, "kernels/quantize/*"),
    "kernels/fit": (*KERNEL_HEADERS, "kernels/fit/*"),
    "kernels/pack": (*KERNEL_HEADERS, "kernels/pack/*", "kernels/codec_list.def"),
    "kernels/linear": (*KERNEL_HEADERS, "kernels/linear/*"),
    "kernels/packed": (*KERNEL_HEADERS, "kernels/packed/*", "kernels/linear/*"),
}

# The rooms of the package from the ground up; a file reaches its own room and those before it.
FLOORS = (
    "version",
    "autoload",
    "forks",
    "console",
    "_kernels",
    "ops",
    "numerics",
    "schemes",
    "methods",
    "layers",
    "swap",
    "models",
    "checkpoint/disk",
    "calibration",
    "checkpoint",
    "inspection",
    "distributed",
    "formats",
    "formats/gguf",
    "integrations",
    "demo",
    "linear_quantizer",
    "weight_pack",
    "linear_layer",
    "main",
    "__init__",
    "cli",
    "__main__",
)
FACES = ("linear_quantizer", "weight_pack", "linear_layer", "main")

# Where something of ours is loaded inside a function, and why it may be.
LOADED_LATE = {
    "autoload.py": "torch calls it in every program; few read folders of this package",
    "__init__.py": "names are loaded when they are used, so the NumPy core needs no torch",
    "cli/__init__.py": "the command line starts quickly",
    "formats/__init__.py": "the command line lists formats without loading them",
    "integrations/__init__.py": "a library that is not in use is not loaded",
    "ops/linear.py": "the operators of torch are loaded when a torch tensor comes",
    "ops/extras.py": "a package that is an extra may be missing",
}
MOST_FILES = 12

# Packages that a file may import inside a function: they are extras, or what a torch tensor brings.
OPTIONAL = {"torch", "transformers", "ml_dtypes", "gguf", "onnx", "peft", "tqdm"}
OPTIONAL |= {"pandas", "matplotlib"}


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


def _module_of(path: Path) -> str:
    """Dotted name below the package; ``"__init__"`` is the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {_module_of(path): path for path in PY_FILES} | {"_kernels": PACKAGE / "_kernels.pyi"}


def _imports(path: Path, source: str | None = None) -> list[tuple[str, bool]]:
    """Modules of ours that a file names in imports, and whether inside a function."""
    found: list[tuple[str, bool]] = []
    for node, inside in _import_nodes(path.read_text() if source is None else source):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] != "quantization":
                continue
            while len(parts) > 1 and ".".join(parts[1:]) not in MODULES:
                parts.pop()
            found.append((".".join(parts[1:]) or "__init__", inside))
    return found


def _import_nodes(source: str) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Imports of a file, and whether each stands inside a function; not those of type checkers."""

    def visit(node: ast.AST, inside: bool) -> Iterator[tuple[Any, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.Import | ast.ImportFrom):
                yield child, inside
            yield from visit(child, inside or isinstance(child, ast.FunctionDef | ast.Lambda))

    return visit(ast.parse(source), False)


def _floor(module: str) -> int:
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if "/".join(parts[:length]) in FLOORS:
            return FLOORS.index("/".join(parts[:length]))
    raise AssertionError(f"{module} has no floor: add its room to FLOORS where it belongs")


def ups(path: Path, source: str | None = None) -> list[str]:
    """Imports of a file that run up, however late they come."""
    module = _module_of(path)
    return [
        f"{module} reaches up to {name}"
        for name, _ in _imports(path, source)
        if _floor(name) > _floor(module)
    ]


def late(path: Path, source: str | None = None) -> list[str]:
    """Imports inside functions of a file, but of optional packages."""
    here = path.relative_to(PACKAGE).as_posix()
    if here in LOADED_LATE:
        return []
    text = path.read_text() if source is None else source
    wrong = [f"{here} imports by name"] if "import_module" in text else []
    for node, inside in _import_nodes(text):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
        if inside and not {str(name).split(".")[0] for name in names} <= OPTIONAL:
            wrong.append(f"{here}: {ast.unparse(node)!r} inside a function")
    return wrong


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Some modules that import each other, or nothing."""
    done: set[str] = set()

    def search(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return trail[trail.index(module) :]
        if module in done:
            return []
        for name in sorted(graph.get(module, ())):
            found = search(name, [*trail, module])
            if found:
                return found
        done.add(module)
        return []

    return next(filter(None, (search(module, []) for module in sorted(graph))), [])


@pytest.mark.parametrize("path", PY_FILES, ids=ids(PY_FILES))
def test_no_import_runs_up(path: Path) -> None:
    assert not ups(path)


@pytest.mark.parametrize("path", PY_FILES, ids=ids(PY_FILES))
def test_nothing_of_ours_is_imported_late(path: Path) -> None:
    assert not late(path)


def test_no_modules_import_each_other() -> None:
    graph = {
        _module_of(path): {name for name, _ in _imports(path)} - {_module_of(path)}
        for path in PY_FILES
    }
    assert not circle(graph)


def test_folders_can_be_taken_in_at_a_glance() -> None:
    for folder in {path.parent for path in PY_FILES}:
        files = crowd(folder)
        assert len(files) <= MOST_FILES, (
            f"{folder.name} has {len(files)} files: make a room of some"
        )


def crowd(folder: Path) -> list[Path]:
    """The Python files of a folder."""
    return sorted(folder.glob("*.py"))


def test_faces_show_and_do_nothing() -> None:
    for name in FACES:
        tree = ast.parse((PACKAGE / f"{name}.py").read_text())
        assert not [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)]


def test_only_the_door_imports_the_extension() -> None:
    for path in PY_FILES:
        if "_kernels" in {name for name, _ in _imports(path)}:
            assert path.name in {"native.py", "torch_kernels.py", "runtime.py"}, path.name


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ("from quantization.swap import walker\n", ups),
        ("def f():\n    from quantization.swap import walker\n", ups),
        ("def f():\n    from quantization.ops import dtypes\n", late),
        ("def f():\n    import_module('quantization.ops.dtypes')\n", late),
    ],
)
def test_these_rules_find_what_breaks_them(change: str, rule: Any) -> None:
    path = PACKAGE / "schemes/scheme.py"
    assert not rule(path)
    assert rule(path, path.read_text() + change)


def test_a_circle_and_a_crowd_are_found(tmp_path: Path) -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert not circle({"a": {"b", "c"}, "b": {"c"}})
    for index in range(MOST_FILES + 1):
        (tmp_path / f"file{index}.py").touch()
    assert len(crowd(tmp_path)) > MOST_FILES


ALL_FILES = C_FILES + PY_FILES + BENCH_FILES + TEST_FILES


@pytest.mark.parametrize("path", ALL_FILES, ids=ids(ALL_FILES))
def test_files_can_be_read_in_one_sitting(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= 400, f"{path.name} has {lines} lines: split it by responsibility"


def test_the_benchmarks_stand_outside() -> None:
    """They use the package as anyone may; the package knows nothing of them."""
    for path in BENCH_FILES:
        if path.suffix == ".py":
            reached = {name.split(".")[0] for name, _ in _imports(path)}
            allowed = {"__init__", "demo", "checkpoint", "formats", *FACES}
            assert reached <= allowed, f"{path.name} reaches into {reached - allowed}"
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


def test_nobody_is_told_to_install_what_belongs_to_somebody_else() -> None:
    """On the public index ``quantization`` is a stranger's; this distribution is ``qwqa``."""
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^name = "qwqa"$', text, re.MULTILINE)
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.py")]
    for path in [*pages, *PY_FILES, *BENCH_FILES, ROOT / "pyproject.toml", ROOT / ".ci/run"]:
        told = re.findall(
            r"quantization\\?\[\w|pip install[^\n]*\bquantization\b", path.read_text()
        )
        assert not [words for words in told if "-m quantization" not in words], path.name
