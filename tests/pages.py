"""Whether the system was asked for huge pages: whether it has any left is not ours to say."""

from __future__ import annotations

from pathlib import Path

import torch

from quantization import pages_of


def asks_for_huge(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies in memory that was advised so, and is told to lie on what it got."""
    address, is_inside = tensor.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split(maxsplit=1)[0]
        if not head.endswith(":"):
            start, stop = (int(part, 16) for part in head.split("-"))
            is_inside = start <= address < stop
        elif is_inside and head == "VmFlags:":
            return "hg" in line.split() and pages_of(tensor) in ("huge", "small")
    return False
