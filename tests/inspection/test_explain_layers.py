"""Weights of layers explained: each kind of layer, type of floats, share and stored model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn

from quantization import (
    PackedEmbedding,
    PackedLinearLayer,
    QWQALinearLayer,
    explain,
    explain_byte,
    quantize_model,
    save_quantized,
)
from quantization.checkpoint import read_checkpoint
from quantization.distributed.shares import shard
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def as_layer_has_it(layer: Any) -> None:
    """Each number is the layer's own, and its bits are found again."""
    weight = layer.weight
    rows, cols = weight.shape
    for row in range(rows):
        for col in range(0, cols, 3):
            told = explain(layer, row, col)
            assert told.value == float(weight[row, col])
            (place,) = [part.place for part in told.parts if part.name == "code"]
            assert place is not None
            held = explain_byte(layer, place.offset).held
            assert any(row in each.rows and col in each.cols for each in held)
            data = layer._buffers[place.buffer].view(torch.uint8).reshape(-1)
            assert place.data == tuple(data[place.offset :][: len(place.data)].tolist())


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_type_of_floats(dtype: torch.dtype) -> None:
    linear = nn.Linear(20, 3, dtype=dtype)
    for layer in (
        QWQALinearLayer.from_float(linear),
        PackedLinearLayer.from_float(linear, "w3g8a"),
        PackedLinearLayer.from_float(linear, "nf4+dq"),
        PackedEmbedding.from_float(nn.Embedding(3, 20, dtype=dtype), "w4g8af"),
    ):
        as_layer_has_it(layer)


def test_an_int8_layer_names_its_own_buffers() -> None:
    layer = QWQALinearLayer(8, 4)
    told = explain(layer, 3, 2)
    assert [part.place.buffer for part in told.parts if part.place] == ["int8_weights", "scales"]
    assert explain_byte(layer, 26, "int8_weights").element == (3, 2)
    assert explain_byte(layer, 13, "scales").element == (3,)


@pytest.mark.parametrize("scheme", ["w4g8a", "ternary", "w3g8af"])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_share_of_a_layer(scheme: str, dim: int) -> None:
    layer = PackedLinearLayer(32, 4, scheme=scheme)
    for part in (shard(layer, dim, 0, 2), shard(layer, dim, 1, 2)):
        as_layer_has_it(part)


def test_the_reference_may_be_a_layer() -> None:
    linear = nn.Linear(16, 4)
    layer = PackedLinearLayer.from_float(linear, "w8")
    told = explain(layer, 1, 2, reference=linear)
    assert told.reference == linear.weight[1, 2].item()
    assert told.error == pytest.approx(told.value - told.reference)
    utils = pytest.importorskip("transformers.pytorch_utils")
    turned = utils.Conv1D(4, 4)
    nn.init.normal_(turned.weight)
    layer = PackedLinearLayer.from_float(turned, "w8")
    assert explain(layer, 1, 2, reference=turned).reference == turned.weight[2, 1].item()


def test_a_layer_of_a_stored_model(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 8))
    quantize_model(model, {"0": "w4g8a", "1": "w8a16"})
    save_quantized(model, tmp_path / "folder")
    stored = read_checkpoint(tmp_path / "folder").layers
    for name in ("0", "1"):
        told, wanted = explain(stored[name], 1, 2), explain(model.get_submodule(name), 1, 2)
        assert str(told) == str(wanted)


def test_layers_without_numbers_and_models_are_refused() -> None:
    with pytest.raises(ValueError, match="on the meta device"):
        explain(PackedLinearLayer(8, 4, device="meta"), 0, 0)
    with pytest.raises(ValueError, match="row is 0; the weight has none, as it is empty"):
        explain(PackedLinearLayer(8, 0), 0, 0)
    model = nn.Sequential(PackedLinearLayer(8, 4), nn.ReLU(), QWQALinearLayer(4, 4))
    with pytest.raises(TypeError, match=r"it holds 0, 2: give one of them, .*'0'"):
        explain(model, 0, 0)
    with pytest.raises(TypeError, match="Linear is no quantized layer"):
        explain(nn.Linear(8, 4), 0, 0)
