"""Sums over the inputs of linear layers while a model runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantization.methods.statistics import Statistics

__all__ = ["InputSums", "Sum"]

#: Rows whose products are summed in float32 (in float64 for float64 inputs) before float64 takes
#: over: a matrix product in float32 is twice as fast, and this few rows lose nothing that matters.
_ROWS = 512


@dataclass(eq=False)
class Sum:
    """Sums over rows of inputs: x^2 by column, x x^T or None, both float64; and their number."""

    moments: Tensor
    hessian: Tensor | None
    count: int

    @classmethod
    def over(cls, rows: Tensor, hessian: bool) -> Sum:
        """Over ``[rows, in_features]`` of any float dtype, on the device of the rows."""
        width = rows.shape[1]
        moments = torch.zeros(width, dtype=torch.float64, device=rows.device)
        products = moments.new_zeros(width, width) if hessian else None
        for part in rows.split(_ROWS):
            part = part if part.dtype == torch.float64 else part.float()
            moments += part.double().square().sum(0)
            if products is not None:
                products += part.T @ part
        return cls(moments, products, len(rows))

    def add(self, other: Sum) -> None:
        """Add the sums over other rows, wherever they are."""
        self.moments += other.moments.to(self.moments.device)
        if self.hessian is not None and other.hessian is not None:
            self.hessian += other.hessian.to(self.hessian.device)
        self.count += other.count

    def statistics(self) -> Statistics:
        """The means; the Hessian becomes exactly symmetric, and float32."""
        hessian = self.hessian
        if hessian is not None:
            hessian = ((hessian + hessian.T) / (2 * self.count)).float().cpu()
        return Statistics((self.moments / self.count).cpu(), hessian, self.count)


@dataclass(eq=False)
class _Seen:
    """The input that came last, and the layers that it went to."""

    inputs: Tensor
    version: int
    names: list[str]
    total: Sum

    def is_same(self, inputs: Tensor) -> bool:
        return inputs is self.inputs and _version(inputs) == self.version


class InputSums:
    """Sums over the inputs of some layers, each kept once for all layers that its inputs went to.

    Layers that are called one after the other with one tensor (q, k and v; gate and up) are one key
    of :attr:`sums`. Where that changes from batch to batch, a layer stands in several keys.

    Args:
        layers: the layers by name.
        hessian: whether products of columns are summed too.

    Attributes:
        sums: by the names of the layers.
        masks: of the batch that is running, as :func:`calls.masks_of` gives them.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> sums = InputSums({"layer": layer}, hessian=False)
        >>> with sums.watching():
        ...     _ = layer(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
        >>> sums.statistics()["layer"].moments
        tensor([5., 2.], dtype=torch.float64)
    """

    def __init__(self, layers: Mapping[str, nn.Module], hessian: bool) -> None:
        self.layers = dict(layers)
        self.hessian = hessian
        self.sums: dict[tuple[str, ...], Sum] = {}
        self.masks: list[Tensor] = []
        self._last: _Seen | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Sum what the layers are called with; whatever happens, no hook is left behind."""
        handles: list[Any] = []
        try:
            for name, layer in self.layers.items():
                hook = partial(self._see, name)
                handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
            yield
            self.flush()
        finally:
            self._last = None
            for handle in handles:
                handle.remove()

    def _see(self, name: str, layer: nn.Module, args: Any, kwargs: Any) -> None:
        inputs = next(
            filter(lambda value: isinstance(value, Tensor), [*args, *kwargs.values()]), None
        )
        if inputs is None or not inputs.numel() or not inputs.is_floating_point():
            return
        if inputs.is_meta:
            raise ValueError(
                f"{name or 'the model'} is on meta: there are no numbers to calibrate with"
            )
        if self._last is not None and self._last.is_same(inputs) and name not in self._last.names:
            self._last.names.append(name)
            return
        self.flush()
        rows = self._rows(inputs.detach())
        if len(rows):
            total = Sum.over(rows, self.hessian)
            self._last = _Seen(inputs, _version(inputs), [name], total)

    def _rows(self, inputs: Tensor) -> Tensor:
        """Those of real positions, where the inputs are by position: [batch, sequence, ...]."""
        for mask in self.masks:
            if inputs.ndim > 2 and inputs.shape[:2] == mask.shape:
                return inputs[mask.to(inputs.device)].reshape(-1, inputs.shape[-1])
            if inputs.ndim == 2 and inputs.shape[0] == mask.numel():
                return inputs[mask.to(inputs.device).reshape(-1)]
        return inputs.reshape(-1, inputs.shape[-1])

    def flush(self) -> None:
        """Add the last input to its sum.

        Raises:
            ValueError: if it holds a NaN or infinity.
        """
        last, self._last = self._last, None
        if last is None:
            return
        if not bool(last.total.moments.isfinite().all()):
            raise ValueError(
                f"the input of {last.names[0] or 'the model'} holds a NaN or infinity, so nothing "
                "can be learned from it; look at the batch, or run the model in float32"
            )
        key = tuple(last.names)
        if key in self.sums:
            self.sums[key].add(last.total)
        else:
            self.sums[key] = last.total

    def statistics(self) -> dict[str, Statistics]:
        """Of every layer that was reached; the sums are given up one by one, to save memory."""
        found: dict[str, Statistics] = {}
        while self.sums:
            key = next(iter(self.sums))
            made = self.sums.pop(key).statistics()
            for name in key:
                found[name] = found[name].merged(made) if name in found else made
        return {name: found[name] for name in self.layers if name in found}


def _version(inputs: Tensor) -> int:
    """How often the tensor was written; those of inference mode cannot be, while others watch."""
    return 0 if inputs.is_inference() else inputs._version
