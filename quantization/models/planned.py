"""The parameters of a model and what is to become of each: the rows of a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import nn

from quantization.layers.float_layers import is_conv1d
from quantization.layers.quantized_module import QuantizedModule
from quantization.models.expected import ROWS, expected
from quantization.models.recipe import W8A16
from quantization.ops.runtime import active_isa
from quantization.schemes.scheme import Scheme
from quantization.swap.conversion import memory_of
from quantization.swap.engine import Layer
from quantization.swap.report import Candidate
from quantization.swap.walker import Site

__all__ = [
    "PlannedParameter",
    "RowsOf",
    "measured",
    "parameters_of",
    "scheme_name",
    "some_rows",
    "spread",
]

#: Gives so many rows of the weight of a dotted name; True: it is stored with rows for columns.
RowsOf = Callable[[str, int, bool], torch.Tensor]


@dataclass(frozen=True)
class PlannedParameter(Candidate):
    """A parameter and what is to become of it; fields as of a layer in a report, and more.

    Attributes:
        layer: dotted name of the module that holds it.
        dtype: its dtype, by name.
        shares: the first parameter of the same numbers in memory, where this is another one.
        kernel: the instruction set whose kernel multiplies by it afterwards, on this CPU now.
        sqnr: expected signal to noise of the weight in decibels.
        outliers: numbers further from 0 than six standard deviations.
        nonfinite: NaN and infinite numbers.
    """

    layer: str = ""
    dtype: str = ""
    shares: str = ""
    kernel: str = ""
    sqnr: float | None = None
    outliers: int | None = None
    nonfinite: int | None = None

    noun: ClassVar[str] = "parameters"

    def together(self, members: Sequence[Any], name: str) -> Self:
        """One row for many; its figures are the worst of theirs, or all together."""

        def known(field: str) -> list[Any]:
            return [value for row in members if (value := getattr(row, field)) is not None]

        return replace(
            super().together(members, name),
            sqnr=min(known("sqnr"), default=None),
            outliers=sum(known("outliers")) if known("outliers") else None,
            nonfinite=sum(known("nonfinite")) if known("nonfinite") else None,
        )

    @property
    def what(self) -> str:
        """What will happen, and why, or why not."""
        status = {"replaced": "quantize"}.get(self.status, self.status)
        is_told = not self.shares or self.shares in self.reason
        reasons = [self.reason, "" if is_told else f"shared with {self.shares}"]
        if self.replaced and self.nonfinite:
            reasons.append(f"{self.nonfinite} numbers are NaN or infinite, an error by default")
        said = "; ".join(filter(None, reasons))
        return f"{status}: {said}" if said else status


#: A row as far as it is known, the tensor that it is of, and the layer that is decided upon.
Found = tuple[PlannedParameter, torch.Tensor | None, Layer | None]


def parameters_of(sites: list[Site], layers: list[Layer]) -> list[Found]:
    """Each parameter once for each fate of it; of a quantized layer its weight.

    Bytes of what several share stand in the first row, as long as one of them stays.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> [row.what for row, *_ in parameters_of([Site("0", model, "0", model[0])], [])]
        ['stays: Linear', 'stays: bias']
    """
    holders = _holders(sites, layers)
    found: dict[Any, Found] = {}
    firsts: dict[Any, str] = {}
    kept: set[Any] = set()
    seen: set[int] = set()
    for name, tensor, owner in _tensors(sites):
        layer = holders.get((id(owner), name.rpartition(".")[2])) or holders.get((id(owner), ""))
        seen.add(id(layer))
        row = _row(name, tensor, owner, layer)
        place = memory_of(tensor)
        key = (place, row.status, row.reason, row.scheme)
        if key in found:
            first, *rest = found[key]
            found[key] = (replace(first, aliases=(*first.aliases, name)), *rest)
            continue
        first_name = firsts.setdefault(place, name)
        if first_name != name:
            row = replace(row, shares=first_name, bytes_before=0)
        if not row.replaced:
            row = replace(row, bytes_after=0 if place in kept else row.bytes_after)
            kept.add(place)
        found[key] = row, tensor, layer
    lazy = [layer for layer in layers if id(layer) not in seen]
    return [*found.values(), *((_row_without_tensor(layer), None, layer) for layer in lazy)]


def _holders(sites: list[Site], layers: list[Layer]) -> dict[tuple[int, str], Layer]:
    """Layers by the modules that hold their parameters, those inside included."""
    holders = {(id(layer.module), layer.parameter): layer for layer in layers}
    for site in sites:
        above = holders.get((id(site.parent), ""))
        if above is not None:
            holders.setdefault((id(site.module), ""), above)
    return holders


def _tensors(sites: list[Site]) -> Iterable[tuple[str, torch.Tensor, nn.Module]]:
    """Parameters under all their names, and the codes of quantized layers as their weights."""
    for site in sites:
        prefix = f"{site.name}." if site.name else ""
        module = site.module
        if isinstance(module, QuantizedModule):
            yield prefix + "weight", module._buffers[module._weight_names()[0]], module
            if module._buffers.get("bias") is not None:
                yield prefix + "bias", module._buffers["bias"], module
        for key, tensor in module._parameters.items():
            if tensor is not None and not nn.parameter.is_lazy(tensor):
                yield prefix + key, tensor, module


def _row(
    name: str, tensor: torch.Tensor, owner: nn.Module, layer: Layer | None
) -> PlannedParameter:
    is_weight = layer is not None and "bias" not in name.rpartition(".")[2]
    row = PlannedParameter(
        name=name,
        status="stays",
        reason="bias" if "bias" in name.rpartition(".")[2] else type(owner).__name__,
        kind=type(owner).__name__,
        shape=tuple(tensor.shape),
        bytes_before=tensor.nbytes,
        bytes_after=tensor.nbytes,
        layer=name.rpartition(".")[0],
        dtype=str(tensor.dtype).removeprefix("torch."),
    )
    if not is_weight or layer is None:
        return row
    row = replace(row, status=layer.status, reason=layer.reason)
    if isinstance(owner, QuantizedModule):
        nbytes = owner.nbytes
        row = replace(
            row,
            scheme=scheme_name(layer),
            shape=owner._weight_shape(),
            bits_per_weight=owner.bits_per_weight,
            bytes_before=nbytes,
            bytes_after=nbytes,
            kernel=active_isa(),
        )
    return _to_be_quantized(row, owner, layer) if layer.status == "replaced" else row


def _to_be_quantized(row: PlannedParameter, owner: nn.Module, layer: Layer) -> PlannedParameter:
    shape = row.shape[::-1] if is_conv1d(owner) else row.shape
    dtype = owner.dtype if isinstance(owner, QuantizedModule) else row.dtype
    scheme = _scheme(layer)
    return replace(
        row,
        scheme=scheme_name(layer),
        method=layer.method,
        shape=shape,
        bits_per_weight=scheme.bits_per_weight(shape, dtype),
        bytes_after=scheme.nbytes(shape, dtype),
        kernel=active_isa(),
    )


def _row_without_tensor(layer: Layer) -> PlannedParameter:
    kind = type(layer.module).__name__
    name = layer.names[0]
    return PlannedParameter(name, layer.status, layer.reason, kind, None, 0, 0, layer=name)


def _scheme(layer: Layer) -> Scheme:
    scheme = layer.make.keywords["scheme"]  # type: ignore[union-attr]
    return Scheme.int8() if scheme == W8A16 else scheme


def scheme_name(layer: Layer) -> str:
    """Of what a layer is to become, or is; empty for a float one."""
    if layer.status == "replaced":
        return str(layer.make.keywords["scheme"])  # type: ignore[union-attr]
    if not isinstance(layer.module, QuantizedModule):
        return ""
    return str(getattr(layer.module, "scheme", W8A16))


def measured(
    row: PlannedParameter, tensor: torch.Tensor | None, layer: Layer | None, rows_of: RowsOf | None
) -> PlannedParameter:
    """The row with what is to be expected of its numbers, where they are to be quantized.

    Args:
        row: of the parameter.
        tensor: it.
        layer: what is decided upon, or None.
        rows_of: reads rows that are not in memory.
    """
    if not row.replaced or layer is None or tensor is None or 0 in tensor.shape:
        return row
    if not tensor.is_floating_point():
        return row  # codes of another scheme
    whole = None
    if rows_of is not None:
        rows = rows_of(row.name, ROWS, is_conv1d(layer.module))
    else:
        whole = tensor.detach()
        turned = whole.t() if is_conv1d(layer.module) else whole
        rows = some_rows(turned, ROWS)
    found = expected(rows, _scheme(layer), whole)
    return replace(row, sqnr=found.sqnr, outliers=found.outliers, nonfinite=found.nonfinite)


def some_rows(matrix: torch.Tensor, count: int) -> torch.Tensor:
    """So many rows, evenly spread, the first and the last among them.

    Example:
        >>> some_rows(torch.arange(9).reshape(9, 1), 3).T
        tensor([[0, 4, 8]])
    """
    return matrix[spread(len(matrix), count)]


def spread(length: int, count: int) -> list[int]:
    """So many places of a length, evenly spread.

    Example:
        >>> spread(9, 3), spread(2, 3)
        ([0, 4, 8], [0, 1])
    """
    count = min(count, length)
    return [i * (length - 1) // max(count - 1, 1) for i in range(count)]
