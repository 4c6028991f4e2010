"""Quantize a checkpoint file by file, without ever holding the model.

    quantize_checkpoint("float-model", "quantized-model", "w4g64a")

Tensors are read, packed and written one after the other; memory is that of the largest. What is
finished is kept beside the destination until all is, so a run that was killed goes on where it was;
the destination appears at the end, whole. Files are shared out over processes of this machine
(``workers``) or over those that ``torchrun`` started, on any machines that see the same folders.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from quantization.checkpoint.disk.files import free_place, put_in_place, sync
from quantization.checkpoint.disk.json_files import CheckpointError, read_json
from quantization.checkpoint.disk.safetensors_files import TensorFile
from quantization.checkpoint.format import VERSION, FileRecord
from quantization.checkpoint.reading import check_hashes, check_record
from quantization.checkpoint.source.float_source import FloatSource, open_source
from quantization.checkpoint.unfinished import FILES, keep_only, partial_folder, unfinished
from quantization.checkpoint.writing import MAX_SHARD_BYTES, Shard, finish, plan_shards, write_shard
from quantization.methods.registry import method_name
from quantization.methods.statistics import Statistics
from quantization.models.recipe import Recipe
from quantization.ops.dtypes import index_of
from quantization.swap.patterns import Pattern
from quantization.swap.report import ReplacementReport

__all__ = ["partial_folder", "quantize_checkpoint"]

#: Hears the bytes of the destination that were written, and of how many.
Progress = Callable[[int, int], None]


def quantize_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    recipe: Recipe,
    *,
    exclude: Pattern | Iterable[Pattern] = (),
    model: nn.Module | None = None,
    nonfinite: str = "raise",
    unfuse_experts: bool = False,
    statistics: Mapping[str, Statistics] | None = None,
    overwrite: bool = False,
    restart: bool = False,
    workers: int = 1,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> ReplacementReport:
    """Quantize safetensors files of any size into a folder for :func:`load_quantized`.

    The result is what :func:`quantization.quantize_model` and :func:`save_quantized` would give,
    bit for bit. Peak memory is that of the largest tensor and some blocks; a scheme with one scale
    or codebook for a whole matrix, and a method other than ``rtn``, needs that matrix in float32
    besides.

    A run that was killed leaves its finished files in ``.<destination>.partial``. The same call
    checks their hashes and goes on; a call with another recipe or a changed source is refused.

    Args:
        source: a folder with safetensors files, single or sharded, or one file. A ``config.json``
            of transformers tells the class of the model, whose tensors are made of those of the
            files as transformers makes them (5.22 or later); without one (a folder of diffusers,
            say), layers are told by names and shapes. It is only read. What is not weights comes
            along, sub-folders too, as
            :func:`quantization.checkpoint.source.companions.inner_files` says; a warning names the
            rest.
        destination: the folder to write; made with its parents.
        recipe: as for :func:`quantization.quantize_model`.
        exclude: as for :func:`quantization.quantize_model`.
        model: a model of the source's keys, on meta, in place of the class that is looked up; it is
            changed.
        nonfinite: as for :func:`quantization.quantize_model`.
        unfuse_experts: give each expert of fused ones linear layers, as
            :func:`quantization.unfuse_experts` does; one expert is read at a time.
        statistics: as for :func:`quantization.quantize_model`, of the float model's layers; those
            of :func:`quantization.load_statistics` are read layer by layer.
        overwrite: replace a destination that is there, once the new one is complete.
        restart: throw away what an earlier run finished.
        workers: processes of this machine, which share torch's threads. With ``torchrun``: 1.
        max_shard_bytes: files are begun anew beyond so many bytes; more files spread better.
        progress: called after every tensor with the bytes that are written and those in all.

    Returns:
        A report of every layer; its model has shapes only.

    Raises:
        FileExistsError: if the destination is there, or is or holds the source.
        FileNotFoundError, CheckpointError: if the source is incomplete or broken.
        CheckpointError: if an unfinished run of another kind, or one that still runs, is there; or
            if the source changes meanwhile.
        RuntimeError: if a worker dies.
        OSError: if the disk fills; the destination does not appear, and the source is untouched.
        TypeError, ValueError: as :func:`quantization.quantize_model`, before anything is written.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as place:
        ...     save_file({"a.weight": torch.randn(64, 64)}, f"{place}/float.safetensors")
        ...     source = f"{place}/float.safetensors"
        ...     report = quantize_checkpoint(source, f"{place}/small", "w4g32")
        ...     sorted(os.listdir(f"{place}/small")), report["a"].bytes_after
        (['model.safetensors', 'quantization.json'], 2560)
    """
    source, destination = Path(source), Path(destination)
    _refuse_source(destination, source)
    free_place(destination, overwrite=overwrite)
    if index_of(workers, "workers") < 1:
        raise ValueError(f"workers is {workers}; it must be 1 or more")
    if workers > 1 and model is not None:
        raise ValueError("workers build the model themselves: give no model, or workers=1")
    options = {"exclude": exclude, "nonfinite": nonfinite, "unfuse_experts": unfuse_experts}
    options["statistics"] = statistics
    if workers > 1:
        _check_picklable(recipe, exclude, statistics)
    planned = _apart(open_source(source, recipe, model=model, **options), destination)
    _refuse_source(destination, *(file.path for file in planned.files.files.values()))
    _warn_dropped(planned)
    _warn_left(planned)
    shards = plan_shards(planned.stored, max_shard_bytes)
    key = _fingerprint(planned, shards, nonfinite, statistics)
    with (
        _ranks(workers) as (rank, world),
        unfinished(destination, key, restart, is_first=rank == 0) as folder,
    ):
        _barrier(world)
        todo = shards[rank::world]
        if workers > 1:
            arguments = (source, folder, recipe, options, max_shard_bytes)
            _by_workers(arguments, todo, workers, progress)
        else:
            _by_one(folder, planned, todo, progress)
        _barrier(world)
        if rank == 0:
            records = {shard.name: _record(folder, shard) for shard in shards}
            if None in records.values():
                raise CheckpointError(f"{folder}: a process did not finish its files")
            if _fingerprint(planned, shards, nonfinite, statistics) != key:
                raise CheckpointError(f"{source} was changed while it was read")
            keep_only(folder / FILES, records)
            finish(folder / FILES, planned.stored, records)
            put_in_place(folder / FILES, destination)
        _barrier(world)
    return planned.report


def _refuse_source(destination: Path, *sources: Path) -> None:
    """Replacing a folder would remove a source that lies in it."""
    place = destination.resolve()
    for source in sources:
        if place in (source.resolve(), *source.resolve().parents):
            what = "is the source" if place == source.resolve() else f"holds the source {source}"
            raise FileExistsError(f"the destination {destination} {what}")


def _check_picklable(*values: Any) -> None:
    try:
        pickle.dumps(values)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(f"workers cannot be sent the recipe, so use workers=1: {error}") from None


def _warn_dropped(planned: FloatSource) -> None:
    if planned.dropped:
        some = ", ".join(planned.dropped[:5])
        warnings.warn(
            f"{len(planned.dropped)} tensors of the source are none of the model's and are left "
            f"out: {some}",
            stacklevel=3,
        )


def _warn_left(planned: FloatSource) -> None:
    if planned.left:
        warnings.warn(
            f"{len(planned.left)} files or folders in sub-folders of the source are left out, as "
            "models of their own or links to other places; copy what the model needs of them: "
            f"{', '.join(planned.left[:5])}",
            stacklevel=3,
        )


def _apart(planned: FloatSource, destination: Path) -> FloatSource:
    """Without the files of a destination that lies in the source."""
    place, root = destination.resolve(), planned.files.path.resolve()
    inner = {
        name: path
        for name, path in planned.stored.inner.items()
        if not (root / name).is_relative_to(place)
    }
    left = tuple(name for name in planned.left if not (root / name).is_relative_to(place))
    return replace(planned, stored=replace(planned.stored, inner=inner), left=left)


# ---- files, finished or not ------------------------------------------------------------------


def _by_one(
    folder: Path, planned: FloatSource, shards: list[Shard], progress: Progress | None
) -> None:
    meter = _Meter(shards, progress)
    for shard in shards:
        if _is_finished(folder, shard):
            meter.advance("", shard.nbytes)
        else:
            _write(folder, planned, shard, meter.advance)


def _by_workers(
    arguments: tuple[Any, ...],
    shards: list[Shard],
    workers: int,
    progress: Progress | None,
) -> None:
    """The files that are to be written, spread over processes as each comes free."""
    meter, folder = _Meter(shards, progress), arguments[1]
    todo = []
    for shard in shards:
        if _is_finished(folder, shard):
            meter.advance("", shard.nbytes)
        else:
            todo.append(shard)
    threads = max(1, torch.get_num_threads() // workers)
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin_worker)
    try:
        running = {pool.submit(_work, arguments, shard.name, threads): shard for shard in todo}
        for future in as_completed(running):
            future.result()
            meter.advance("", running[future].nbytes)
    except BrokenProcessPool:
        raise RuntimeError(
            "a worker died (killed, perhaps for want of memory); what is finished is kept, and the "
            "same call goes on"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    """Let a worker end with the process that started it: alone it would write on, unlocked."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(arguments: tuple[Any, ...], name: str, threads: int) -> None:
    """In a process of its own: plan anew, which reads headers only, and write one file."""
    source, folder, recipe, options, max_shard_bytes = arguments
    torch.set_num_threads(threads)
    planned = open_source(source, recipe, **options)
    shards = plan_shards(planned.stored, max_shard_bytes)
    _write(folder, planned, next(shard for shard in shards if shard.name == name))


