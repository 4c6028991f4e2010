"""`--method` and `--calibrate` of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import save_file

from quantization import calibrate, load_quantized, quantize_model, save_statistics
from quantization.cli import main
from tests import tiny_models
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


def test_a_method_and_a_file_of_statistics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
    known = calibrate(model, [torch.randn(200, 64)], statistics="hessian")
    save_statistics(known, tmp_path / "known.safetensors")
    save_file(model.state_dict(), tmp_path / "float.safetensors")
    source, small = str(tmp_path / "float.safetensors"), str(tmp_path / "small")
    call = ["quantize", source, small, "--scheme", "w3g32a", "--rule", "1=w4g32a:lsq"]
    assert main([*call, "--method", "descent"]) != 0
    assert "add --calibrate self" in capsys.readouterr().err
    given = ["--method", "descent", "--calibrate", str(tmp_path / "known.safetensors")]
    assert main([*call, *given]) == 0
    quantize_model(model, {"1": "w4g32a:lsq", "*": "w3g32a:descent"}, statistics=known)
    blank = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
    loaded = load_quantized(small, blank).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor), name
    assert main([*call[:3], "--scheme", "w4", "--method", "none"]) != 0
    assert "there is no method 'none'" in capsys.readouterr().err


@pytest.mark.deep
@pytest.mark.parametrize(("method", "word"), [("descent", "self"), ("lsq", "random")])
def test_a_folder_of_transformers_calibrates_itself(tmp_path: Path, method: str, word: str) -> None:
    transformers: Any = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    sizes = {"num_hidden_layers": 1, "max_position_embeddings": 512}
    model = tiny_models.random_model("llama", **sizes)
    model.save_pretrained(tmp_path / "float")
    call = ["quantize", str(tmp_path / "float"), str(tmp_path / "small"), "--scheme", "w3g32a"]
    call += ["--exclude", "lm_head", "--method", method, "--calibrate", word]
    assert main(call) == 0
    known = calibrate(
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "float").eval(),
        word,
        statistics="hessian" if method == "descent" else "moments",
    )
    quantize_model(model, f"w3g32a:{method}", exclude="lm_head", statistics=known)
    made = load_quantized(tmp_path / "small").state_dict()
    assert all(torch.equal(made[name], tensor) for name, tensor in model.state_dict().items())
