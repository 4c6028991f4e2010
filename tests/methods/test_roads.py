"""Methods on every road to a quantized model: in memory, streamed, at loading by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import save_file
from torch import nn

import quantization
from quantization import calibrate, load_quantized, quantize_checkpoint, quantize_model
from quantization.checkpoint.disk.json_files import CheckpointError
from tests import tiny_models
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

RECIPE = {"0": "w3g32af+dq:descent", "2": "nf4g32:lsq", "*": "w4g32a"}


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 8))


@pytest.mark.parametrize("kept_in_a_file", [False, True])
def test_streaming_follows_methods_and_statistics(tmp_path: Path, kept_in_a_file: bool) -> None:
    model = network()
    known: Any = calibrate(model, [torch.randn(200, 64)], statistics="hessian")
    save_file(model.state_dict(), tmp_path / "float.safetensors")
    given = known
    if kept_in_a_file:
        quantization.save_statistics(known, tmp_path / "known.safetensors")
        given = quantization.load_statistics(tmp_path / "known.safetensors")
    source, small = tmp_path / "float.safetensors", tmp_path / "small"
    quantize_checkpoint(source, small, RECIPE, statistics=given)
    quantize_model(model, RECIPE, statistics=known)
    streamed = load_quantized(small, network())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, streamed.state_dict()[name]), name
    plain = network()
    quantize_model(plain, {name: str(rule).partition(":")[0] for name, rule in RECIPE.items()})
    assert not torch.equal(plain[0].packed_weights, model[0].packed_weights)


def test_a_run_under_other_statistics_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantization.checkpoint import streaming

    model = network()
    one, two = (calibrate(model, [torch.randn(50, 64)]) for _ in range(2))
    save_file(model.state_dict(), tmp_path / "float.safetensors")
    call = [tmp_path / "float.safetensors", tmp_path / "small", "w4g32a:lsq"]
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "finish", lambda *rest, **more: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quantize_checkpoint(*call, statistics=one)
    with pytest.raises(CheckpointError, match="another"):
        quantize_checkpoint(*call, statistics=two)
    quantize_checkpoint(*call, statistics=one)


def test_transformers_follow_methods_and_statistics(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from quantization.integrations.transformers import QuantizationConfig

    model = tiny_models.random_model("llama", num_hidden_layers=1)
    model.save_pretrained(tmp_path / "float")
    known = calibrate(model, "random", statistics="hessian", tokens=(4, 32))
    recipe = {"re:q_proj": "w3g32af+dq:descent", "*": "w4g32a:lsq"}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=QuantizationConfig(recipe, statistics=known)
    )
    quantize_model(model, recipe, exclude="lm_head", statistics=known)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    loaded.save_pretrained(tmp_path / "small")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