def _write(
    folder: Path,
    planned: FloatSource,
    shard: Shard,
    advance: Callable[[str, int], None] = lambda name, nbytes: None,
) -> None:
    """A file, then its record: a file without a record is not finished."""
    _record_path(folder, shard).unlink(missing_ok=True)
    try:
        record = write_shard(folder / FILES / shard.name, planned.stored, shard, advance)
    except BaseException:
        (folder / FILES / shard.name).unlink(missing_ok=True)
        raise
    path = _record_path(folder, shard)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record.to_dict()))
    sync(temporary)
    temporary.replace(path)
    sync(folder)


def _is_finished(folder: Path, shard: Shard) -> bool:
    """Whether an earlier run wrote that file, every byte of it."""
    record, path = _record(folder, shard), folder / FILES / shard.name
    if record is None or not path.is_file():
        return False
    try:
        file = TensorFile(path)
        check_record(file, record)
        check_hashes(file, record)
    except CheckpointError:
        return False  # it is written anew
    return record.sha256.keys() == shard.forms.keys()


def _record(folder: Path, shard: Shard) -> FileRecord | None:
    path = _record_path(folder, shard)
    return FileRecord.from_dict(read_json(path), str(path)) if path.is_file() else None


def _record_path(folder: Path, shard: Shard) -> Path:
    return folder / f"{shard.name}.json"


