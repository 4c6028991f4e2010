"""What belongs together in a model stays so when it is quantized."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn

from quantization import (
    PackedEmbedding,
    PackedLinearLayer,
    Scheme,
    dequantize_model,
    quantize_model,
)
from tests.models.small_models import TOKENS, Model, schemes
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

# ---- sharing and ties ------------------------------------------------------------------------


def test_a_shared_module_stays_shared() -> None:
    shared = nn.Linear(32, 32)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": shared})
    report = quantize_model(model, {"b": "w4"})
    assert model["a"][0] is model["b"] and type(model["b"]) is PackedLinearLayer
    assert report["b"] is report["a.0"] and report[0].aliases == ("b",)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_tied_head_shares_the_codes_of_its_embedding(device: str) -> None:
    model = Model(tied=True).to(device)
    model.head.weight = model.body.embed.weight
    report = quantize_model(model, {"re:(embed|head)$": "w8", "*": "w4"}, strict=True)
    head, embed = model.head, model.body.embed
    assert type(head) is PackedLinearLayer and type(embed) is PackedEmbedding
    assert head.packed_weights is embed.packed_weights and head.scales is embed.scales
    weights = sum(layer.nbytes for layer in (embed, model.body.up, model.body.down))
    assert report.bytes_after == weights + 4 * 48
    assert report.model_bytes_after == weights + 4 * 48
    dequantize_model(model)
    assert model.head.weight is model.body.embed.weight
    assert isinstance(model.head.weight, nn.Parameter)


@pytest.mark.parametrize(
    ("recipe", "left", "other"),
    [
        ("w4", "head", "body.embed.weight"),
        ({"body": "w4", nn.Embedding: "w8", "head": None}, "body.embed", "head.weight"),
    ],
)
def test_one_half_of_a_tie_is_left_or_untied_on_request(recipe: Any, left: str, other: str) -> None:
    model = Model(tied=True)
    report = quantize_model(model, recipe)
    assert report[left].status == "left" and model.head.weight is model.body.embed.weight
    assert report[left].reason.startswith(f"tied to {other}, which stays in float")
    with pytest.raises(ValueError, match=f"{left}: tied to {other}"):
        quantize_model(model, recipe, strict=True)
    report = quantize_model(model, recipe, untie=True, strict=True)
    assert report[left].replaced and report[left].reason.startswith(f"untied from {other}")


def test_a_tie_of_two_schemes_is_parted_and_told() -> None:
    model = Model(tied=True)
    report = quantize_model(model, {nn.Embedding: "w8", "*": "w4"})
    assert (model.body.embed.scheme, model.head.scheme) == (Scheme(8), Scheme(4))
    assert report["head"].reason == "untied from body.embed, which becomes w8"


def test_codes_that_are_shared_are_not_parted_unasked() -> None:
    model = Model(tied=True)
    quantize_model(model, {nn.Embedding: "w8", "head": "w8", "*": "w4"})
    report = quantize_model(model, {PackedLinearLayer: "w3"})
    assert report["head"].reason.startswith("tied to body.embed.packed_weights, which stays as it")
    assert schemes(model)["body.up"] == "w3" and schemes(model)["head"] == "w8"
    quantize_model(model, {PackedLinearLayer: "w3", PackedEmbedding: "w3"})
    assert model.head.packed_weights is model.body.embed.packed_weights
    assert schemes(model)["head"] == "w3"


# ---- what is carried over --------------------------------------------------------------------


def test_hooks_flags_and_attributes_go_there_and_back() -> None:
    model = Model().eval()
    calls: list[str] = []
    handles = []
    for name, layer in (("up", model.body.up), ("embed", model.body.embed)):
        handles.append(layer.register_forward_hook(lambda *args, name=name: calls.append(name)))
        layer.tag = name
    model.body.up.train()
    quantize_model(model, {"*": "w4", nn.Embedding: "w8"})
    for back in (False, True):
        if back:
            dequantize_model(model)
        calls.clear()
        model(TOKENS)
        assert calls == ["embed", "up"]
        assert (model.body.up.tag, model.body.embed.tag) == ("up", "embed")
        assert model.body.up.training and not model.head.training
    for handle in handles:
        handle.remove()
    calls.clear()
    model(TOKENS)
    assert not calls
    own = {"_scheme", "_dtype", "_floats", "_bits", "_group", "was_conv1d"}
    assert not own & set(vars(model.body.up)) | own & set(vars(model.body.embed))


def test_random_numbers_are_not_drawn() -> None:
    model = Model()
    state = torch.get_rng_state()
    quantize_model(model, {"*": "w4", nn.Embedding: "w8"})
    dequantize_model(model)
    assert torch.equal(state, torch.get_rng_state())
