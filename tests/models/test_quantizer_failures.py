"""A model is quantized as a whole or not at all."""

from __future__ import annotations

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn

from quantization import (
    PackedEmbedding,
    PackedLinearLayer,
    dequantize_model,
    quantize_model,
)
from tests.models.small_models import Model, snapshot
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

# ---- all or nothing --------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=repr)
def test_an_error_on_the_way_leaves_the_model_as_it_was(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model()
    before = snapshot(model)
    take, built = PackedLinearLayer._set_buffers, []

    def exploding(self: Any, *args: Any) -> None:
        built.append(self)
        if len(built) == 3:
            raise error
        take(self, *args)

    monkeypatch.setattr(PackedLinearLayer, "_set_buffers", exploding)
    with pytest.raises(type(error)) as caught:
        quantize_model(model, {"*": "w4", nn.Embedding: "w8"})
    assert "while replacing head; the model was not changed" in caught.value.__notes__
    assert snapshot(model) == before


def test_an_error_on_the_way_back_leaves_the_model_quantized(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Model()
    quantize_model(model, {"*": "w4", nn.Embedding: "w8"})
    before = snapshot(model)
    monkeypatch.setattr(PackedEmbedding, "dequantize", None)
    with pytest.raises(TypeError):
        dequantize_model(model)
    assert snapshot(model) == before


class Interrupting(dict):
    """A mapping whose n-th write is interrupted, once."""

    writes_left = 10**9

    def __setitem__(self, key: Any, value: Any) -> None:
        Interrupting.writes_left -= 1
        if Interrupting.writes_left == 0:
            raise KeyboardInterrupt
        super().__setitem__(key, value)


@pytest.mark.parametrize("write", [1, 2, 3, 4])
def test_an_interrupt_between_assignments_takes_them_back(write: int) -> None:
    model = Model()
    for module in model.modules():
        module.__dict__["_modules"] = Interrupting(module._modules)
    before = snapshot(model)
    Interrupting.writes_left = write
    try:
        with pytest.raises(KeyboardInterrupt):
            quantize_model(model, {"*": "w4", nn.Embedding: "w8"})
    finally:
        Interrupting.writes_left = 10**9
    assert snapshot(model) == before


def test_a_nan_leaves_the_model_as_it_was_or_is_marked() -> None:
    model = Model()
    with torch.no_grad():
        model.body.embed.weight[2, 7] = math.nan
    before, recipe = snapshot(model), {"*": "w4", nn.Embedding: "w8"}
    with pytest.raises(ValueError, match=r"body\.embed\.weight.*nan.*2, 7"):
        quantize_model(model, recipe)
    assert snapshot(model) == before
    quantize_model(model, recipe, nonfinite="mark")
    assert torch.isnan(model.body.embed.weight).any(dim=1).nonzero().tolist() == [[2]]
