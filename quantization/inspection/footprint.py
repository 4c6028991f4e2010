"""Every byte that a model keeps alive, once, and what it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from quantization.checkpoint.stored_model import unwrapped
from quantization.console.columns import Column, size
from quantization.console.table import Table
from quantization.layers.quantized_module import QuantizedModule
from quantization.swap.walker import walk

__all__ = ["Owned", "footprint"]

#: What the tensors of a quantized layer are.
_PARTS = {
    "packed_weights": "codes",
    "int8_weights": "codes",
    "scales": "scales",
    "scale_steps": "scales",
    "zero_points": "zero points",
    "codebook": "codebooks",
    "input_order": "orders of columns",
    "input_scale": "multipliers of columns",
    "bias": "biases",
}

_COLUMNS = (
    Column("owner", "text"),
    Column("tensors", "number"),
    Column("nbytes", "bytes", "bytes"),
    Column("share", "share"),
    Column("named_again", "bytes", "named again", help="under further names, not counted again"),
)


@dataclass
class Owned:
    """Bytes of one kind.

    Attributes:
        owner: what they are.
        tensors: how many there are.
        nbytes: of them, each byte once.
        shared: of further names of bytes that were counted already.
        share: of all bytes.
    """

    owner: str
    tensors: int = 0
    nbytes: int = 0
    shared: int = 0
    share: float = 0.0

    @property
    def named_again(self) -> int | None:
        """The same; None where there are none."""
        return self.shared or None


@dataclass
class _Memory:
    """Which bytes of a storage are counted already: disjoint ranges."""

    nbytes: int
    taken: list[tuple[int, int]] = field(default_factory=list)

    def take(self, start: int, stop: int) -> int:
        """Count a range; how many of its bytes are new."""
        new = stop - start
        rest = []
        for low, high in self.taken:
            if high < start or low > stop:
                rest.append((low, high))
                continue
            new -= max(0, min(high, stop) - max(low, start))
            start, stop = min(low, start), max(high, stop)
        self.taken = [*rest, (start, stop)]
        return new


def footprint(model: nn.Module) -> Table[Owned]:
    """What a model's memory is made of, each byte once.

    Counted are parameters and their gradients, buffers, and tensors that modules have as plain
    attributes. What is shared belongs to the first that has it. Bytes that no tensor shows, but
    which a view keeps alive (a row of a larger matrix, a file that is mapped), are a line of their
    own.

    Args:
        model: any module.

    Returns:
        A table of :class:`Owned`; the bytes of its rows are those of all storages together.

    Raises:
        TypeError: if ``model`` is no nn.Module.

    Example:
        >>> from quantization import PackedLinearLayer
        >>> model = nn.Sequential(PackedLinearLayer(64, 64, scheme="w4g32a"), nn.LayerNorm(64))
        >>> footprint(model)
        3.4 kB are kept alive
        owner             tensors   bytes  share
        codes                   1  2.0 kB  60.4%
        scales                  1   512 B  15.1%
        zero points             1    64 B   1.9%
        biases                  1   256 B   7.5%
        float parameters        2   512 B  15.1%
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model (a torch.nn.Module instance), not {model!r:.60}")
    owners: dict[str, Owned] = {}
    storages: dict[int, _Memory] = {}
    for owner, tensor in _tensors(unwrapped(model)):
        row = owners.setdefault(owner, Owned(owner))
        storage = tensor.untyped_storage()
        memory = storages.setdefault(storage._cdata, _Memory(storage.nbytes()))
        start = int(tensor.storage_offset()) * tensor.element_size()
        new = memory.take(start, start + _extent(tensor))
        row.nbytes += new
        row.shared += tensor.nbytes - min(new, tensor.nbytes)
        row.tensors += new > 0 or not tensor.nbytes
    hidden = sum(
        memory.nbytes - sum(stop - start for start, stop in memory.taken)
        for memory in storages.values()
    )
    if hidden:
        owners["hidden"] = Owned("kept alive by views", 0, hidden)
    total = sum(row.nbytes for row in owners.values())
    for row in owners.values():
        row.share = row.nbytes / total if total else 0.0
    return Table(_COLUMNS, tuple(owners.values()), f"{size(total)} are kept alive")


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What each tensor is, and it; those of a module once."""
    seen: set[int] = set()
    for site in walk(model):
        module = site.module
        if id(module) in seen:
            continue
        seen.add(id(module))
        is_ours = isinstance(module, QuantizedModule)
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or nn.parameter.is_lazy(tensor):
                continue
            other = "float parameters" if name in module._parameters else "buffers"
            yield _PARTS.get(name, other) if is_ours else other, tensor
            if tensor.grad is not None:
                yield "gradients", tensor.grad
        for value in vars(module).values():
            if isinstance(value, torch.Tensor):
                yield "plain attributes", value


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from the first number of a tensor to its last."""
    if not tensor.numel():
        return 0
    last = sum(
        (int(n) - 1) * int(step) for n, step in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return int(last + 1) * tensor.element_size()
