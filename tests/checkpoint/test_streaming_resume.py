"""Streaming is resumed after any death, to the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file

from quantization import (
    quantize_checkpoint,
)
from quantization.checkpoint import CheckpointError, streaming
from quantization.checkpoint.streaming import partial_folder
from tests.checkpoint.streaming_calls import RULES
from tests.checkpoint_models import files_of, float_folder
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

# ---- resuming --------------------------------------------------------------------------------


class Stopped(Exception):
    pass


def stop_after(count: int):
    calls = []

    def progress(done: int, total: int) -> None:
        calls.append(done)
        assert 0 < done <= total
        if len(calls) == count:
            raise Stopped

    return progress


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, monkeypatch) -> None:
    source = float_folder(tmp_path / "float")
    options = {"max_shard_bytes": 12_000}
    quantize_checkpoint(source, tmp_path / "calm", RULES, **options)
    with pytest.raises(Stopped):
        quantize_checkpoint(source, tmp_path / "new", RULES, progress=stop_after(8), **options)
    assert not (tmp_path / "new").exists()
    finished = sorted(
        path.name for path in (partial_folder(tmp_path / "new") / "files").glob("*.safetensors")
    )
    assert 1 <= len(finished) < len(list((tmp_path / "calm").glob("*.safetensors")))
    written = []
    write = streaming._write
    monkeypatch.setattr(streaming, "_write", lambda *a: (written.append(a[2].name), write(*a)))
    quantize_checkpoint(source, tmp_path / "new", RULES, **options)
    assert not set(written) & set(finished)
    assert files_of(tmp_path / "new") == files_of(tmp_path / "calm")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calm", "float", "new"]


def stopped(tmp_path: Path) -> Path:
    source = float_folder(tmp_path / "float")
    with pytest.raises(Stopped):
        quantize_checkpoint(
            source, tmp_path / "new", "w4", progress=stop_after(6), max_shard_bytes=9000
        )
    return source


def test_a_finished_file_that_was_damaged_is_written_anew(tmp_path: Path) -> None:
    source = stopped(tmp_path)
    first = min((partial_folder(tmp_path / "new") / "files").glob("*.safetensors"))
    raw = bytearray(first.read_bytes())
    raw[-1] ^= 255
    first.write_bytes(raw)
    quantize_checkpoint(source, tmp_path / "new", "w4", max_shard_bytes=9000)
    quantize_checkpoint(source, tmp_path / "calm", "w4", max_shard_bytes=9000)
    assert files_of(tmp_path / "new") == files_of(tmp_path / "calm")


def test_an_unfinished_run_of_another_kind_is_refused(tmp_path: Path) -> None:
    source = stopped(tmp_path)
    with pytest.raises(CheckpointError, match="another recipe, or of another source"):
        quantize_checkpoint(source, tmp_path / "new", "w8", max_shard_bytes=9000)
    tensors = load_file(source / "model.safetensors")
    save_file(tensors, source / "model.safetensors")
    os.utime(source / "model.safetensors", ns=(1, 1))
    with pytest.raises(CheckpointError, match="a source that has changed"):
        quantize_checkpoint(source, tmp_path / "new", "w4", max_shard_bytes=9000)
    quantize_checkpoint(source, tmp_path / "new", "w8", restart=True)
    quantize_checkpoint(source, tmp_path / "calm", "w8")
    assert files_of(tmp_path / "new") == files_of(tmp_path / "calm")


def test_a_folder_that_is_none_of_ours_is_not_taken_up(tmp_path: Path) -> None:
    source = float_folder(tmp_path / "float")
    partial = partial_folder(tmp_path / "new")
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"trust me")
    with pytest.raises(CheckpointError, match="is no unfinished run"):
        quantize_checkpoint(source, tmp_path / "new", "w4")


def test_two_runs_at_once_do_not_mix(tmp_path: Path) -> None:
    source = float_folder(tmp_path / "float")

    def again(done: int, total: int) -> None:
        with pytest.raises(CheckpointError, match="another process writes"):
            quantize_checkpoint(source, tmp_path / "new", "w4")

    quantize_checkpoint(source, tmp_path / "new", "w4", progress=again)


@pytest.mark.parametrize("nth", [1, 3, 9])
def test_a_full_disk_removes_what_was_written(nth: int, tmp_path: Path, monkeypatch) -> None:
    source = float_folder(tmp_path / "float")
    before = files_of(source)
    write, calls = streaming.write_shard.__globals__["TensorWriter"].write, []

    def fail(self, key, tensor):
        calls.append(key)
        if len(calls) == nth:
            raise OSError(28, "No space left on device")
        write(self, key, tensor)

    monkeypatch.setattr("quantization.checkpoint.writing.TensorWriter.write", fail)
    with pytest.raises(OSError, match="No space left"):
        quantize_checkpoint(source, tmp_path / "new", "w4", max_shard_bytes=9000)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["float"]
    assert files_of(source) == before


KILLER = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from pathlib import Path
from quantization import quantize_checkpoint
source, place, times = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
rules, options = {"re:embed": "w8", "up_proj": "nf4", "*": "w4g32a"}, {"max_shard_bytes": 60_000}
def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
quantize_checkpoint(source, place / "calm", rules, **options)
start = time.perf_counter()
quantize_checkpoint(source, place / "calm", rules, overwrite=True, **options)
took, calm = time.perf_counter() - start, files(place / "calm")
random.seed(7)
tried = killed = equal = resumed = 0
while killed < times:
    target, tried = place / f"new{tried}", tried + 1
    child = os.fork()
    if child == 0:
        quantize_checkpoint(source, target, rules, **options)
        os._exit(0)
    time.sleep(random.uniform(0, took))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        continue  # it was through already
    killed += 1
    resumed += (place / f".{target.name}.partial").exists()
    child = os.fork()
    if child == 0:
        quantize_checkpoint(source, target, rules, overwrite=True, **options)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    equal += files(target) == calm
    left = {path.name for path in place.iterdir()} - {"calm", *(f"new{j}" for j in range(tried))}
    assert not left, left
print(killed, resumed, equal)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")
@pytest.mark.parametrize("times", [4, pytest.param(16, marks=pytest.mark.deep)])
def test_killed_at_random_moments_it_resumes_to_the_same_bytes(
    times: int, tmp_path: Path, record_property
) -> None:
    times = int(os.environ.get("QUANTIZATION_KILLS", times))  # 50 take a minute
    source = float_folder(tmp_path / "float", shards=2, size=192, layers=12)
    (tmp_path / "place").mkdir()
    run = subprocess.run(
        [sys.executable, "-c", KILLER, str(source), str(tmp_path / "place"), str(times)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    killed, resumed, equal = map(int, run.stdout.split())
    record_property("killed", f"killed {killed}, unfinished {resumed}, equal {equal}")
    assert killed == equal == times
    assert resumed >= killed // 3, "many left something to go on with"
