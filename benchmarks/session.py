"""One run: what to measure, how long, and the context that every section works in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import quantization
from benchmarks import machine
from benchmarks.harness import Pace
from benchmarks.limits import Limits, LimitsError
from benchmarks.records import Results

Shape = tuple[int, int]  # out_features, in_features

SECTIONS = (
    "in_a_model", "linear", "packed", "backward", "quantize", "pack", "overhead", "files", "model",
    "packed_model",
)  # fmt: skip
WITHOUT_MODELS = tuple(name for name in SECTIONS if name not in ("model", "packed_model"))
SHAPES: tuple[Shape, ...] = ((14336, 4096), (4096, 4096), (4096, 11008), (768, 768), (1000, 999))
COLD_SHAPES: tuple[Shape, ...] = ((576, 576), (1536, 576), (4096, 4096))
COLD_WEIGHTS = 134_000_000  # those of a small language model
PACKED_SHAPES: tuple[Shape, ...] = ((28672, 4096), (4096, 4096))  # at 4 bits beyond L3, and in it
SETTLE = 0.003  # seconds in which the threads of another library go to sleep


@dataclass(frozen=True)
class Settings:
    """What a run measures.

    Attributes:
        sections: names out of `SECTIONS`.
        shapes: weights of the linear sections.
        tokens: rows of activations, of the forward sections.
        backward_tokens: the same for the gradient.
        dtypes: of activations, and of the sources that are quantized.
        threads: numbers of threads.
        isas: instruction sets that are forced, best first.
        matrix: the weight that is quantized and packed.
        widths: bits that are packed.
        reply: tokens that the language model generates; 0 leaves the model out.
        prompt: tokens of the prefill.
        rounds: at most so many samples.
        seconds: of a cell, all candidates together.
        longest: a call expected to take longer than so many seconds is not run.
        sample: seconds that a sample lasts at least.
        packed_shapes: weights of the section of packed weights.
        packed_tokens: rows of activations of that section.
        width_tokens: those of them that every width runs at, not the main schemes only.
        packed_reply: tokens that a packed model generates.
        judged: tokens of text that the perplexity of a packed model is taken over.
        model: that is packed, as the suite names it; None: the embedded one.
        files_mb: megabytes of the checkpoints that are opened and quantized.
        cold_shapes: of the layers that stand in a row, as in a model.
        cold_weights: of all layers of such a row; if as many as `COLD_WEIGHTS`, more where caches
            would hold them.
        against: a commit that is built beside, and timed in that section; empty: none.
        are_small: whether the shapes are too small for speeds to mean anything.
    """

    sections: tuple[str, ...]
    shapes: tuple[Shape, ...]
    tokens: tuple[int, ...]
    backward_tokens: tuple[int, ...]
    dtypes: tuple[str, ...]
    threads: tuple[int, ...]
    isas: tuple[str, ...]
    matrix: Shape
    widths: tuple[int, ...]
    reply: int
    prompt: int
    rounds: int
    seconds: float
    longest: float = 2.5
    sample: float = 1e-3
    packed_shapes: tuple[Shape, ...] = PACKED_SHAPES
    packed_tokens: tuple[int, ...] = (1, 4, 16, 128)
    width_tokens: tuple[int, ...] = (1,)
    packed_reply: int = 32
    judged: int = 4096
    model: str | None = "smollm2"
    files_mb: int = 1000
    cold_shapes: tuple[Shape, ...] = COLD_SHAPES
    cold_weights: int = COLD_WEIGHTS
    against: str = ""
    are_small: bool = False

    def pace(self, threads: int, share: float = 1.0) -> Pace:
        """How long a cell may take, given its number of threads."""
        settle = SETTLE if threads > 1 else 0.0
        return Pace(self.rounds, self.seconds * share, self.sample, settle=settle)


def fast_isas() -> tuple[str, ...]:
    """The instruction sets of this machine but the plain C one, which defines and is slow."""
    return tuple(name for name in quantization.isas() if name != "reference") or ("reference",)


def _common(threads: tuple[int, ...]) -> dict[str, Any]:
    return {"dtypes": ("float32", "bfloat16"), "threads": threads, "isas": fast_isas()}


def full(threads: tuple[int, ...]) -> Settings:
    """Every cell."""
    return Settings(
        SECTIONS, SHAPES, (1, 2, 4, 8, 16, 32, 96, 128, 512), (1, 16, 128),
        matrix=(8192, 4096), widths=tuple(range(1, 9)), reply=32, prompt=512,
        rounds=15, seconds=1.2, width_tokens=(1, 16, 128), **_common(threads),
    )  # fmt: skip


def quick(threads: tuple[int, ...]) -> Settings:
    """Every section but the models, in some minutes."""
    return Settings(
        WITHOUT_MODELS, SHAPES, (1, 4, 16, 128), (1, 128),
        matrix=(8192, 4096), widths=(1, 2, 4, 8), reply=0, prompt=0,
        rounds=7, seconds=0.7, longest=1.0, files_mb=200, **_common(threads),
    )  # fmt: skip


def smoke(threads: tuple[int, ...]) -> Settings:
    """All that needs no download, on small matrices, in seconds: that all of it still runs."""
    common = _common(threads[:1]) | {"isas": quantization.isas()}
    return Settings(
        (*WITHOUT_MODELS, "packed_model"), ((64, 96), (33, 65)), (1, 5), (3,),
        matrix=(64, 128), widths=(1, 3, 4, 8), reply=0, prompt=0,
        rounds=3, seconds=0.02, longest=0.5, sample=1e-4, are_small=True,
        packed_shapes=((64, 256), (33, 65)), packed_tokens=(1, 5), width_tokens=(1,),
        packed_reply=4, judged=200, model=None, files_mb=1,
        cold_shapes=((64, 96),), cold_weights=1, **common,
    )  # fmt: skip


class Session:
    """The settings, the limits, what was measured so far, and a voice."""

    def __init__(self, settings: Settings, command: str) -> None:
        self.settings = settings
        self.results = Results(machine.describe(), command)
        self.limits: Limits | None = None
        self._bar: Any = None
        try:
            self.limits = Limits(milliseconds=4 * settings.sample / 1e-3)
        except LimitsError as error:
            self.results.absent["limits"] = str(error)

    def say(self, text: str = "") -> None:
        """Print at once, above the progress bar if there is one."""
        if self._bar is not None:
            self._bar.clear()
        print(text, flush=True)

    @contextmanager
    def progress(self, section: str, cells: int) -> Iterator[Session]:
        """Show how many cells of a section are done, on stderr, where tqdm is installed."""
        self.say(f"\n== {section}: {cells} cells")
        try:
            from tqdm import tqdm
        except ImportError:
            yield self
            return
        self._bar = tqdm(total=cells, desc=section, leave=False, disable=None, mininterval=1)
        try:
            yield self
        finally:
            self._bar.close()
            self._bar = None

    def advance(self, what: str) -> None:
        """One cell is done."""
        if self._bar is not None:
            self._bar.set_postfix_str(what, refresh=False)
            self._bar.update()


@contextmanager
def threads_of_torch(threads: int) -> Iterator[None]:
    """Torch, and the kernels with it, on a number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def any_isa() -> Iterator[None]:
    """Whatever instruction set is forced inside, the earlier one comes back."""
    before = quantization.active_isa()
    try:
        yield
    finally:
        quantization.set_isa(before)


def shape_name(shape: Shape) -> str:
    """As tables write it."""
    return f"{shape[0]}x{shape[1]}"
