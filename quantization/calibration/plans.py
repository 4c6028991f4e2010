"""What a budget of bits is spread over: layers, what each loses, and the plan that comes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quantization.calibration.allocation import Allocation, Point, allocate
from quantization.calibration.evaluate import Divergence
from quantization.console.columns import Column
from quantization.console.table import Table, Tabular
from quantization.models.recipe import Rule

__all__ = ["BitPlan", "PlannedLayer", "allocated", "bytes_for", "check_budget", "chosen", "curves",
           "figures", "loss_of", "recipe_of"]  # fmt: skip


@dataclass(frozen=True)
class PlannedLayer:
    """One weight of a plan.

    Example:
        >>> PlannedLayer("0", (8, 64), Rule("w4"), {"w4": 288}, {"w4": 0.01}).shape
        (8, 64)

    Attributes:
        name: dotted name of the layer, the first of those that share the weight.
        shape: ``(out_features, in_features)``.
        choice: what it becomes: a rule of the plan's choices.
        nbytes: of each choice.
        losses: of each choice: the divergence of the model with this layer alone quantized.
    """

    name: str
    shape: tuple[int, int]
    choice: Rule
    nbytes: Mapping[str, int]
    losses: Mapping[str, float]


@dataclass(frozen=True, repr=False)
class BitPlan(Tabular[dict[str, Any]]):
    """What each layer is to become, and what that is expected to lose; print it.

    Example:
        >>> import torch
        >>> from quantization import plan_bits
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32))
        >>> choices, batches = ("w4", "w8"), [torch.randn(4, 32)]
        >>> plan = plan_bits(model, target_bits=6, choices=choices, batches=batches)
        >>> type(plan).__name__, plan.nbytes <= 2 * 32 * 32 * 6 / 8 + 4 * 64
        ('BitPlan', True)

    Attributes:
        layers: weights with their choices and what was measured.
        choices: what each could become.
        recipe: for :func:`quantization.quantize_model`; what is not planned stays in float.
        nbytes: of all planned weights.
        bits: the same for each of their weights.
        predicted: the losses of all layers together, which is what is made least.
        bound: no plan of that size predicts less; ``predicted - bound`` is what is left to gain.
        frontier: (bytes, prediction) of the plans on the convex hull, the smallest first.
        measured: the divergence of the model under this plan; None of a plan by :meth:`at`.
        measure: the attribute of :class:`quantization.Divergence` that losses are: ``kl`` or
            ``drift``.
        other_bytes: of the model's tensors that are not planned.
    """

    layers: tuple[PlannedLayer, ...]
    choices: tuple[Rule, ...]
    recipe: Mapping[str, Rule | None]
    nbytes: int
    bits: float
    predicted: float
    bound: float
    frontier: tuple[Point, ...]
    measured: Divergence | None
    measure: str
    other_bytes: int

    def at(
        self,
        *,
        target_bits: float | None = None,
        max_bytes: int | None = None,
        max_divergence: float | None = None,
    ) -> BitPlan:
        """The plan of another budget, from what was measured; ``max_divergence`` as predicted.

        Raises:
            ValueError: as :func:`plan_bits` raises it.

        Example:
            >>> import torch
            >>> from quantization import plan_bits
            >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
            >>> plan = plan_bits(model, target_bits=4.6, batches=[torch.randn(9, 64)])
            >>> plan.at(max_bytes=plan.nbytes + plan.other_bytes).nbytes == plan.nbytes
            True
        """
        check_budget(target_bits, max_bytes, max_divergence)
        budget = bytes_for(self.layers, self.other_bytes, target_bits, max_bytes)
        found = allocated(self.layers, budget, max_divergence)
        layers = chosen(self.layers, self.choices, found)
        patterns = [pattern for pattern in self.recipe if pattern != "*"]
        made: dict[str, Any] = {"layers": layers, "recipe": recipe_of(patterns, layers)}
        return replace(self, measured=None, **made, **figures(layers, found))

    def table(self) -> Table[dict[str, Any]]:
        """A row a layer: what it becomes, and what each choice loses, times 1000."""
        names = list(self.layers[0].losses)
        columns = [Column("layer", "name"), Column("shape", "number", "out x in")]
        columns += [Column(name, "number", format=".3f") for name in names]
        rows = [
            {"layer": layer.name, "shape": layer.shape, "what": str(layer.choice)}
            | {name: 1000 * loss for name, loss in layer.losses.items()}
            for layer in self.layers
        ]
        said = "" if self.measured is None else f", measured {loss_of(self.measured)[1]:.5g}"
        return Table(
            (*columns, Column("what")),
            tuple(rows),
            f"{self.bits:.3f} bits a weight, {self.nbytes:,} bytes in {len(self.layers)} layers; "
            f"{self.measure} predicted {self.predicted:.5g} (bound {self.bound:.5g}){said}",
        )


# ---- budgets ---------------------------------------------------------------------------------


def check_budget(bits: float | None, nbytes: int | None, most: float | None) -> None:
    """Raise ValueError unless one budget above 0 is given."""
    given = [value for value in (bits, nbytes, most) if value is not None]
    if len(given) != 1:
        raise ValueError("give one of target_bits, max_bytes and max_divergence")
    if not given[0] > 0:
        raise ValueError(f"a budget is above 0, not {given[0]!r}")


def bytes_for(
    layers: Sequence[PlannedLayer], other: int, bits: float | None, nbytes: int | None
) -> int | None:
    """Bytes that the planned weights may take; None: as many as they like."""
    if bits is not None:
        return math.floor(bits * weights_of(layers) / 8)
    return None if nbytes is None else nbytes - other


def weights_of(layers: Sequence[PlannedLayer]) -> int:
    return sum(math.prod(layer.shape) for layer in layers)


def curves(layers: Sequence[PlannedLayer]) -> tuple[list[list[int]], list[list[float]]]:
    """Costs and losses of each layer's choices."""
    return [list(layer.nbytes.values()) for layer in layers], [
        list(layer.losses.values()) for layer in layers
    ]


