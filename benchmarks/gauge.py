"""The limits of one weight, dtype and number of threads: measured between cells, the best kept."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch

from benchmarks import machine
from benchmarks.formulas import LinearProblem, cache_level, limit_of
from benchmarks.limits import Limits, arithmetic, vector_set
from benchmarks.records import Row
from quantization import PackedLinearLayer, QWQALinearLayer

OURS = "ours "
GROUP_BUFFERS = ("scales", "scale_steps", "zero_points")


@dataclass
class Gauge:
    """Turns times of ours into fractions of the limit.

    Attributes:
        limits: None where they cannot be measured; then nothing is added to rows.
        layer: whose weight is read.
        dtype: of the activations.
        threads: that take part.
        isas: instruction sets whose peaks are wanted.
        is_backward: whether the job is the gradient of the input.
    """

    limits: Limits | None
    layer: QWQALinearLayer | PackedLinearLayer
    dtype: str
    threads: int
    isas: tuple[str, ...]
    is_backward: bool = False

    def measure(self) -> None:
        """Sharpen what is known; called before, between and after the cells."""
        if self.limits is None:
            return
        self._bandwidth = self.limits.read(self.layer.nbytes, self.threads)
        loops = {self._loops(isa) for isa in self.isas} | {self._vectors(i) for i in self.isas}
        self._peaks = {name: self.limits.flops(name, self.threads) for name in sorted(loops)}

    def judge(self, row: Row) -> None:
        """Give a timed row of ours its limit, what sets it, and the fraction reached.

        The candidate is named by its instruction set, and perhaps its scheme after that.
        """
        if self.limits is None or row.kind != "ours" or not row.timing:
            return
        isa = row.candidate.removeprefix(OURS).split()[0]
        problem = problem_of(self.layer, self.dtype, row.case["tokens"])
        traffic = problem.backward_traffic if self.is_backward else problem.traffic
        loops, vectors = self._loops(isa), self._vectors(isa)
        limit = limit_of(traffic, problem.flops, self._bandwidth, self._peaks[loops])
        row.values |= {"limit": limit.seconds, "bound": limit.bound, "peak": loops}
        row.values |= {"traffic": traffic, "flops": problem.flops}
        row.values["fraction"] = limit.seconds / row.median
        if loops != vectors:
            plain = limit_of(traffic, problem.flops, self._bandwidth, self._peaks[vectors])
            row.values["fraction_fma"] = plain.seconds / row.median
        row.values["level"] = cache_level(self.layer.nbytes, self.threads, machine.caches())

    def _loops(self, isa: str) -> str:
        return arithmetic(isa, self.dtype, self.limits.names)

    def _vectors(self, isa: str) -> str:
        return vector_set(isa, self.limits.names)


def problem_of(
    layer: QWQALinearLayer | PackedLinearLayer, dtype: str, tokens: int
) -> LinearProblem:
    """One call of a layer of ours on activations of a dtype."""
    in_features, bits = layer.in_features, 8
    scale_bytes = layer.scales.element_size()
    if isinstance(layer, PackedLinearLayer):
        scheme = layer.scheme
        bits = Fraction(8, 5) if scheme.grid == "ternary" else scheme.bits
        buffers = scheme.buffers((1, in_features), layer.dtype)
        scale_bytes = sum(buffers[name].nbytes for name in GROUP_BUFFERS if name in buffers)
    size = getattr(torch, dtype).itemsize
    return LinearProblem(layer.out_features, in_features, tokens, size, scale_bytes, bits)
