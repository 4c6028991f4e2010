"""Checkpoints in rough hands: odd tensors, odd names, odd places; what a user would expect."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from checkpoint_models import float_folder, peak_of_streaming
from safetensors.torch import load_file, save_file
from torch import nn

from quantization import load_quantized, quantize_checkpoint
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