def allocated(layers: Sequence[PlannedLayer], budget: int | None, most: float | None) -> Allocation:
    """The choices of a budget; raise ValueError if there are none, with what there is."""
    costs, losses = curves(layers)
    found = allocate(costs, losses, budget, math.inf if most is None else most)
    if found is not None:
        return found
    if budget is not None:
        least, count = sum(map(min, costs)), weights_of(layers)
        raise ValueError(
            f"the planned layers may take {budget:,} bytes, {8 * budget / count:.3f} bits a "
            f"weight, and under the smallest choices they take {least:,}, "
            f"{8 * least / count:.3f} bits: raise the budget, or add smaller choices"
        )
    raise ValueError(
        f"max_divergence is {most:.5g}, and even the best choices of all layers are expected to "
        f"lose {math.fsum(map(min, losses)):.5g}: raise it, or add larger choices"
    )


def figures(layers: Sequence[PlannedLayer], found: Allocation) -> dict[str, Any]:
    """What a plan says of its choices."""
    bits = 8 * found.cost / weights_of(layers)
    return {
        "nbytes": found.cost, "bits": bits, "predicted": found.loss, "bound": found.bound
    }  # fmt: skip


def chosen(
    layers: Sequence[PlannedLayer], rules: Sequence[Rule], found: Allocation
) -> tuple[PlannedLayer, ...]:
    """The layers with the choices that were found."""
    pairs = zip(layers, found.choices, strict=True)
    return tuple(replace(layer, choice=rules[choice]) for layer, choice in pairs)


def recipe_of(patterns: list[str], layers: Sequence[PlannedLayer]) -> dict[str, Rule | None]:
    """Rules for the planned layers; all others stay in float."""
    rules: dict[str, Rule | None] = {
        pattern: layer.choice for pattern, layer in zip(patterns, layers, strict=True)
    }
    return rules | {"*": None}


def loss_of(found: Divergence) -> tuple[str, float]:
    """What is compared: the name of the measure, and it."""
    if found.kl is not None:
        return "kl", found.kl
    assert found.drift is not None
    return "drift", found.drift
