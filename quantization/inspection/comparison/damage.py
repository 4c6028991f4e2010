"""What a layer's outputs are beside those of another: sums of squares, and figures of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quantization.console.columns import Column

__all__ = ["COLUMNS", "LayerDamage", "LayerSums"]


@dataclass(frozen=True)
class LayerDamage:
    """What a layer's outputs are, beside those of the reference.

    With reference outputs y, outputs z of the layer in its model, and outputs o of the layer on the
    inputs that the reference's layer has: a signal-to-noise ratio is ``10 log10(|y|^2 / |e|^2)``.

    Attributes:
        name: dotted name of the layer, or of what holds it, where the reference has no such layer.
        scheme: of its weight.
        cosine: of z and y, all outputs as one vector.
        sqnr: in dB, of e = z - y: everything that is off here.
        own_sqnr: of e = o - y: the layer's own damage.
        inherited_sqnr: of e = z - o: what it makes of the damage of the layers before it.
        own_share: of the energies of own and inherited damage, the own.
        outputs: numbers that were compared.

    Example:
        >>> LayerDamage("0", "w4", 0.99, 20.0, 20.0, math.inf, 1.0, 64).own_share
        1.0
    """

    name: str
    scheme: str
    cosine: float
    sqnr: float
    own_sqnr: float
    inherited_sqnr: float
    own_share: float
    outputs: int


COLUMNS = (
    Column("name", "name", "layer"),
    Column("scheme", help="of its weight"),
    Column("cosine", "number", format=".5f", help="of its outputs and the reference's"),
    Column("sqnr", "number", "dB", ".1f", "signal to noise of its outputs, everything counted"),
    Column("own_sqnr", "number", "own dB", ".1f", "the same on the reference's inputs"),
    Column("inherited_sqnr", "number", "inherited dB", ".1f", "of what came with its inputs"),
    Column("own_share", "share", "own share", help="of own and inherited damage"),
)


@dataclass
class LayerSums:
    """Squares and products of a layer's outputs, summed as float64."""

    wanted: float = 0.0
    found: float = 0.0
    product: float = 0.0
    total: float = 0.0
    own: float = 0.0
    inherited: float = 0.0
    outputs: int = 0

    def add(self, wanted: Tensor, own: Tensor, found: Tensor) -> None:
        """Outputs of the reference, of the layer on the same inputs, and of the layer."""
        self.wanted += _dot(wanted, wanted)
        self.found += _dot(found, found)
        self.product += _dot(wanted, found)
        self.inherited += _square_of_difference(found, own)
        self.own += _square_of_difference(own, wanted)
        self.total += _square_of_difference(found, wanted)
        self.outputs += wanted.numel()

    def merge(self, other: LayerSums) -> None:
        """The sums of other outputs of the layer."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def damage(self, name: str, scheme: str) -> LayerDamage:
        """What they say of a layer."""
        size = math.sqrt(self.wanted * self.found)
        both = self.own + self.inherited
        return LayerDamage(
            name,
            scheme,
            self.product / size if size else math.nan,
            _decibels(self.wanted, self.total),
            _decibels(self.wanted, self.own),
            _decibels(self.wanted, self.inherited),
            self.own / both if both else 0.0,
            self.outputs,
        )


_AT_ONCE = 1 << 20


def _dot(one: Tensor, other: Tensor) -> float:
    pairs = zip(one.split(_AT_ONCE), other.split(_AT_ONCE), strict=True)
    return math.fsum(torch.dot(a.float(), b.float()).item() for a, b in pairs)


def _square_of_difference(one: Tensor, other: Tensor) -> float:
    pairs = zip(one.split(_AT_ONCE), other.split(_AT_ONCE), strict=True)
    return math.fsum((a.float() - b.float()).square_().sum().item() for a, b in pairs)


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal and noise > 0 else -math.inf
