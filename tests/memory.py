"""Arrays in awkward places: among guard bytes, at odd addresses, against a page that faults."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np

GUARD = 0xA5


class Guarded:
    """An output array between guard bytes, ``offset`` bytes from a 64-byte boundary.

    ``fill`` is what the output holds before the kernel runs.
    """

    def __init__(self, shape: tuple[int, ...], dtype: object, offset: int = 1, fill: int = 0x5A):
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        self._buffer = np.full(size + 256, GUARD, np.uint8)
        start = 64 + (-self._buffer.ctypes.data) % 64 + offset
        self._body = slice(start, start + size)
        self._buffer[self._body] = self._fill = fill
        self.array = self._buffer[self._body].view(dtype).reshape(shape)

    def check(self) -> None:
        """Raise if a guard byte was overwritten."""
        before, after = self._buffer[: self._body.start], self._buffer[self._body.stop :]
        touched = int((before != GUARD).sum() + (after != GUARD).sum())
        if touched:
            raise AssertionError(f"{touched} bytes written outside of the output")

    def untouched(self) -> bool:
        """Whether no byte of the array itself has been written either."""
        return bool((self._buffer[self._body] == self._fill).all())


def at_offset(values: np.ndarray, offset: int) -> np.ndarray:
    """A copy that starts ``offset`` bytes past a 64-byte boundary."""
    memory = Guarded(values.shape, values.dtype, offset)
    memory.array[...] = values
    return memory.array


def at_page_end(values: np.ndarray) -> np.ndarray:
    """A copy whose last byte is the last of its page; reading past it kills the process."""
    values = np.ascontiguousarray(values)
    page = mmap.PAGESIZE
    pages = -(-values.nbytes // page)
    area = mmap.mmap(-1, (pages + 1) * page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(area))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(base + pages * page), ctypes.c_size_t(page), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    start = pages * page - values.nbytes
    whole = np.frombuffer(area, np.uint8, values.nbytes, start)
    whole[:] = values.reshape(-1).view(np.uint8)
    return whole.view(values.dtype).reshape(values.shape)
