"""Where a model's codes lie: side by side on huge pages, which a token reads faster.

A token reads every weight once, so what it waits for is memory; and of many small buffers, each on
4 KB pages of its own, much of that is looking up where the next page is. An :class:`Arena` gives
tensors room in regions that the system is asked to keep on pages of 2 MB. Each has a storage of its
own there, so it is saved, sent and copied as any other, and a region goes back to the system with
the last of its tensors.

``QUANTIZATION_HUGE_PAGES=0`` in the environment turns that off.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from quantization.forks import alone
from quantization.layers.quantized_module import QuantizedModule

__all__ = ["Arena", "fits", "lay_out", "offers_huge_pages", "pages_of"]

SWITCH = "QUANTIZATION_HUGE_PAGES"
HUGE = 2 << 20
REGION = 32 << 20  # a layer that is dropped gives back what it alone has of one
ALIGNMENT = 64  # of a cache line, which no load of a kernel then straddles
_KERNEL = Path("/sys/kernel/mm/transparent_hugepage")
_GROUP = Path("/sys/fs/cgroup")
_SMAPS = Path("/proc/self/smaps")


def offers_huge_pages() -> bool:
    """Whether this system gives huge pages to who asks, and the environment does not forbid it.

    Example:
        >>> offers_huge_pages() in (True, False)
        True
    """
    if os.environ.get(SWITCH) == "0" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    try:
        size = int((_KERNEL / "hpage_pmd_size").read_text())
        return size <= HUGE and "[never]" not in (_KERNEL / "enabled").read_text()
    except (OSError, ValueError):
        return False


class Arena:
    """Room for tensors, on huge pages where the system offers them.

    Regions are filled one after the other; a tensor of half a region or more has one of its own.
    Where no huge pages are offered, or no region is to be had, tensors are torch's own.

    Example:
        >>> arena = Arena()
        >>> one, two = arena.empty((3, 5), torch.int8), arena.empty((2,), torch.float32)
        >>> one.shape, one.untyped_storage().nbytes(), two.data_ptr() % 64
        (torch.Size([3, 5]), 15, 0)
    """

    def __init__(self) -> None:
        self._is_on = offers_huge_pages()
        self._region: mmap.mmap | None = None
        self._at = self._left = 0

    def empty(self, shape: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor without numbers yet, on the CPU; contiguous, from a multiple of 64 bytes on."""
        shape = tuple(shape)
        size = torch.Size(shape).numel() * dtype.itemsize
        with torch.inference_mode(False):
            place = self._place(size) if self._is_on and size else None
            if place is None:
                return torch.empty(shape, dtype=dtype, device="cpu")
            region, at = place
            strides = torch.empty(shape, device="meta").stride()
            memory = torch.frombuffer(region, dtype=torch.uint8, count=size, offset=at)
            made = torch.empty(0, dtype=dtype, device="cpu")
            return made.set_(memory.untyped_storage(), 0, shape, strides)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the arena with the numbers of another one."""
        made = self.empty(tensor.shape, tensor.dtype)
        with torch.inference_mode(False), torch.no_grad(), alone():
            return made.copy_(tensor)

    def _place(self, size: int) -> tuple[mmap.mmap, int] | None:
        if size >= REGION // 2:
            return _new_region(size)
        if size > self._left:
            found = _new_region(REGION)
            if found is None:
                return None
            self._region, self._at = found
            self._left = REGION
        assert self._region is not None
        at, taken = self._at, -(-size // ALIGNMENT) * ALIGNMENT
        self._at, self._left = at + taken, self._left - taken
        return self._region, at


def _new_region(size: int) -> tuple[mmap.mmap, int] | None:
    """Private memory that is touched by nobody yet, and where in it the first huge page begins."""
    try:
        region = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        region.madvise(mmap.MADV_HUGEPAGE)
    except (OSError, ValueError):  # address space is short
        return None
    with torch.inference_mode(False):
        address = torch.frombuffer(region, dtype=torch.uint8, count=1).data_ptr()
    return region, -address % HUGE


def lay_out(model: nn.Module) -> None:
    """Move the codes and scales of a model's quantized layers onto huge pages, side by side.

    :func:`quantization.quantize_model` and :func:`quantization.load_quantized` do it by themselves;
    it is for models that were copied, cast or built layer by layer. Codes are copied, and nothing
    else changes: buffers stay buffers, what layers share they go on sharing. Biases stay where they
    are, as they may belong to others too. Models of less than 2 MB, tensors elsewhere than on the
    CPU, and systems without huge pages are left alone.

    Args:
        model: any module; what was sent to other processes by ``share_memory`` stays shared.

    Raises:
        TypeError: if it is no nn.Module.

    Example:
        >>> from quantization import QWQALinearLayer
        >>> layer = QWQALinearLayer(2048, 2048)
        >>> lay_out(layer)
        >>> pages_of(layer.int8_weights) in ("huge", "small", "")
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"lay_out takes an nn.Module, not {model!r:.60}")
    lay_out_layers([m for m in model.modules() if isinstance(m, QuantizedModule)])


