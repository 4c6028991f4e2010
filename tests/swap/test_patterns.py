"""Patterns name modules, and say what is near where they name none."""

from __future__ import annotations

import doctest
import itertools
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn

from quantization.swap import patterns
from quantization.swap.patterns import match_patterns
from quantization.swap.walker import walk
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(patterns).failed == 0


class Head(nn.Linear):
    pass


@pytest.fixture
def model() -> nn.Module:
    layers = [nn.ModuleDict({"up_proj": nn.Linear(2, 2), "down": nn.Linear(2, 2)}) for _ in "01"]
    return nn.ModuleDict(
        {"model": nn.ModuleDict({"layers": nn.ModuleList(layers)}), "head": Head(2, 2)}
    )


def matched(model: nn.Module, *patterns: Any) -> set[str]:
    sites = list(walk(model))
    found = match_patterns(sites, patterns)
    return {s.name for s in sites if id(s.module) in found and isinstance(s.module, nn.Linear)}


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("head", {"head"}),
        ("down", {"model.layers.0.down", "model.layers.1.down"}),
        ("model.layers.1.down", {"model.layers.1.down"}),
        ("model.layers.0", {"model.layers.0.down", "model.layers.0.up_proj"}),
        ("*_proj", {"model.layers.0.up_proj", "model.layers.1.up_proj"}),
        ("up_*", {"model.layers.0.up_proj", "model.layers.1.up_proj"}),
        ("*.1.up?proj", {"model.layers.1.up_proj"}),
        ("*.[12].down", {"model.layers.1.down"}),
        (r"re:layers\.\d+\.down$", {"model.layers.0.down", "model.layers.1.down"}),
        ("re:^head", {"head"}),
        (Head, {"head"}),
        (lambda name, module: name.endswith("0.down"), {"model.layers.0.down"}),
        (
            lambda name, module: isinstance(module, nn.ModuleList),
            {f"model.layers.{i}.{name}" for i in "01" for name in ("up_proj", "down")},
        ),
    ],
    ids=(f"case{i}" for i in itertools.count()),
)
def test_patterns_of_every_kind(model: nn.Module, pattern: Any, wanted: set[str]) -> None:
    assert matched(model, pattern) == wanted
    assert len(match_patterns(list(walk(model)), pattern)) >= len(wanted)  # one, not in a list


def test_several_patterns_add_up(model: nn.Module) -> None:
    assert matched(model, "head", "*.0.down") == {"head", "model.layers.0.down"}
    assert matched(model) == set()
    assert len(matched(model, nn.Linear)) == 5
    assert len(matched(model, "*")) == 5


def test_a_child_of_two_parents_is_excluded_by_either() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    for pattern in ("a", "b", "a.0", "b.0"):
        assert matched(model, pattern) == {"a.0", "b.0"}


def test_odd_names_are_matched_as_they_stand() -> None:
    model = nn.ModuleDict({"w[0]": nn.Linear(2, 2), "w0": nn.Linear(2, 2)})
    assert "w[0]" in matched(model, "w[0]")


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        ("lm_hed", "'lm_head'"),
        ("model.layers.0.up_prj", "'model.layers.0.up_proj'"),
        ("re:lm_heads$", "'lm_head'"),
        ("*.lm_heads", "'lm_head'"),
        (nn.Bilinear, "'Linear'"),
        (lambda name, module: False, "nearest names are"),
        ("", "nearest names are 'model'"),
        ("Lm_Head", "'lm_head'"),
    ],
)
def test_a_pattern_that_matches_nothing(pattern: Any, nearest: str) -> None:
    model = nn.ModuleDict(
        {
            "model": nn.ModuleDict(
                {"layers": nn.Sequential(nn.ModuleDict({"up_proj": nn.Linear(2, 2)}))}
            ),
            "lm_head": nn.Linear(2, 2),
        }
    )
    with pytest.raises(ValueError, match="matches no module of the model") as error:
        matched(model, "lm_head", pattern)
    assert nearest in str(error.value)


def test_patterns_of_a_wrong_kind(model: nn.Module) -> None:
    for pattern in (3, None, int, nn.Linear(2, 2), ["head"]):
        with pytest.raises(TypeError, match="a pattern is a child name, a dotted name, a glob"):
            matched(model, pattern)
    for pattern in (None, 3):
        with pytest.raises(TypeError, match=f"cannot choose modules by {pattern}"):
            match_patterns(list(walk(model)), pattern)
    with pytest.raises(ValueError, match="no regular expression"):
        matched(model, "re:(")
    with pytest.raises(ValueError, match="the model has no children"):
        match_patterns(list(walk(nn.ReLU())), "head")
