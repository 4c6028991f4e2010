"""The least time a job can take: bytes over bandwidth, operations over peak, whichever is longer.

Pure arithmetic; the bandwidths and peaks that go in are measured by :mod:`benchmarks.limits`.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

CODE_BYTES = 1  # an int8 weight


@dataclass(frozen=True)
class LinearProblem:
    """One call of a linear map.

    Attributes:
        out_features: N, rows of the weight.
        in_features: K, columns of the weight.
        tokens: M, rows of the activations.
        value_bytes: of one activation, and of one output.
        scale_bytes: scales and zero points of one row of weights.
        bits: of one weight; 8/5 where five share a byte.
    """

    out_features: int
    in_features: int
    tokens: int
    value_bytes: int
    scale_bytes: int
    bits: int | Fraction = 8

    @property
    def weight_bytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        row = -(-self.in_features * self.bits // 8) + self.scale_bytes
        return self.out_features * row

    @property
    def traffic(self) -> int:
        """Bytes that must move: weights, activations, and the output twice (it is fetched first).

        N (K bits/8 + g) + M K sx + 2 M N sy.
        """
        moved = self.in_features + 2 * self.out_features
        return self.weight_bytes + self.tokens * moved * self.value_bytes

    @property
    def backward_traffic(self) -> int:
        """The same for the gradient of the input: M N values are read, M K written."""
        moved = self.out_features + 2 * self.in_features
        return self.weight_bytes + self.tokens * moved * self.value_bytes

    @property
    def flops(self) -> int:
        """Multiplications and additions, 2 M N K."""
        return 2 * self.tokens * self.out_features * self.in_features


@dataclass(frozen=True)
class Limit:
    """The two times that no program on this machine can beat.

    Attributes:
        memory: seconds to move the bytes.
        compute: seconds to do the arithmetic.
    """

    memory: float
    compute: float

    @property
    def seconds(self) -> float:
        """The longer of the two."""
        return max(self.memory, self.compute)

    @property
    def bound(self) -> str:
        """Which of the two it is."""
        return "memory" if self.memory >= self.compute else "compute"


def limit_of(traffic: float, flops: float, bandwidth: float, peak: float) -> Limit:
    """The limit of a job, from bytes a second and operations a second of all its threads."""
    return Limit(traffic / bandwidth, flops / peak)


@dataclass(frozen=True)
class Stream:
    """One trip over a matrix: bytes read and written for each element, in how many passes.

    Attributes:
        read: bytes read for an element in one pass.
        write: bytes written for an element.
        passes: how often the source comes from memory.
    """

    read: float
    write: float
    passes: int = 1

    def traffic(self, elements: int, write_allocate: bool) -> float:
        """Bytes that move; a store through the caches fetches its line first."""
        stored = self.write * (2 if write_allocate else 1)
        return elements * (self.read * self.passes + stored)


def stream_limit(passes: int, read_seconds: float, mixed_seconds: float) -> float:
    """Seconds for a trip of several passes: all but the last only read the source."""
    return (passes - 1) * read_seconds + mixed_seconds


def cache_level(size: int, threads: int, caches: dict[str, int]) -> str:
    """The level that holds a buffer cut among threads: a thread's share in L2, or all in L3."""
    if size <= threads * caches.get("L2", 0):
        return "L2"
    return "L3" if size <= caches.get("L3", 0) else "DRAM"
