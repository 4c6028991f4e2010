"""Walking a model: every place of every module, under all its names."""

from __future__ import annotations

import doctest

import pytest

torch = pytest.importorskip("torch")
from torch import nn

from quantization.swap import walker
from quantization.swap.patterns import match_patterns
from quantization.swap.walker import adapters, walk
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(walker).failed == 0


def test_walk_has_the_names_and_order_of_torch() -> None:
    model = nn.Transformer(8, 2, 1, 2, 16)
    shared = nn.Linear(2, 2)
    model.extra = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ReLU())})
    model.extra.register_module("none", None)
    mine = [(site.name, site.module) for site in walk(model)]
    assert mine == list(model.named_modules(remove_duplicate=False))
    for site in walk(model):
        if site.parent is not None:
            assert site.parent._modules[site.key] is site.module


def test_walk_is_not_stopped_by_depth() -> None:
    model: nn.Module = nn.Linear(2, 2)
    for _ in range(5000):
        parent = nn.Module()
        parent.x = model
        model = parent
    sites = list(walk(model))
    assert len(sites) == 5001
    assert sites[-1].name == ".".join("x" * 5000)


def test_walk_ends_where_modules_hang_in_a_circle_or_share_at_every_level() -> None:
    a, b = nn.Module(), nn.Module()
    a.b, b.a = b, a
    assert {id(site.module) for site in walk(a)} == {id(a), id(b)}
    model: nn.Module = nn.Linear(2, 2)
    for _ in range(40):  # 2 ** 40 names
        model = nn.Sequential(model, model)
    assert sum(1 for _ in walk(model)) < 64 * 2 * 42


def test_every_place_of_a_module_shared_very_often_is_found() -> None:
    model = nn.Sequential(*[nn.Linear(2, 2)] * 200)
    assert len(list(walk(model))) == 201
    blocks = nn.Sequential(*[nn.Sequential(nn.Linear(2, 2))] * 200)
    excluded = match_patterns(list(walk(blocks)), "199")
    assert id(blocks[0][0]) in excluded


def test_adapter_layers_are_known_by_their_base() -> None:
    class LoraLayer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Linear(2, 2)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(2, 1)})

    model = nn.ModuleDict({"q": LoraLayer(), "k": nn.Linear(2, 2)})
    found = adapters(list(walk(model)))
    assert id(model["q"].base_layer) in found and id(model["q"].lora_A["default"]) in found
    assert id(model["k"]) not in found
    assert "merge it first" in found[id(model["q"].base_layer)]
