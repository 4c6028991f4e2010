"""The limits of one weight, dtype and number of threads: measured between cells, the best kept."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks import machine
from benchmarks.formulas import LinearProblem, cache_level, limit_of
from benchmarks.limits import Limits, arithmetic, vector_set
from benchmarks.records import Row
from quantization import QWQALinearLayer

OURS = "ours "


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
    layer: QWQALinearLayer
    dtype: str
    threads: int
    isas: tuple[str, ...]
    is_backward: bool = False

    def measure(self) -> None:
        """Sharpen what is known; called before, between and after the cells."""
        if self.limits is None:
            return
        self._bandwidth = self.limits.read(self.layer.int8_weights.nbytes, self.threads)
        loops = {self._loops(isa) for isa in self.isas} | {self._vectors(i) for i in self.isas}
        self._peaks = {name: self.limits.flops(name, self.threads) for name in sorted(loops)}

    def judge(self, row: Row) -> None:
        """Give a timed row of ours its limit, what sets it, and the fraction reached."""
        if self.limits is None or row.kind != "ours" or not row.timing:
            return
        isa = row.candidate.removeprefix(OURS)
        size = self.layer.scales.element_size()
        problem = LinearProblem(
            self.layer.out_features, self.layer.in_features, row.case["tokens"], size, size
        )
        traffic = problem.backward_traffic if self.is_backward else problem.traffic
        loops, vectors = self._loops(isa), self._vectors(isa)
        limit = limit_of(traffic, problem.flops, self._bandwidth, self._peaks[loops])
        row.values |= {"limit": limit.seconds, "bound": limit.bound, "peak": loops}
        row.values |= {"traffic": traffic, "flops": problem.flops}
        row.values["fraction"] = limit.seconds / row.median
        if loops != vectors:
            plain = limit_of(traffic, problem.flops, self._bandwidth, self._peaks[vectors])
            row.values["fraction_fma"] = plain.seconds / row.median
        row.values["level"] = cache_level(
            self.layer.int8_weights.nbytes, self.threads, machine.caches()
        )

    def _loops(self, isa: str) -> str:
        return arithmetic(isa, self.dtype, self.limits.names)

    def _vectors(self, isa: str) -> str:
        return vector_set(isa, self.limits.names)
