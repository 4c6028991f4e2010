"""The processors that the kernels are proved on without owning them, and how each one is run.

Each target builds the harness of this folder (no Python inside) with one compiler and runs it on
one emulated processor. `python tests/emulated/targets.py [name ...]` runs some or all of them.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-O3", "-ffp-contract=off", "-pthread"]
FLAGS += ["-Wall", "-Wextra", "-Wstrict-prototypes", "-Werror", "-I", str(ROOT / "csrc")]
NOISE = re.compile(r"^qemu-\w+: warning: TCG doesn't support.*\n", re.MULTILINE)
SIMDE = "/usr/include/simde/x86/avx512.h"


@dataclass(frozen=True)
class Target:
    """One build of the harness on one processor; `expected` ISAs must run, the first be chosen."""

    name: str
    machine: str
    expected: tuple[str, ...] = ()
    emulator: tuple[str, ...] = ()
    flags: tuple[str, ...] = ("-static",)
    simde: bool = False
    guard_pages: bool = True


def _qemu(machine: str, cpu: str) -> tuple[str, ...]:
    return (f"qemu-{machine}", "-cpu", cpu)


SANITIZERS = ("-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined")
SANITIZERS += ("-fno-sanitize-recover=undefined",)

# qemu 7.2 reads 16 bytes for a scalar FMA's 4-byte operand: no guard pages where it runs AVX2.
TARGETS = (
    Target("native", platform.machine()),
    Target("native-sanitized", platform.machine(), flags=SANITIZERS),
    Target("aarch64-max", "aarch64", ("neon", "reference"), _qemu("aarch64", "max")),
    Target("aarch64-cortex-a57", "aarch64", ("neon", "reference"), _qemu("aarch64", "cortex-a57")),
    Target("x86-64-opteron-g1", "x86_64", ("reference",), _qemu("x86_64", "Opteron_G1")),
    Target("x86-64-nehalem", "x86_64", ("reference",), _qemu("x86_64", "Nehalem")),
    Target(
        "x86-64-haswell",
        "x86_64",
        ("avx2", "reference"),
        _qemu("x86_64", "Haswell"),
        guard_pages=False,
    ),
    Target("avx512-simde", "x86_64", ("avx512bf16", "avx512", "avx2", "reference"), simde=True),
)


@dataclass(frozen=True)
class Result:
    """What a run printed: cases and failures by ISA, and the digest of the reference's bytes."""

    returncode: int
    cases: dict[str, int]
    failures: dict[str, int]
    digest: str
    text: str


def compiler(target: Target) -> str:
    """The C compiler for the target's machine."""
    if target.machine == platform.machine():
        return os.environ.get("CC", "gcc")
    return f"{target.machine}-linux-gnu-gcc"


def _cpu_flags() -> list[str]:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^flags\s*:(.*)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found.group(1).split() if found else []


def missing(target: Target) -> str | None:
    """Why the target cannot run here, or None."""
    for tool in (shlex.split(compiler(target))[0], *target.emulator[:1]):
        if not shutil.which(tool):
            return f"{tool} is not installed"
    if target.simde and not Path(SIMDE).exists():
        return "SIMDe is not installed (Debian: libsimde-dev)"
    if target.simde and "avx2" not in _cpu_flags():
        return "needs an x86-64 machine with AVX2"
    return None


def needless(target: Target) -> str | None:
    """Why the tests need not run the target here (it can be named), or None."""
    if target.simde and "avx512_bf16" in _cpu_flags():
        return "the target `native` runs these kernels on the CPU itself"
    return None


def _run(command: list[str], **options) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
    return done


def _compile_with_simde(target: Target, folder: Path) -> list[Path]:
    """kernels/avx512*.c on SIMDe's plain C: target pragmas are dropped after preprocessing."""
    command = [
        *shlex.split(compiler(target)),
        *FLAGS,
        "-O1",
        "-Wno-psabi",
        "-I",
        str(HERE / "simde"),
    ]
    objects = []
    for source in sorted(ROOT.glob("csrc/kernels/avx512*.c")):
        text = _run([*command, "-E", str(source)]).stdout
        plain, made = folder / f"{source.stem}.i", folder / f"{source.stem}.o"
        plain.write_text(re.sub(r"^#pragma GCC target.*$", "", text, flags=re.MULTILINE))
        _run([*command, "-x", "cpp-output", "-c", str(plain), "-o", str(made)])
        objects.append(made)
    return objects


def build(target: Target, folder: Path) -> Path:
    """The harness and the kernels as one program in `folder`, compiled unless it is there.

    Targets of one machine and the same flags share a program.
    """
    kind = "simde" if target.simde else "plain"
    program = folder / "-".join([target.machine, kind, *target.flags]).replace(",", "-")
    if program.exists():
        return program
    sources = [
        str(path)
        for path in sorted([*HERE.glob("*.c"), *ROOT.glob("csrc/*/**/*.c")])
        if path.parent.name not in {"python", "torch"}
        and not (target.simde and path.stem.startswith("avx512"))
    ]
    if target.simde:
        sources += map(str, _compile_with_simde(target, folder))
    defines = ["-D__builtin_cpu_supports(feature)=1"] if target.simde else []
    command = [*shlex.split(compiler(target)), *FLAGS, *target.flags, *defines, *sources]
    _run([*command, "-lm", "-o", str(program)])
    return program


def run(target: Target, folder: Path) -> Result:
    """Build and run the target; what it said."""
    program = build(target, folder)
    options = [] if target.guard_pages else ["--no-guard-pages"]
    command = [*target.emulator, str(program), *options, *target.expected]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = re.findall(r"^isa (\w+): (\d+) cases, (\d+) failures", done.stdout, re.MULTILINE)
    digest = re.search(r"^digest (\w+)", done.stdout, re.MULTILINE)
    return Result(
        returncode=done.returncode,
        cases={isa: int(cases) for isa, cases, _ in lines},
        failures={isa: int(failures) for isa, _, failures in lines},
        digest=digest.group(1) if digest else "",
        text=done.stdout + NOISE.sub("", done.stderr),
    )


def main(names: list[str]) -> int:
    """Run the named targets, or all; 1 when one fails, 2 on an unknown name."""
    unknown = set(names) - {target.name for target in TARGETS}
    if unknown:
        print(f"unknown {sorted(unknown)}; known: {[target.name for target in TARGETS]}")
        return 2
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for target in TARGETS:
            if names and target.name not in names:
                continue
            reason = missing(target)
            if reason:
                print(f"{target.name}: skipped, {reason}")
                continue
            result = run(target, Path(folder))
            print(
                f"{target.name}: {'FAILED' if result.returncode else 'ok'}\n{result.text}", end=""
            )
            failed |= result.returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
