"""Checkpoints in rough hands: odd sources, odd places, and processes that die."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file
from torch import nn

from quantization import load_quantized, quantize_checkpoint, quantize_model, save_quantized
from quantization.checkpoint import streaming
from quantization.checkpoint.disk.files import new_folder
from quantization.checkpoint.disk.json_files import CheckpointError, parse_json
from quantization.checkpoint.format import sealed
from quantization.checkpoint.source.float_source import open_source
from tests.checkpoint_models import files_of, float_folder, peak_of_streaming
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

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
        "quantization.checkpoint.source.float_source.set",
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
import quantization.checkpoint.disk.files as files
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


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("required_features",), 7, "required_features that are no list of names"),
        (("required_features",), [[]], "required_features that are no list of names"),
        (("layers", "", "padding_idx"), 20, "'padding_idx': 20}, and 20 rows"),
        (("layers", "", "padding_idx"), -21, "'padding_idx': -21}, and 20 rows"),
    ],
)
def test_a_document_that_lies(path: tuple, value: object, message: str, tmp_path: Path) -> None:
    report = quantize_model(nn.Embedding(20, 32), {nn.Embedding: "w4"})
    save_quantized(report.model, tmp_path / "saved")
    file = tmp_path / "saved/quantization.json"
    document = inner = json.loads(file.read_text())
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file.write_text(json.dumps(sealed(document)))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_quantized(tmp_path / "saved", nn.Embedding(20, 32))


WORKERS = """
import os, sys, time
from quantization import quantize_checkpoint
from quantization.checkpoint import streaming
def work(*arguments):
    with open(sys.argv[1] + f"/{os.getpid()}", "w"):
        time.sleep(600)
if __name__ == "__main__":
    streaming._work = work
    quantize_checkpoint(sys.argv[2], sys.argv[3], "w4", workers=2, max_shard_bytes=9000)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kills")
def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    """They would write on into the files of the next run, and hold their memory for ever."""
    source = float_folder(tmp_path / "float")
    (tmp_path / "pids").mkdir()
    (tmp_path / "script.py").write_text(WORKERS)
    arguments = [tmp_path / "script.py", tmp_path / "pids", source, tmp_path / "new"]
    root = str(Path(streaming.__file__).parents[2])
    run = subprocess.Popen(
        [sys.executable, *map(str, arguments)], env={**os.environ, "PYTHONPATH": root}
    )

    def workers() -> list[int]:
        return [int(path.name) for path in (tmp_path / "pids").iterdir()]

    assert eventually(lambda: len(workers()) == 2)
    run.kill()
    run.wait()
    assert eventually(lambda: not any(is_alive(pid) for pid in workers()))


def eventually(test: Callable[[], bool], seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not test() and time.monotonic() < end:
        time.sleep(0.05)
    return test()


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    if stat.parent.parent.is_dir():  # a zombie waits for whoever took it over
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_source_that_is_quantized_already_is_refused(tmp_path: Path) -> None:
    source = float_folder(tmp_path / "float")
    plain = {"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}
    (source / "config.json").write_text(json.dumps(plain))
    with pytest.raises(CheckpointError, match="is quantized already"):
        quantize_checkpoint(source, tmp_path / "new", "w4")


def test_a_float_model_that_was_saved_is_a_source(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=16)
    save_quantized(transformers.GPT2LMHeadModel(config), tmp_path / "float")
    report = quantize_checkpoint(tmp_path / "float", tmp_path / "new", "w4")
    assert len(report.replaced) == 4
    with pytest.raises(CheckpointError, match="is quantized already"):
        quantize_checkpoint(tmp_path / "new", tmp_path / "newer", "w4")


def test_a_folder_that_comes_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="not empty"), new_folder(tmp_path / "a"):
        (tmp_path / "a").mkdir()
        (tmp_path / "a/mine").write_text("mine")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "mine"]
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with pytest.raises(FileExistsError, match="is a link"):
        save_quantized(nn.Linear(2, 2), tmp_path / "link", overwrite=True)


@pytest.mark.parametrize("place", [".", "..", "inner/..", ""])
def test_the_current_directory_is_no_destination(place: str, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "here/inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="is or holds the current directory"):
            save_quantized(nn.Linear(2, 2), place, overwrite=overwrite)
    assert [path.name for path in tmp_path.rglob("*")] == ["here", "inner"]


def test_where_names_cannot_be_exchanged_a_folder_is_replaced_in_two_steps(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("quantization.checkpoint.disk.files._exchange", lambda a, b: False)
    rename, fails_at = Path.rename, [0]

    def failing(self: Path, target: Path) -> Path:
        fails_at[0] -= 1
        if fails_at[0] == 0:
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/mine").write_text("mine")
    for step in (1, 2):
        fails_at[0] = step
        with pytest.raises(OSError, match="no"):
            save_quantized(nn.Linear(2, 2), tmp_path / "a", overwrite=True)
        assert [path.name for path in tmp_path.rglob("*")] == ["a", "mine"]
    save_quantized(nn.Linear(2, 2), tmp_path / "a", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert files_of(tmp_path / "a").keys() == {"model.safetensors", "quantization.json"}


def test_workers_are_told_of_a_recipe_that_cannot_be_sent(tmp_path: Path) -> None:
    source = float_folder(tmp_path / "float")
    with pytest.raises(ValueError, match="use workers=1"):
        quantize_checkpoint(source, tmp_path / "new", {lambda *site: True: "w4"}, workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["float"]
