"""Files: opening a quantized checkpoint, and quantizing a float one tensor by tensor.

Opening is timed in a fresh process, with the memory that becomes resident. Quantizing is held
against a plain copy of the same bytes (read the source, write and sync as many bytes as the result
has) and against libraries that do it whole.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.harness import Candidate, Pace, Timing, take_turns
from benchmarks.peers import quiet
from benchmarks.records import Row, add_ratios
from benchmarks.session import Session, threads_of_torch
from benchmarks.tables import print_cells
from quantization import PackedLinearLayer, load_quantized, quantize_checkpoint, save_quantized

COPY = "plain copy"
SCHEMES = ("w8", "w4g128", "w4g64a", "nf4")
_BLOCK = 1 << 24
_ROUNDS = 3


def run_files(session: Session) -> None:
    """Measure the section."""
    size = session.settings.files_mb * 10**6
    side = 4096 if size >= 10**8 else 128
    with session.progress("files", 2), tempfile.TemporaryDirectory() as place:
        rows = _load(Path(place), size, side)
        session.results.rows += rows
        print_cells(session.say, rows)
        session.advance("load")
        with threads_of_torch(max(session.settings.threads)), quiet():
            rows = _quantize(Path(place), size, side, max(session.settings.threads))
        session.results.rows += rows
        print_cells(session.say, rows)
        session.advance("quantize")


# ---- opening ---------------------------------------------------------------------------------


def _load(place: Path, size: int, side: int) -> list[Row]:
    layers = max(1, size // (side * side))
    model = nn.Sequential(
        *(PackedLinearLayer(side, side, False, "w8", device="meta") for _ in range(layers))
    ).to_empty(device="cpu")
    for layer in model:
        layer.packed_weights.fill_(1)
        layer.scales.fill_(1.0)
    save_quantized(model, place / "packed")
    nbytes = sum(layer.nbytes for layer in model)
    del model
    file = place / "packed" / "model.safetensors"
    case = {"way": "open", "bytes": nbytes}
    ours = partial(_open_ours, place / "packed", layers, side)
    rows = []
    for name, kind, job in (
        ("safetensors load_file", "expression", partial(_open_all, file)),
        ("ours load_quantized", "ours", partial(ours, pages="file")),
        ("ours, verify=True", "ours", partial(ours, pages="file", verify=True)),
        ("ours, and a first token", "ours", partial(ours, pages="file", token=True)),
        (
            "ours, pages=memory, and a first token",
            "ours",
            partial(ours, pages="memory", token=True),
        ),
    ):
        found = [_in_fresh_process(job) for _ in range(_ROUNDS)]
        row = Row("files", case, name, kind, Timing([seconds for seconds, _ in found]))
        row.values["resident_mb"] = max(grown for _, grown in found) / 1e6
        rows.append(row)
    add_ratios(rows, "safetensors load_file")
    shutil.rmtree(place / "packed")
    return rows


def _in_fresh_process(job: Callable[[], tuple[float, int]]) -> tuple[float, int]:
    with Pool(1, context=get_context("spawn")) as pool:
        return pool.apply(job)


def _measured(call: Callable[[], Any]) -> tuple[float, int]:
    """Seconds, and bytes that became resident."""
    import time

    before, start = _resident(), time.perf_counter()
    held = call()
    seconds = time.perf_counter() - start
    grown = _resident() - before
    del held
    return seconds, grown


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _open_ours(
    folder: Path, layers: int, side: int, pages: str, verify: bool = False, token: bool = False
) -> tuple[float, int]:
    """By files that are mapped or by memory of the process's own; up to the first token or not."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(layers)))
    x = torch.zeros(1, side)

    def call() -> object:
        loaded = load_quantized(folder, model, pages=pages, verify=verify)
        return (loaded(x), loaded) if token else loaded

    with torch.inference_mode():
        return _measured(call)


def _open_all(file: Path) -> tuple[float, int]:
    return _measured(lambda: load_file(file))


# ---- quantizing ------------------------------------------------------------------------------


def _quantize(place: Path, size: int, side: int, threads: int) -> list[Row]:
    count = max(1, size // (2 * side * side))
    source, target = place / "float", place / "new"
    source.mkdir()
    tensors = {f"layers.{i}.weight": torch.randn(side, side).bfloat16() for i in range(count)}
    save_file(tensors, source / "model.safetensors")
    read = sum(tensor.nbytes for tensor in tensors.values())
    del tensors
    jobs: dict[str, tuple[str, Callable[[], object]]] = {}
    written: dict[str, int] = {}
    for scheme in SCHEMES:
        jobs[f"ours {scheme}"] = ("ours", partial(_ours, source, target, scheme))
        jobs[f"ours {scheme}"][1]()
        written[scheme] = sum(path.stat().st_size for path in target.glob("*.safetensors"))
        jobs[f"{COPY}, {scheme}"] = ("limit", partial(_copy, source, target, written[scheme]))
    for name, quantize in (("torchao int8", _torchao_int8), ("torchao int4", _torchao_int4)):
        jobs[f"{name} + save"] = ("peer", partial(_whole, source, target, side, count, quantize))
    candidates = [Candidate(name, kind, job) for name, (kind, job) in jobs.items()]
    results = take_turns(candidates, Pace(rounds=_ROUNDS, seconds=120, sample=0.0, slow=0.0))
    case = {"way": "quantize", "bytes": read, "dtype": "bfloat16", "threads": threads}
    rows = [Row.of("files", case, c.name, c.kind, results[c.name]) for c in candidates]
    _add_fractions(rows, read, written)
    add_ratios(rows, "torchao int8 + save")
    shutil.rmtree(source)
    return rows


def _add_fractions(rows: list[Row], read: int, written: dict[str, int]) -> None:
    times = {row.candidate: row.median for row in rows}
    for row in rows:
        scheme = row.candidate.rsplit(" ", 1)[1]
        if scheme in written and row.timing:
            row.values["gbytes"] = (read + written[scheme]) / row.median / 1e9
            if row.kind == "ours":
                row.values["fraction"] = times[f"{COPY}, {scheme}"] / row.median


def _ours(source: Path, target: Path, scheme: str) -> None:
    quantize_checkpoint(source, target, scheme, overwrite=True)


def _copy(source: Path, target: Path, written: int) -> None:
    """Read the source block by block, and write a share of each."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    file = source / "model.safetensors"
    share = written / file.stat().st_size
    buffer = bytearray(_BLOCK)
    with (
        file.open("rb", buffering=0) as reader,
        (target / "copy").open("wb", buffering=0) as writer,
    ):
        while count := reader.readinto(buffer):
            writer.write(memoryview(buffer)[: int(count * share)])
        os.fsync(writer.fileno())


def _whole(
    source: Path, target: Path, side: int, count: int, quantize: Callable[[nn.Module], None]
) -> None:
    """Load, quantize and save as the other library has it."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    with torch.device("meta"):
        layers = nn.ModuleList(nn.Linear(side, side, bias=False) for _ in range(count))
        model = nn.ModuleDict({"layers": layers})
    model.load_state_dict(load_file(source / "model.safetensors"), assign=True)
    quantize(model)
    with (target / "model.pt").open("wb") as file:
        torch.save(model.state_dict(), file)
        os.fsync(file.fileno())


def _torchao_int8(model: nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())


def _torchao_int4(model: nn.Module) -> None:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    quantize_(model, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(128)))
