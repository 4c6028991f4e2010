"""Numbers to codes and back: every granularity, against the torch expression and the traffic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.formulas import Stream
from benchmarks.harness import Candidate
from benchmarks.peers import quiet
from benchmarks.session import Session, any_isa, shape_name
from benchmarks.streams import Trip, run_trip
from quantization import Granularity, Mode, dequantize_linear, quantize_linear, set_isa

EXPRESSION = "torch expression"
GROUPS = {"group 32": 32, "group 128": 128}
GRANULARITIES: dict[str, Any] = {
    "row": Granularity.PerDimension(1),
    "column": Granularity.PerDimension(0),
    "tensor": Granularity.PerTensor,
    **{name: Granularity.PerGroup(size, dim=1) for name, size in GROUPS.items()},
}
MODES = {"symmetric": Mode.Symmetric, "asymmetric": Mode.Asymmetric}


@dataclass(frozen=True)
class Recipe:
    """What is done to a matrix: by the package's names, and by plain torch.

    Attributes:
        granularity: a key of `GRANULARITIES`.
        mode: a key of `MODES`.
    """

    granularity: str
    mode: str

    def grouped(self, matrix: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """A view whose listed dimensions share a scale."""
        if self.granularity in GROUPS:
            return matrix.view(matrix.shape[0], -1, GROUPS[self.granularity]), [2]
        return matrix, {"row": [1], "column": [0], "tensor": [0, 1]}[self.granularity]

    def numbers_a_scale(self, shape: tuple[int, ...]) -> int:
        """How many elements share a scale."""
        sizes = {"row": shape[1], "column": shape[0], "tensor": shape[0] * shape[1]}
        return GROUPS.get(self.granularity) or sizes[self.granularity]

    def expression(self, matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Codes, scale and zero point as one writes them in torch."""
        grouped, dims = self.grouped(matrix)
        grouped = grouped.float()
        if self.mode == "symmetric":
            scale = grouped.abs().amax(dims, keepdim=True) / 127
            codes = torch.round(grouped / scale).clamp(-127, 127)
            return codes.to(torch.int8).view(matrix.shape), scale, torch.zeros(())
        low = grouped.amin(dims, keepdim=True).clamp(max=0)
        high = grouped.amax(dims, keepdim=True).clamp(min=0)
        scale = (high - low) / 255
        zero = torch.round(-128 - low / scale)
        codes = (torch.round(grouped / scale) + zero).clamp(-128, 127)
        return codes.to(torch.int8).view(matrix.shape), scale, zero

    def restored(self, codes: torch.Tensor, scale, zero, dtype: torch.dtype) -> torch.Tensor:
        """The way back, as one writes it in torch."""
        grouped, _ = self.grouped(codes)
        numbers = grouped.float() * scale
        if self.mode == "asymmetric":
            numbers = (grouped.float() - zero) * scale
        return numbers.to(dtype).view(codes.shape)

    def quantize(self, matrix: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """The package's call."""
        granularity, mode = GRANULARITIES[self.granularity], MODES[self.mode]
        return quantize_linear(matrix, torch.int8, granularity, mode)

    def streams(self, source_bytes: int, shape: tuple[int, ...]) -> tuple[Stream, Stream]:
        """Traffic of the way to codes and of the way back."""
        parameters = (8 if self.mode == "asymmetric" else 4) / self.numbers_a_scale(shape)
        passes = 2 if self.granularity in ("column", "tensor") else 1
        return (
            Stream(source_bytes, 1 + parameters, passes),
            Stream(1 + parameters, source_bytes),
        )


def run_quantize(session: Session) -> None:
    """Measure the section, and print a table for each cell."""
    settings = session.settings
    recipes = [Recipe(granularity, mode) for granularity in GRANULARITIES for mode in MODES]
    cells = 2 * len(recipes) * len(settings.dtypes) * len(settings.threads)
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(settings.matrix, generator=generator)
    with session.progress("quantize", cells), any_isa(), quiet(), torch.no_grad():
        for dtype in settings.dtypes:
            source = matrix.to(getattr(torch, dtype))
            for threads in settings.threads:
                for recipe in recipes:
                    _run_recipe(session, recipe, source, threads)


def _run_recipe(session: Session, recipe: Recipe, source: torch.Tensor, threads: int) -> None:
    case = {"shape": shape_name(source.shape), "dtype": str(source.dtype).removeprefix("torch.")}
    case |= {"granularity": recipe.granularity, "mode": recipe.mode, "threads": threads}
    forth, back = recipe.streams(source.element_size(), source.shape)
    expected = recipe.expression(source)
    codes, params = recipe.quantize(source)
    restored = recipe.restored(*expected, source.dtype)
    ways = (
        ("quantize", forth, partial(recipe.quantize, source), expected[0], _peers(recipe, source)),
        ("dequantize", back, partial(dequantize_linear, codes, params), restored, []),
    )
    plain = {
        "quantize": partial(recipe.expression, source),
        "dequantize": partial(recipe.restored, *expected, source.dtype),
    }
    for way, stream, ours, truth, peers in ways:
        candidates = [
            Candidate(f"ours {isa}", "ours", ours, partial(set_isa, isa))
            for isa in session.settings.isas
        ]
        baseline = Candidate(EXPRESSION, "expression", plain[way])
        trip = Trip(
            "quantize", {"way": way, **case}, [baseline, *candidates, *peers], EXPRESSION,
            stream, source.numel(), threads, partial(_is_equal, truth),
        )  # fmt: skip
        run_trip(session, trip)


def _is_equal(truth: torch.Tensor, result: Any) -> bool:
    codes = result[0] if isinstance(result, tuple) else result
    return torch.equal(codes, truth)


def _peers(recipe: Recipe, source: torch.Tensor) -> list[Candidate]:
    """Peers that have the same granularity, where they are installed."""
    if recipe.mode != "symmetric" or recipe.granularity not in ("row", "tensor"):
        return []
    makers: list[tuple[str, Callable]] = [("torchao", _torchao)]
    if recipe.granularity == "row":
        makers.append(("quanto", _quanto))
    found = []
    for name, make in makers:
        try:
            call = make(source, recipe.granularity)
        except ImportError:
            continue
        found.append(Candidate(name, "W8A16", call))
    return found


def _torchao(source: torch.Tensor, granularity: str) -> Callable[[], object]:
    from torchao.quantization import PerRow, PerTensor
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import Int8Tensor

    kind = PerRow() if granularity == "row" else PerTensor()
    return lambda: Int8Tensor.from_hp(source, kind)


def _quanto(source: torch.Tensor, granularity: str) -> Callable[[], object]:
    from optimum.quanto import AbsmaxOptimizer, qint8, quantize_weight

    optimizer = AbsmaxOptimizer()
    return lambda: quantize_weight(source, qint8, 0, optimizer(source, qint8, 0))
