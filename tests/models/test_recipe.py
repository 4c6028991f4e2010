"""Recipes: which scheme each layer of a model gets."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn

from quantization import (
    PackedLinearLayer,
    QWQALinearLayer,
    Scheme,
    dequantize_model,
    quantize_model,
)
from tests.models.small_models import TOKENS, Model, schemes, snapshot, statuses
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

# ---- recipes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["w4g16a", Scheme.parse("w4g16a"), {"*": "w4g16a"}])
def test_one_scheme_goes_to_every_linear_layer(recipe: Any) -> None:
    model = Model()
    wanted = {name: PackedLinearLayer.from_float(m, "w4g16a") for name, m in linears(model)}
    report = quantize_model(model, recipe)
    assert schemes(model) == {
        "body.embed": "Embedding",
        "body.up": "w4g16a",
        "body.down": "w4g16a",
        "head": "w4g16a",
    }
    for name, layer in wanted.items():
        assert torch.equal(model.get_submodule(name).weight, layer.weight)
    assert [c.name for c in report.replaced] == ["body.up", "body.down", "head"]
    assert report["head"].scheme == "w4g16a" and not report.left
    assert report["head"].bits_per_weight == model.head.bits_per_weight
    assert report.model is model


def linears(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, m) for name, m in model.named_modules() if type(m) is nn.Linear]


@pytest.mark.parametrize(
    ("recipe", "wanted"),
    [
        ({"head": "w8", "*": "w3"}, {"body.up": "w3", "body.down": "w3", "head": "w8"}),
        ({"*": "w3", "head": "w8"}, {"body.up": "w3", "body.down": "w3", "head": "w3"}),
        ({"head": None, nn.Linear: "w3"}, {"body.up": "w3", "body.down": "w3"}),
        ({"body": "w3"}, {"body.up": "w3", "body.down": "w3"}),
        ({"body.up": "w2", "body": "w3"}, {"body.up": "w2", "body.down": "w3"}),
        ({"re:(up|head)$": "w5g16"}, {"body.up": "w5g16", "head": "w5g16"}),
        ({"body.*": "w3"}, {"body.embed": "w3", "body.up": "w3", "body.down": "w3"}),
        (
            {nn.Embedding: "w8", "body": "w3"},
            {"body.embed": "w8", "body.up": "w3", "body.down": "w3"},
        ),
        ({"embed": "w8"}, {"body.embed": "w8"}),
        ({"body": "w3", "embed": "w8"}, {"body.embed": "w8", "body.up": "w3", "body.down": "w3"}),
        ({"embed": None, nn.Embedding: "w8", "head": "w4"}, {"head": "w4"}),
        ({nn.Module: "w4"}, {"body.up": "w4", "body.down": "w4", "head": "w4"}),
        ({lambda name, module: name == "head": Scheme(4)}, {"head": "w4"}),
    ],
)
def test_the_first_rule_that_matches_is_followed(recipe: Any, wanted: dict[str, str]) -> None:
    model = Model()
    before = schemes(model)
    report = quantize_model(model, recipe)
    assert schemes(model) == before | wanted
    assert {c.name: c.scheme for c in report.replaced} == wanted
    assert model(TOKENS).shape == (2, 3, 20)


def test_what_no_rule_matches_is_left_and_reported() -> None:
    model = Model()
    report = quantize_model(model, {"body.up": "w4", "head": None})
    assert statuses(report) == {"body.up": "replaced", "body.down": "left", "head": "excluded"}
    assert report["body.down"].reason == "no rule of the recipe matches it"
    assert report["head"].reason == "by the rule 'head'"
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"(?s)strict: 1 layers would be left.*body\.down: no rule"
    ):
        quantize_model(model, {"body.up": "w4", "head": None}, strict=True)
    assert snapshot(model) == before
    quantize_model(model, {"body.up": "w4"}, exclude=["head", "down"], strict=True)


def test_what_is_excluded_stays_before_any_rule() -> None:
    model = Model()
    report = quantize_model(model, {"*": "w4", nn.Embedding: "w8"}, exclude=["head", nn.Embedding])
    assert report["head"].reason == "by 'head'"
    assert report["body.embed"].status == "excluded"
    assert schemes(model)["head"] == "Linear" and schemes(model)["body.embed"] == "Embedding"


@pytest.mark.parametrize(
    ("recipe", "error", "message"),
    [
        ({"haed": "w4"}, ValueError, r"'haed' matches no module.*nearest names are 'head'"),
        ({"*": "w4", QWQALinearLayer: "w4"}, ValueError, "QWQALinearLayer matches no module"),
        ({"*": "w9"}, ValueError, "1..8"),
        ("four bits", ValueError, "'four bits' names no scheme"),
        ({"*": 4}, TypeError, "scheme must be a Scheme or its short name, not 4"),
        ({4: "w4"}, TypeError, "cannot choose modules by 4"),
        ({}, ValueError, "the recipe has no rules"),
        (None, TypeError, "the recipe is None; give a Scheme, its short name"),
        (["w4"], TypeError, "the recipe is"),
    ],
)
def test_wrong_recipes_change_nothing(recipe: Any, error: type[Exception], message: str) -> None:
    model = Model()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        quantize_model(model, recipe)
    assert snapshot(model) == before


def test_an_error_names_the_rule() -> None:
    with pytest.raises(ValueError, match=r"1\.\.8") as caught:
        quantize_model(Model(), {"head": "w4", "body": "w9"})
    assert caught.value.__notes__ == ["in the rule 'body' of the recipe"]


@pytest.mark.parametrize("thing", [None, 3, nn.Linear, [nn.Linear(2, 2)]])
def test_an_object_that_is_not_a_model(thing: Any) -> None:
    for call in (lambda: quantize_model(thing, "w4"), lambda: dequantize_model(thing)):
        with pytest.raises(TypeError, match=r"expected a model \(a torch\.nn\.Module instance\)"):
            call()
