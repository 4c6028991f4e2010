"""``quantization explain`` and ``compare``: what they print, as JSON too, and how they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import save_file
from torch import nn

from quantization import explain, quantize_model, save_quantized
from quantization.cli import main
from tests import tiny_models
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

Captured = pytest.CaptureFixture[str]


def test_explain_prints_what_the_function_does(tmp_path: Path, capsys: Captured) -> None:
    model = nn.Sequential(nn.Linear(20, 8), nn.Linear(8, 4))
    save_file(model.state_dict(), tmp_path / "float.safetensors")
    weight = model[0].weight.detach().clone()
    quantize_model(model, {"0": "w3g8a", "1": "w8a16"})
    folder = str(tmp_path / "folder")
    save_quantized(model, folder)
    given = ["--reference", str(tmp_path / "float.safetensors")]
    assert main(["explain", folder, "0", "3", "9", *given]) == 0
    assert capsys.readouterr().out == f"{explain(model[0], 3, 9, reference=weight)}\n"
    assert main(["explain", folder, "1", "--byte", "9", "--buffer", "scales", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["held"][0]["rows"] == [2] and told["held"][0]["what"] == "scale"
    assert main(["explain", folder, "0", "3", "9", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["code"] == int(model[0].codes[3, 9])
    for wrong, words in (
        (["0", "8", "0"], "row is 8; the weight has 0..7"),
        (["0", "8"], "say which weight"),
        (["2", "0", "0"], "no layer '2'; there are 0, 1"),
        (["0", "--byte", "999"], "offset is 999"),
        (["0", "1", "--byte", "9"], "--byte stands for itself"),
    ):
        assert main(["explain", folder, *wrong]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and words in error


def test_compare_finds_the_damage(tmp_path: Path, capsys: Captured) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model: Any = tiny_models.random_model("llama", num_hidden_layers=2)
    model.save_pretrained(tmp_path / "float")
    quantize_model(model, {"model.layers.1.mlp.up_proj": "w1a", "*": "w8g32"}, exclude="lm_head")
    save_quantized(model, tmp_path / "small")
    call = ["compare", str(tmp_path / "small"), str(tmp_path / "float"), "--tokens", "2x16"]
    assert main([*call, "--json", "--keep", "1e-5", "--sort", "own_sqnr"]) == 0
    told = json.loads(capsys.readouterr().out)
    worst = min(told["layers"], key=lambda row: row["own_sqnr"])
    assert worst["name"] == "model.layers.1.mlp.up_proj" == told["keep"][0]
    assert told["divergence"]["kl"] > 1e-5 >= told["kept_divergence"]["kl"]