class _Meter:
    def __init__(self, shards: list[Shard], progress: Progress | None) -> None:
        self._progress, self._done = progress, 0
        self._total = sum(shard.nbytes for shard in shards)

    def advance(self, name: str, nbytes: int) -> None:
        self._done += nbytes
        if self._progress is not None:
            self._progress(self._done, self._total)


def _fingerprint(
    planned: FloatSource,
    shards: list[Shard],
    nonfinite: str,
    statistics: Mapping[str, Statistics] | None,
) -> str:
    """What two runs have in common exactly if their files are the same."""
    layers = planned.stored.layers
    told = {
        "version": VERSION,
        "source": {
            name: [file.header.nbytes, file.header.sha256, file.path.stat().st_mtime_ns]
            for name, file in planned.files.files.items()
        },
        "layers": {name: [layer.kind, layer.scheme.to_dict()] for name, layer in layers.items()},
        "nonfinite": nonfinite,
        "methods": {c.name: method_name(c.method) for c in planned.report.replaced},
        "statistics": _digest_of(statistics),
        "shards": {shard.name: sorted(shard.forms) for shard in shards},
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _digest_of(statistics: Mapping[str, Statistics] | None) -> str:
    """What tells statistics from others: their moments."""
    total, known = hashlib.sha256(), statistics or {}
    for name in sorted(known):
        total.update(name.encode() + known[name].moments.numpy().tobytes())
    return total.hexdigest()


# ---- several machines ------------------------------------------------------------------------


@contextmanager
def _ranks(workers: int) -> Iterator[tuple[int, int]]:
    """(rank, processes) of torchrun, in a group of processes; (0, 1) without it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not dist.is_available():
        yield 0, 1
        return
    if workers > 1:
        raise ValueError("torchrun has started processes already: workers must be 1")
    is_ours = not dist.is_initialized()
    if is_ours:
        dist.init_process_group("gloo")
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        if is_ours:
            dist.destroy_process_group()


def _barrier(world: int) -> None:
    if world > 1:
        dist.barrier()
