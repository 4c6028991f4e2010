"""What the numbers were measured on: processor, caches, instruction sets, versions."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

import quantization
from benchmarks.limits import compiler

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """The processor's own name, with what tells its generation where the name does not."""
    found: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            found.setdefault(key.strip(), value.strip())
    except OSError:
        return platform.processor() or platform.machine()
    name = found.get("model name", platform.machine())
    family, model = found.get("cpu family"), found.get("model")
    return f"{name} (family {family}, model {model})" if family and model else name


@cache
def caches() -> dict[str, int]:
    """Bytes of the data caches of a core, by level; empty where the system does not tell."""
    sizes: dict[str, int] = {}
    for folder in sorted(_CACHES.glob("index*")):
        try:
            level, kind, size = (
                (folder / name).read_text().strip() for name in ("level", "type", "size")
            )
        except OSError:
            continue
        if kind != "Instruction" and size.endswith("K"):
            sizes[f"L{level}"] = int(size[:-1]) * 1024
    return sizes


def compiler_version() -> str:
    """First line that the C compiler says about itself."""
    program = compiler()
    if program is None:
        return "none"
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0] if done.stdout else program


def describe() -> dict[str, Any]:
    """The machine, as a dict for JSON."""
    return {
        "processor": processor(),
        "cores": cores(),
        "caches": caches(),
        "isas": list(quantization.isas()),
        "quantization": quantization.__version__,
        "torch": torch.__version__,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "compiler": compiler_version(),
    }


def line(machine: dict[str, Any]) -> str:
    """The machine in one line, for a table's caption."""
    sizes = ", ".join(f"{level} {size // 1024} K" for level, size in machine["caches"].items())
    return (
        f"{machine['processor']}, {machine['cores']} cores, {sizes or 'caches unknown'}; kernels "
        f"{', '.join(machine['isas'])}; torch {machine['torch']} ({machine['torch_capability']}); "
        f"Python {machine['python']}; {machine['compiler']}"
    )
