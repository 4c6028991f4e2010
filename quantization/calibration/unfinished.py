"""What a calibration has done so far, kept beside its file until it is whole."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from quantization.calibration.files import load_statistics, save_statistics
from quantization.calibration.inputs import Made
from quantization.calibration.sums import InputSums, Sum
from quantization.checkpoint.disk.files import new_file
from quantization.checkpoint.disk.safetensors_files import TensorFile, TensorWriter
from quantization.methods.statistics import ModelStatistics, Statistics

__all__ = ["Unfinished", "joined"]

#: Seconds between two times that the sums are written; what a kill loses at most, and one batch.
EVERY = 30.0


class Unfinished:
    """The folder ``.<file>.partial``; without a file, nothing is kept.

    Args:
        file: where the statistics go at the end.
        work: says what is calibrated and how; only the same work is gone on with.

    Raises:
        FileExistsError: if the file, or what is left of an unfinished run, is of other work.
    """

    def __init__(self, file: str | os.PathLike[str] | None, work: str) -> None:
        self.file = None if file is None else Path(file)
        self.work = work
        self._written = time.monotonic()
        if self.file is None:
            return
        self.folder = self.file.parent / f".{self.file.name}.partial"
        if self.file.is_file() and TensorFile(self.file).header.metadata.get("work") != work:
            raise FileExistsError(
                f"{self.file} holds statistics of another model, or made in another way; delete "
                "it, or give another file"
            )
        key = self.folder / "work.txt"
        if key.is_file() and key.read_text() != work:
            raise FileExistsError(
                f"{self.folder} is left of the calibration of another model, or in another way; "
                "delete it, or give another file"
            )
        if not self.file.is_file() and not key.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            with new_file(key) as temporary:
                temporary.write_text(work)

    def finished(self) -> ModelStatistics | None:
        """The statistics, if an earlier run has come to its end."""
        if self.file is None or not self.file.is_file():
            return None
        shutil.rmtree(self.folder, ignore_errors=True)  # a kill may have come just before
        return load_statistics(self.file)

    def inputs(self, make: Callable[[], Made]) -> Made:
        """Inputs that an earlier run made up, else new ones."""
        if self.file is None:
            return make()
        path = self.folder / "inputs.safetensors"
        if not path.is_file():
            made = make()
            tensors = {"ids": ("int64", tuple(made.ids.shape))}
            with (
                new_file(path) as temporary,
                TensorWriter(temporary, tensors, {"source": made.source}) as writer,
            ):
                writer.write("ids", made.ids)
            return made
        kept = TensorFile(path)
        return Made(kept.to_read("ids").load(), kept.header.metadata["source"])

    def group(self, index: int) -> ModelStatistics | None:
        """The statistics of a group of layers that is done."""
        if self.file is None or not self._group(index).is_file():
            return None
        return load_statistics(self._group(index))

    def keep(self, index: int, known: ModelStatistics) -> ModelStatistics:
        """A group of layers is done; with a file, its statistics leave the memory."""
        if self.file is None:
            return known
        save_statistics(known, self._group(index))
        (self.folder / "sums.safetensors").unlink(missing_ok=True)
        return load_statistics(self._group(index))

    def _group(self, index: int) -> Path:
        return self.folder / f"group-{index}.safetensors"

    def snapshot(self, index: int, batches: int, digest: str, sums: InputSums) -> None:
        """Keep the sums over the first batches, where the last time was some while ago."""
        if self.file is None or time.monotonic() - self._written < EVERY:
            return
        tensors = {}
        for number, total in enumerate(sums.sums.values()):
            tensors[f"{number}.moments"] = total.moments
            if total.hessian is not None:
                tensors[f"{number}.hessian"] = total.hessian
        keys = [[key, total.count] for key, total in sums.sums.items()]
        state = {"group": index, "batches": batches, "digest": digest, "keys": keys}
        described = {key: ("float64", tuple(tensor.shape)) for key, tensor in tensors.items()}
        with (
            new_file(self.folder / "sums.safetensors", overwrite=True) as temporary,
            TensorWriter(temporary, described, {"state": json.dumps(state)}) as writer,
        ):
            for key, tensor in tensors.items():
                writer.write(key, tensor)
        self._written = time.monotonic()

    def restore(self, index: int, sums: InputSums) -> tuple[int, str]:
        """Take up sums that were kept: the number of batches in them, and the batches' digest."""
        path = None if self.file is None else self.folder / "sums.safetensors"
        if path is None or not path.is_file():
            return 0, ""
        kept = TensorFile(path)
        state = json.loads(kept.header.metadata["state"])
        if state["group"] != index:
            return 0, ""
        for number, (names, count) in enumerate(state["keys"]):
            key = f"{number}.hessian"
            hessian = kept.to_read(key).load() if key in kept.header.entries else None
            moments = kept.to_read(f"{number}.moments").load()
            sums.sums[tuple(names)] = Sum(moments, hessian, count)
        return state["batches"], state["digest"]

    def finish(self, whole: ModelStatistics) -> ModelStatistics:
        """All groups are done: they become the file, layer by layer."""
        if self.file is None:
            return whole
        save_statistics(whole, self.file, metadata={"work": self.work})
        shutil.rmtree(self.folder, ignore_errors=True)
        return load_statistics(self.file)


def joined(groups: list[ModelStatistics], first_of: dict[str, str], source: str) -> ModelStatistics:
    """Groups of layers as one, of which nothing is read that a file holds.

    Args:
        groups: each by the first names of its layers.
        first_of: first names by all names.
        source: of the inputs.
    """
    read: dict[str, Callable[[], Statistics]] = {}
    for known in groups:
        by_first = {first: partial(known.__getitem__, first) for first in known.shares.values()}
        read |= {name: by_first[first] for name, first in known.shares.items()}
    layers = {name: read[first] for name, first in first_of.items() if first in read}
    return ModelStatistics(
        layers, unseen=[name for name in first_of if name not in layers], source=source
    )
