"""Checkpoints in rough hands: odd tensors, odd names, odd places; what a user would expect."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from checkpoint_models import files_of, float_folder, peak_of_streaming
from safetensors.torch import load_file, save_file
from torch import nn

from quantization import load_quantized, quantize_checkpoint
from quantization.checkpoint import streaming
from quantization.checkpoint.float_source import open_source
from quantization.json_files import CheckpointError, parse_json

# ---- sources ---------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["w4g32a", "w8", "nf4+dq", "kmeans2", "ternary", "mxfp4"])
def test_layers_without_rows_or_columns_are_streamed(recipe: str, tmp_path: Path) -> None:
    save_file(
        {"a.weight": torch.empty(0, 8), "b.weight": torch.empty(8, 0), "c": torch.empty(0)},
        tmp_path / "float.safetensors",
    )
    quantize_checkpoint(tmp_path / "float.safetensors", tmp_path / "new", recipe)
    model = nn.ModuleDict({"a": nn.Linear(8, 0, bias=False), "b": nn.Linear(0, 8, bias=False)})
    model.register_parameter("c", nn.Parameter(torch.empty(0)))
    assert tuple(load_quantized(tmp_path / "new", model)["b"].weight.shape) == (8, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_tensors_that_stay_in_float_do_not_pile_up(tmp_path: Path) -> None:
    tensors = {f"l{i}.weight": torch.randn(2500, 2500) for i in range(16)}  # 400 MB in 25 MB each
    save_file(tensors, tmp_path / "float.safetensors")
    recipe, small = {"l0": "w4", "*": None}, float_folder(tmp_path / "small")
    grown = peak_of_streaming(tmp_path / "float.safetensors", tmp_path / "new", small, recipe)
    assert grown <= 225e6
    made = load_file(tmp_path / "new/model.safetensors")
    assert torch.equal(made["l9.weight"], tensors["l9.weight"])


def test_planning_takes_time_in_proportion_to_the_tensors(tmp_path: Path, monkeypatch) -> None:
    """Sets are built once, not once a key: told by the calls, not by the clock."""
    tensors = {f"a{i}.weight": torch.zeros(1, 1) for i in range(50)}
    save_file(tensors, tmp_path / "float.safetensors")
    built = []
    monkeypatch.setattr(
        "quantization.checkpoint.float_source.set",
        lambda *values: built.append(1) or set(*values),
        raising=False,
    )
    assert open_source(tmp_path / "float.safetensors", "w4").dropped == ()
    assert len(built) < 10


def test_json_of_endless_numbers_is_a_named_error() -> None:
    with pytest.raises(CheckpointError, match=r"a\.json is not JSON: Exceeds the limit"):
        parse_json(b'{"a": %s}' % (b"1" * 5000), "a.json")


# ---- places ----------------------------------------------------------------------------------


def test_a_destination_that_holds_the_source_is_refused(tmp_path: Path) -> None:
    source = float_folder(tmp_path / "models/float")
    before = files_of(source)
    for given, place in [
        (source, tmp_path / "models"),
        (source, source),
        (source / "model.safetensors", source),
    ]:
        with pytest.raises(FileExistsError, match=r"holds the source|is the source"):
            quantize_checkpoint(given, place, "w4", overwrite=True)
    cache = tmp_path / "cache"  # a folder of links, as model hubs keep them
    cache.mkdir()
    (cache / "model.safetensors").symlink_to(source / "model.safetensors")
    with pytest.raises(FileExistsError, match="holds the source"):
        quantize_checkpoint(cache, source, "w4", overwrite=True)
    assert files_of(source) == before
    quantize_checkpoint(source, source / "quantized", "w4")
    assert files_of(source / "quantized").keys() == {"model.safetensors", "quantization.json"}


KILLED_AFTER_EXCHANGE = """
import os, sys
import quantization.files as files
from quantization import quantize_checkpoint
exchange = files._exchange
files._exchange = lambda a, b: (exchange(a, b), os._exit(9))
quantize_checkpoint(sys.argv[1], sys.argv[2], "w4", overwrite=True)
"""


def test_nothing_of_a_replaced_folder_comes_back_after_a_kill(tmp_path: Path) -> None:
    source, place = float_folder(tmp_path / "float"), tmp_path / "new"
    (place / "inner").mkdir(parents=True)
    (place / "old.json").write_text("{}")
    (place / "inner/old.json").write_text("{}")
    command = [sys.executable, "-c", KILLED_AFTER_EXCHANGE, str(source), str(place)]
    assert subprocess.run(command, check=False).returncode == 9
    quantize_checkpoint(source, place, "w4", overwrite=True)
    assert sorted(path.name for path in place.iterdir()) == [
        "model.safetensors",
        "quantization.json",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float", "new"]


def test_a_source_that_changes_meanwhile_is_not_trusted(tmp_path: Path) -> None:
    source = float_folder(tmp_path / "float")

    def touch(done: int, total: int) -> None:
        (source / "model.safetensors").touch()

    with pytest.raises(CheckpointError, match="was changed while it was read"):
        quantize_checkpoint(source, tmp_path / "new", "w4", progress=touch)
    assert not (tmp_path / "new").exists()


def test_a_run_that_finished_nothing_blocks_no_other(tmp_path: Path) -> None:
    save_file({"a.weight": torch.full((8, 8), torch.nan)}, tmp_path / "float.safetensors")
    source = tmp_path / "float.safetensors"
    with pytest.raises(ValueError, match=r"a\.weight"):
        quantize_checkpoint(source, tmp_path / "new", "w4")
    quantize_checkpoint(source, tmp_path / "new", "w8", nonfinite="mark")
    assert {path.name for path in tmp_path.iterdir()} == {"float.safetensors", "new"}


def _die(*arguments: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_told_of(tmp_path: Path, monkeypatch) -> None:
    source = float_folder(tmp_path / "float")
    monkeypatch.setattr(streaming, "_work", _die)
    with pytest.raises(RuntimeError, match="a worker died"):
        quantize_checkpoint(source, tmp_path / "new", "w4", workers=2)
    monkeypatch.undo()
    quantize_checkpoint(source, tmp_path / "new", "w4", workers=2)
    assert {path.name for path in tmp_path.iterdir()} == {"float", "new"}
