"""Layers of one weight and modules in several places: they stay so, or it is said."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
from torch import nn

from quantization.linear_layer import (
    QWQALinearLayer,
    replace_linear_layers_with_w8a16,
)
from tests.swap.small_models import TARGET, statuses
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

# ---- sharing and ties ------------------------------------------------------------------------


def test_a_shared_module_stays_shared() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": shared, "c": nn.Linear(8, 8)})
    report = replace_linear_layers_with_w8a16(model, TARGET)
    assert model["a"][0] is model["b"] and type(model["b"]) is QWQALinearLayer
    assert len(report) == 2 and report["b"] is report["a.0"] and report[0].aliases == ("b",)
    assert report.bytes_after == 2 * (64 + 32 + 32)


def test_a_shared_block_stays_shared() -> None:
    block = nn.Sequential(nn.Linear(8, 8))
    model = nn.Sequential(block, block, nn.Linear(8, 8))
    report = replace_linear_layers_with_w8a16(model, TARGET)
    assert model[0] is model[1] is block and len(report.replaced) == 2


def test_two_layers_of_one_weight_share_one_set_of_codes() -> None:
    for device in ("cpu", "meta"):
        model = nn.Sequential(*(nn.Linear(8, 8, device=device) for _ in range(3)))
        model[1].weight = model[0].weight
        report = replace_linear_layers_with_w8a16(model, TARGET)
        assert model[0] is not model[1]
        assert model[0].int8_weights is model[1].int8_weights
        assert model[0].scales is model[1].scales
        assert model[0].bias is not model[1].bias
        assert model[2].int8_weights is not model[0].int8_weights
        assert report.bytes_before == 2 * 256 + 3 * 32
        assert report.bytes_after == 2 * (64 + 32) + 3 * 32


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.middle(self.embedding(x)))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_head_tied_to_an_embedding_stays_tied_or_is_untied_on_request(device: str) -> None:
    model = Tied().to(device)
    model.head.weight = model.embedding.weight
    report = replace_linear_layers_with_w8a16(model, TARGET)
    assert statuses(report) == {"middle": "replaced", "head": "left"}
    assert model.head.weight is model.embedding.weight
    assert report["head"].reason.startswith("tied to embedding.weight, which stays in float")
    with pytest.raises(ValueError, match="head: tied to embedding"):
        replace_linear_layers_with_w8a16(model, TARGET, strict=True)
    before = report.model_bytes_after
    report = replace_linear_layers_with_w8a16(model, TARGET, strict=True, untie=True)
    assert type(model.head) is QWQALinearLayer
    assert report["head"].reason == "untied from embedding.weight, which stays in float"
    assert report.model_bytes_after - before == 20 * 8 + 20 * 4


def test_a_tie_through_memory_alone_is_seen() -> None:
    model = Tied()
    model.head.weight = nn.Parameter(model.embedding.weight.data)
    assert replace_linear_layers_with_w8a16(model, TARGET)["head"].status == "left"


def test_a_layer_tied_to_an_excluded_one_is_left() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    report = replace_linear_layers_with_w8a16(model, TARGET, ["0"])
    assert report["1"].reason.startswith("tied to 0.weight")


def test_slices_of_one_storage_are_no_tie() -> None:
    packed = torch.randn(24, 8)
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in "qkv"})
    for i, name in enumerate("qkv"):
        model[name].weight = nn.Parameter(packed[8 * i : 8 * i + 8])
    assert len(replace_linear_layers_with_w8a16(model, TARGET, strict=True).replaced) == 3
