"""Libraries that would load codes as weights drawn at random: refused when they save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from quantization import (
    dequantize_model,
    load_quantized,
    quantize_checkpoint,
    quantize_model,
    save_quantized,
)
from quantization.integrations.foreign_saves import note_swap
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


def _of_diffusers() -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32,
        pooled_projection_dim=64, out_channels=4,
    ).eval()  # fmt: skip


def test_diffusers_saves_floats_and_no_codes(tmp_path: Path) -> None:
    model = _of_diffusers()
    model.save_pretrained(tmp_path / "float")
    quantize_model(model, "w8g32")
    save_quantized(model, tmp_path / "small")
    again = load_quantized(tmp_path / "small", _of_diffusers())
    for each in (model, again):
        with pytest.raises(ValueError, match=r"diffusers would load its codes .* save_quantized"):
            each.save_pretrained(tmp_path / "own")
    assert not (tmp_path / "own").exists()
    streamed = quantize_checkpoint(tmp_path / "float", tmp_path / "streamed", "w8g32")
    assert len(streamed.replaced) > 10
    whole = load_quantized(tmp_path / "streamed", _of_diffusers())
    assert all(torch.equal(t, model.state_dict()[k]) for k, t in whole.state_dict().items())
    with pytest.raises(ValueError, match=r"no config\.json of transformers .* give the model"):
        load_quantized(tmp_path / "streamed")


def test_modules_of_sentence_transformers_are_saved_as_floats() -> None:
    """Without the library: a class that says it is of it."""

    class Dense(torch.nn.Sequential):
        __module__ = "sentence_transformers.base.modules.dense"

        def save_torch_weights(self) -> dict[str, Any]:
            return self.state_dict()

    model = Dense(torch.nn.Linear(8, 8))
    note_swap(quantize_model(model, "w8").model)  # a swap does that where the library is loaded
    with pytest.warns(UserWarning, match="0 of Dense is saved as the float numbers of its codes"):
        saved = model.save_torch_weights()
    assert torch.equal(saved["0.weight"], model[0].weight) and "packed_weights" in dir(model[0])
    dense = dequantize_model(model).model
    assert dense.save_torch_weights().keys() == saved.keys()
