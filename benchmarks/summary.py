"""Which figures are reached: each cell by itself, the missed ones named, nothing averaged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from benchmarks.figures import (
    Bound,
    Cell,
    Figure,
    beats,
    in_a_model_figures,
    named,
    reaches,
)
from benchmarks.gauge import OURS
from benchmarks.peers import BASELINE
from benchmarks.peers_4bit import BITSANDBYTES
from benchmarks.records import Results, Row, cells
from benchmarks.tables import heading

MANY = 96  # tokens from which a map is bound by arithmetic


@dataclass
class Verdict:
    """What became of a figure.

    Attributes:
        title: of the figure.
        cells: how many it speaks of.
        missed: those that fall short, each with its value and the bound.
    """

    title: str
    cells: int = 0
    missed: list[str] = field(default_factory=list)

    @property
    def reached(self) -> int:
        """How many cells are good enough."""
        return self.cells - len(self.missed)

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        return {
            "figure": self.title, "cells": self.cells, "reached": self.reached,
            "missed": self.missed,
        }  # fmt: skip


def summarize(results: Results, best_isa: str, are_small: bool = False) -> list[Verdict]:
    """A verdict on every figure that this run has cells for.

    Where the shapes are too small for a speed to mean anything, only whether results are right.
    """
    figures = _right_figures() if are_small else _figures(OURS + best_isa)
    verdicts = [_judge(figure, results) for figure in figures]
    return [verdict for verdict in verdicts if verdict.cells]


def _judge(figure: Figure, results: Results) -> Verdict:
    verdict = Verdict(figure.title)
    for cell in cells(results.of(figure.section)):
        for row, value, bound in _tested(figure, cell):
            verdict.cells += 1
            if not (value > bound if figure.strict else value >= bound):
                who = "" if row.section == "linear" else f"{row.candidate}, "
                told = f"asked {bound:g}{_fresh(row, value)}"
                verdict.missed.append(f"{who}{heading(row)}: {value:.2f} ({told})")
    return verdict


def _fresh(row: Row, value: float) -> str:
    """What becomes of a fraction of the traffic limit when new pages count as work too."""
    if "fraction_fresh" not in row.values or value != row.values["fraction"]:
        return ""
    return f"; {row.values['fraction_fresh']:.2f} with the first touch of new pages"


def _tested(figure: Figure, cell: Cell) -> Iterator[tuple[Row, float, float]]:
    for row in cell:
        if row.kind == "ours" and row.timing:
            pair = figure.test(row, cell)
            if pair is not None:
                yield row, *pair


def _figures(best: str) -> list[Figure]:
    """All lines of the table; `best` is the candidate of the best instruction set."""
    linear = [*_limit_figures(best), *_race_figures(best), *_avx2_figures()]
    streams = [*_quantize_figures(best), *_pack_figures(best)]
    packed = [*_packed_race_figures(best), *_packed_rate_figures(best)]
    linear = [*in_a_model_figures(), *linear]
    return [*linear, *packed, *streams, *_call_figures(), *_file_figures(), *_right_figures()]


def _limit_figures(best: str) -> list[Figure]:
    def bound(first: int, last: int, least: dict[str, float], on_all: float = 0.0) -> Bound:
        def of(row: Row) -> float | None:
            if row.candidate != best or not first <= row.case["tokens"] <= last:
                return None
            asked = least.get(row.case["dtype"])
            return on_all if asked and on_all and row.case["threads"] > 1 else asked

        return of

    def beyond_l2(inner: Bound) -> Bound:
        return lambda row: None if row.values.get("level") == "L2" else inner(row)

    both = {"float32": 0.85, "bfloat16": 0.85}
    many = {"float32": 0.90, "bfloat16": 0.85}
    return [
        Figure(
            "M=1: 0.85 of the limit on one thread, 0.80 on all",
            "linear", reaches(bound(1, 1, both, on_all=0.80)),
        ),
        Figure(
            "M=2..32, float32, beyond L2: 0.85 of the limit",
            "linear", reaches(beyond_l2(bound(2, 32, {"float32": 0.85}))),
        ),
        Figure(
            "M=2..32, bfloat16: 0.70 of the limit",
            "linear", reaches(bound(2, 32, {"bfloat16": 0.70})),
        ),
        Figure(
            "M>=96: 0.90 of the limit in float32, 0.85 in bfloat16",
            "linear", reaches(bound(96, 10**9, many)),
        ),
    ]  # fmt: skip


def _race_figures(best: str) -> list[Figure]:
    def speedup(row: Row) -> float | None:
        is_large = row.values.get("level") == "DRAM" and row.case["tokens"] == 1
        if row.candidate != best or not is_large:
            return None
        return {"float32": 4.0, "bfloat16": 2.0}.get(row.case["dtype"])

    return [
        Figure(
            "faster than nn.Linear of the same dtype",
            "linear", beats(named(BASELINE), 1.0, named(best)), strict=True,
        ),
        Figure(
            "M=1, beyond L3: 4x nn.Linear in float32, 2x in bfloat16",
            "linear", reaches(speedup, "ratio"),
        ),
        Figure(
            "faster than every W8A16 peer",
            "linear", beats(lambda row: row.kind == "W8A16", 1.0, named(best)), strict=True,
        ),
    ]  # fmt: skip


def _avx2_figures() -> list[Figure]:
    def bound(row: Row) -> float | None:
        if row.candidate != f"{OURS}avx2" or 1 < row.case["tokens"] < 16:
            return None
        return 0.80 if row.case["tokens"] == 1 else 0.75

    title = "AVX2 forced: 0.80 of its own limit at M=1, 0.75 at M>=16"
    return [Figure(title, "linear", reaches(bound))]


def _packed_race_figures(best: str) -> list[Figure]:
    raced = [f"{best} {scheme}" for scheme in ("w4g128", "nf4g64")]

    def is_large(row: Row) -> bool:
        is_shared = row.case["tokens"] == 1 and row.case["threads"] > 1
        return row.candidate in raced and is_shared and row.values.get("level") == "DRAM"

    def is_raced(row: Row) -> bool:
        """In float32 bitsandbytes rounds its input where there are more tokens: no race."""
        last = {"float32": 4, "bfloat16": 10**9}.get(row.case["dtype"], 0)
        return row.candidate in raced and row.case["tokens"] <= last

    def is_other(row: Row) -> bool:
        return row.kind == "W4A16" and row.candidate != BITSANDBYTES

    races = "M<=4 in float32, all M in bfloat16"
    return [
        Figure(
            "w4g128 and nf4g64, M=1, all threads, beyond L3: 0.70 of the limit",
            "packed", reaches(lambda row: 0.70 if is_large(row) else None),
        ),
        Figure(
            "w4g128 and nf4g64, M=1, all threads, beyond L3: faster than the int8 layer",
            "packed", beats(named(f"{best} int8"), 1.0, is_large), strict=True,
        ),
        Figure(
            f"w4g128 and nf4g64, {races}: faster than bitsandbytes nf4",
            "packed", beats(named(BITSANDBYTES), 1.0, is_raced), strict=True,
        ),
        Figure(
            f"w4g128 and nf4g64, {races}: 1.5x every other 4-bit peer",
            "packed", beats(is_other, 1.5, is_raced),
        ),
    ]  # fmt: skip


def _packed_rate_figures(best: str) -> list[Figure]:
    least = {f"{OURS}avx2": 8.0}
    if best.startswith(f"{OURS}avx512"):
        least[best] = 25.0

    def rate(row: Row, cell: Cell) -> tuple[float, float] | None:
        form, scheme = row.candidate.rsplit(" ", 1)
        if row.case["tokens"] > 1 or form not in least or scheme not in _UNEVEN:
            return None
        asked = least[form] * row.case["threads"]
        if "fraction" in row.values:
            asked = min(asked, row.values["gweights"] / row.values["fraction"])
        return row.values["gweights"], asked

    def of_int8(row: Row, cell: Cell) -> tuple[float, float] | None:
        form, scheme = row.candidate.rsplit(" ", 1)
        if row.case["tokens"] < MANY or scheme == "int8":
            return None
        return beats(named(f"{form} int8"), 0.85, lambda row: True)(row, cell)

    return [
        Figure(
            "1, 2, 3, 5, 6, 7 bits, M=1: 25 Gweights/s a core (AVX2: 8), or the limit if lower",
            "packed", rate,
        ),
        Figure("any width, M>=96: 0.85 of the int8 layer", "packed", of_int8),
    ]  # fmt: skip


_UNEVEN = ("w1g64a", "binaryg64", "w2g64", "w3g64", "w5g64", "w6g64", "w7g64", "ternaryg64")


def _quantize_figures(best: str) -> list[Figure]:
    def is_meant(row: Row) -> bool:
        is_quantize = row.case["way"] == "quantize" and row.case["dtype"] == "float32"
        return row.candidate == best and is_quantize

    def quantize(row: Row) -> float | None:
        two_passes = row.case["granularity"] in ("column", "tensor")
        return (0.60 if two_passes else 0.70) if is_meant(row) else None

    def dequantize(row: Row) -> float | None:
        return 0.70 if row.candidate == best and row.case["way"] == "dequantize" else None

    return [
        Figure(
            "quantize float32: 0.70 of the traffic limit (row, group), 0.60 (column, tensor)",
            "quantize", reaches(quantize),
        ),
        Figure(
            "quantize float32: 20x the torch expression",
            "quantize", beats(named("torch expression"), 20.0, is_meant),
        ),
        Figure("dequantize: 0.70 of the traffic limit", "quantize", reaches(dequantize)),
    ]  # fmt: skip


def _pack_figures(best: str) -> list[Figure]:
    def narrow(row: Row) -> bool:
        return row.candidate == best and row.case["bits"] in (2, 4)

    def single(row: Row) -> bool:
        is_down = row.case["layout"].endswith("dim 0") and row.case["way"] == "pack"
        return row.candidate == best and row.case["bits"] == 1 and is_down

    return [
        Figure(
            "pack and unpack: 0.70 of the traffic limit",
            "pack", reaches(lambda row: 0.70 if row.candidate == best else None),
        ),
        Figure(
            "2 and 4 bits: faster than the torch expression",
            "pack", beats(named("torch expression"), 1.0, narrow), strict=True,
        ),
        Figure(
            "1 bit along dim 0: 10x np.packbits",
            "pack", beats(named("np.packbits"), 10.0, single),
        ),
    ]  # fmt: skip


def _call_figures() -> list[Figure]:
    def of_job(job: str, least: dict[str, float]) -> Bound:
        def bound(row: Row) -> float | None:
            is_job = row.case["what"].startswith(job)
            return least.get(row.candidate) if is_job else None

        return bound

    def layer(row: Row) -> bool:
        return row.candidate == "ours layer" and row.case["dtype"] == "float32"

    ours = {"W8A16 float32": 2.2, "W8A16 bfloat16": 1.3}
    zero = dict.fromkeys(ours, 0.75)
    return [
        Figure(
            "greedy: 2.2x the float32 model, 1.3x the bfloat16 model",
            "model", reaches(of_job("greedy", ours), "of_float"),
        ),
        Figure(
            "greedy: 0.75 of the model with linears that cost nothing",
            "model", reaches(of_job("greedy", zero), "of_zero_cost"),
        ),
        Figure(
            "prefill: 1.5x the float32 model",
            "model", reaches(of_job("prefill", {"W8A16 float32": 1.5}), "of_float"),
        ),
        Figure(
            "a call of 16x32, M=4, float32: no longer than nn.Linear's",
            "overhead", beats(named(BASELINE), 1.0, layer),
        ),
    ]  # fmt: skip


def _file_figures() -> list[Figure]:
    def is_opening(row: Row) -> bool:
        return row.case["way"] == "open" and row.candidate == "ours load_quantized"

    def opened(row: Row, cell: Cell) -> tuple[float, float] | None:
        return (0.5 / row.median, 1.0) if is_opening(row) else None

    def resident(row: Row, cell: Cell) -> tuple[float, float] | None:
        return (50 / max(row.values["resident_mb"], 1e-9), 1.0) if is_opening(row) else None

    def streams(row: Row) -> bool:
        return row.case["way"] == "quantize"

    return [
        Figure("opening 1 GB: at most 0.5 s (how many times faster)", "files", opened),
        Figure("opening 1 GB: at most 50 MB resident (how many times less)", "files", resident),
        Figure(
            "quantizing a checkpoint: 0.5 of a plain copy of the same bytes",
            "files", reaches(lambda row: 0.5 if streams(row) else None),
        ),
        Figure(
            "quantizing a checkpoint: 3x torchao, quantized whole and saved",
            "files", beats(lambda row: row.kind == "peer", 3.0, streams),
        ),
    ]  # fmt: skip


def _right_figures() -> list[Figure]:
    return [
        Figure(
            "codes and numbers equal those of the torch expression",
            "quantize", reaches(lambda row: 1.0, "exact"),
        ),
        Figure("packed bytes and codes are right", "pack", reaches(lambda row: 1.0, "exact")),
    ]  # fmt: skip