def lay_out_layers(layers: Iterable[QuantizedModule]) -> None:
    """The same for some layers, one after the other; tensors that they share are moved once."""
    places = [
        (layer._buffers, name, tensor)
        for layer in layers
        for name in layer._weight_names()
        if (tensor := layer._buffers.get(name)) is not None and _is_movable(tensor)
    ]
    total = sum({id(tensor): tensor.nbytes for _, _, tensor in places}.values())
    if total < HUGE or not offers_huge_pages():
        return
    arena, moved = Arena(), dict[int, torch.Tensor]()
    last = {id(tensor): index for index, (_, _, tensor) in enumerate(places)}
    places.reverse()  # what is moved is let go at once
    for index in range(len(places)):
        buffers, name, tensor = places.pop()
        key = id(tensor)
        buffers[name] = moved[key] if key in moved else moved.setdefault(key, arena.copy(tensor))
        if last[key] == index:
            del moved[key]


def _is_movable(tensor: torch.Tensor) -> bool:
    """Whether it is a plain tensor in memory of this process alone."""
    if type(tensor) is not torch.Tensor or tensor.device.type != "cpu" or tensor.requires_grad:
        return False
    return tensor.layout is torch.strided and tensor.is_contiguous() and not tensor.is_shared()


def fits(nbytes: int) -> bool:
    """Whether so many bytes more may be taken: half of what the system has left, or less.

    Example:
        >>> fits(1 << 60)
        False
    """
    limits = [left for left in (_left_in_system(), _left_in_group()) if left is not None]
    return bool(limits) and nbytes <= min(limits) // 2


def _left_in_system() -> int | None:
    found = _number_after("MemAvailable:", Path("/proc/meminfo"))
    return None if found is None else found * 1024


def _left_in_group() -> int | None:
    """What a container may still take: files that it merely keeps in memory do not count."""
    try:
        limit = int((_GROUP / "memory.max").read_text())
        used = int((_GROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no limit, or no group
        return None
    return limit - used + (_number_after("inactive_file", _GROUP / "memory.stat") or 0)


def _number_after(word: str, path: Path) -> int | None:
    try:
        lines = path.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.split()[:1] == [word])
    except (OSError, StopIteration, ValueError):
        return None


def pages_of(tensor: torch.Tensor, maps: list[tuple[int, int, str]] | None = None) -> str:
    """Which pages a tensor lies on.

    As the system tells at this moment (Linux, ``/proc/self/smaps``): memory that nobody has touched
    yet lies on none, and the system may make pages huge later.

    Args:
        tensor: any.
        maps: of :func:`read_maps`, for many tensors; None: read anew, which takes milliseconds.

    Returns:
        ``"huge"``, ``"small"``, ``"file"`` (of a mapped file), or ``""`` where that is not known.

    Raises:
        TypeError: if it is no tensor.

    Example:
        >>> pages_of(torch.zeros(3)) in ("small", "huge", "")
        True
        >>> pages_of(torch.zeros(3, device="meta"))
        ''
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"pages_of takes a tensor, not {tensor!r:.60}")
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided or not tensor.numel():
        return ""
    try:
        first = tensor.data_ptr()
    except RuntimeError:  # no memory of its own: a view that is computed
        return ""
    span = range(first, first + tensor.untyped_storage().nbytes())
    shares: dict[str, int] = {}
    for start, stop, kind in read_maps() if maps is None else maps:
        overlap = min(stop, span.stop) - max(start, span.start)
        if overlap > 0:
            shares[kind] = shares.get(kind, 0) + overlap
    return max(shares, key=shares.__getitem__, default="")


def read_maps() -> list[tuple[int, int, str]]:
    """Stretches of this process's memory: first byte, end, and kind of page.

    Example:
        >>> {kind for _, _, kind in read_maps()} <= {"huge", "small", "file"}
        True
    """
    try:
        lines = _SMAPS.read_text().splitlines()
    except OSError:
        return []
    found: list[tuple[int, int, str]] = []
    resident = 0
    for line in lines:
        head, *rest = line.split(maxsplit=5)
        if not head.endswith(":"):
            start, stop = (int(part, 16) for part in head.split("-"))
            found.append((start, stop, "small" if rest[3] == "0" else "file"))
        elif head == "Rss:":
            resident = int(rest[0])
        elif head == "AnonHugePages:" and found[-1][2] == "small" and 2 * int(rest[0]) > resident:
            found[-1] = (*found[-1][:2], "huge")
    return found
