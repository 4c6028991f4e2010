"""The machine's limits, measured: read bandwidth, mixed traffic, peak arithmetic.

The loops are C (limits.c), compiled at the first use with the system's compiler. A limit is the
best that any measurement of this run has seen, so measuring again can only sharpen it.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("limits.c")
FLAGS = ["-O3", "-std=gnu11", "-shared", "-fPIC", "-pthread", "-ffp-contract=fast"]

# Ways to read a buffer: (bytes from a load to its prefetch, streams side by side).
READ_PATTERNS = [(0, 1), (1024, 1), (8192, 1), (0, 4), (1024, 4)]
MIX_PATTERNS = [(0, 0), (1024, 0), (0, 1), (1024, 1)]  # (the same distance, non-temporal stores)


class LimitsError(Exception):
    """The limits cannot be measured here; the message says why."""


def compiler() -> str | None:
    """The C compiler's name or path: $CC, or cc, gcc, clang, whichever is found first."""
    names = (os.environ.get("CC"), "cc", "gcc", "clang")
    return next((name for name in names if name and shutil.which(name)), None)


def _compile() -> ctypes.CDLL:
    program = compiler()
    if program is None:
        raise LimitsError("no C compiler (cc, gcc or clang) is installed")
    folder = tempfile.mkdtemp(prefix="quantization-limits-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    target = Path(folder) / "limits.so"
    command = [program, *FLAGS, str(SOURCE), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LimitsError(f"{' '.join(command)}: {done.stderr.strip()[:300]}")
    return ctypes.CDLL(str(target))


def _declare(lib: ctypes.CDLL) -> None:
    name, pointer, size, number = ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    lib.limit_name.argtypes, lib.limit_name.restype = [number], name
    lib.limit_read.argtypes = [name, pointer, size, number, size, size, size]
    lib.limit_mix.argtypes = [name, pointer, pointer, size, size, size, number, size, number]
    lib.limit_flops.argtypes = [name, number, size]
    lib.limit_touch.argtypes = [size, number, number]
    for function in (lib.limit_read, lib.limit_mix, lib.limit_flops, lib.limit_touch):
        function.restype = ctypes.c_double


def vector_set(isa: str, available: tuple[str, ...]) -> str:
    """The arithmetic loops that stand for an instruction set of the kernels, by its name.

    Example:
        >>> vector_set("avx512bf16", ("avx512", "avx2", "generic"))
        'avx512'
        >>> vector_set("reference", ("avx512", "avx2", "generic"))
        'generic'
    """
    for name in available:
        if name not in ("dpbf16", "generic") and isa.startswith(name):
            return name
    return "generic"


def arithmetic(isa: str, dtype: str, available: tuple[str, ...]) -> str:
    """The loops whose peak bounds a kernel: dot products where the set has them for the dtype.

    Example:
        >>> arithmetic("avx512bf16", "bfloat16", ("dpbf16", "avx512", "avx2", "generic"))
        'dpbf16'
        >>> arithmetic("avx512", "bfloat16", ("dpbf16", "avx512", "avx2", "generic"))
        'avx512'
    """
    has_dot = "bf16" in isa and dtype == "bfloat16" and "dpbf16" in available
    return "dpbf16" if has_dot else vector_set(isa, available)


class Limits:
    """Measures and remembers the best; all figures are of the threads together.

    Raises:
        LimitsError: if the C loops cannot be compiled.
    """

    def __init__(self, milliseconds: float = 4.0) -> None:
        self._lib = _compile()
        _declare(self._lib)
        names = []
        while (name := self._lib.limit_name(len(names))) is not None:
            names.append(name.decode())
        self.names: tuple[str, ...] = tuple(names)
        self._memory_set = next(name for name in names if name != "dpbf16").encode()
        self._seconds = milliseconds * 1e-3
        self._best: dict[tuple, float] = {}
        self._buffers: dict[str, torch.Tensor] = {}

    def read(self, size: int, threads: int) -> float:
        """Bytes a second of plain reads of a buffer of `size` bytes, after one warming pass."""
        size = max(size, 4096 * threads)
        source = self._buffer("source", size)
        for ahead, streams in READ_PATTERNS:
            passes = 1
            while True:
                seconds = self._lib.limit_read(
                    self._memory_set, source, size, threads, passes, ahead, streams
                )
                self._keep(("read", size, threads), _checked(size * passes, seconds))
                if seconds >= self._seconds / 2:
                    break
                passes = int(passes * min(max(2, self._seconds / max(seconds, 1e-7)), 1000))
        return self._best["read", size, threads]

    def mix_seconds(self, read: int, write: int, threads: int) -> float:
        """Seconds of one pass that reads `read` bytes and writes `write`, best way of storing."""
        steps = max(read // 4096, threads)
        unit_read = read // steps // 256 * 256 or 256
        unit_write = max(write // steps // 64 * 64, 64)
        source = self._buffer("source", steps * unit_read)
        target = self._buffer("target", steps * unit_write)
        key = ("mix", read, write, threads)
        for ahead, non_temporal in MIX_PATTERNS:
            seconds = self._lib.limit_mix(
                self._memory_set, source, target, steps, unit_read, unit_write, threads, ahead,
                non_temporal,
            )  # fmt: skip
            scaled = seconds * (read + write) / (steps * (unit_read + unit_write))
            self._keep(key, _checked(1, scaled))
        return 1 / self._best[key]

    def touch_seconds(self, size: int, threads: int) -> float:
        """Seconds that the first touch of `size` new bytes takes, in small pages or huge ones."""
        key = ("touch", size, threads)
        for is_huge in (0, 1):
            self._keep(key, _checked(1, self._lib.limit_touch(size, threads, is_huge)))
        return 1 / self._best[key]

    def flops(self, name: str, threads: int) -> float:
        """Operations a second of independent chains in the loops `name`."""
        passes, key = 50, ("flops", name, threads)
        while True:
            rate = self._lib.limit_flops(name.encode(), threads, passes)
            self._keep(key, _checked(rate, 1.0))
            seconds = passes * 1000 * 1000 / rate  # about 1000 operations a chain and round
            if seconds >= self._seconds or passes > 10**6:
                return self._best[key]
            passes = int(passes * max(2, self._seconds / seconds))

    def best(self) -> dict[str, float]:
        """Everything measured, by name: bytes, trips or operations a second."""
        return {" ".join(map(str, key)): value for key, value in self._best.items()}

    def _keep(self, key: tuple, value: float) -> None:
        self._best[key] = max(value, self._best.get(key, 0.0))

    def _buffer(self, name: str, size: int) -> int:
        """Address of at least `size` bytes, touched, on a cache line."""
        held = self._buffers.get(name)
        if held is None or held.numel() < size + 64:
            self._buffers[name] = held = torch.ones(size + 64, dtype=torch.uint8)
        return -(-held.data_ptr() // 64) * 64

    def forget_buffers(self) -> None:
        """Give the memory back."""
        self._buffers.clear()


def _checked(amount: float, seconds: float) -> float:
    if seconds <= 0 or amount <= 0:
        raise LimitsError("a limit could not be measured: no threads, or a wrong argument")
    return amount / seconds
