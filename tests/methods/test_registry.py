"""Methods by name and by function, in calls, layers and recipes; what is not finite or wrong."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn

import quantization
from quantization import (
    PackedLinearLayer,
    Rule,
    Statistics,
    calibrate,
    fit_matrix,
    pack_matrix,
    quantize_model,
    register_method,
)
from quantization.methods import registry
from tests.packed_calls import same
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


def halved(weight: Any, scheme: Any, statistics: Any) -> Any:
    return pack_matrix(weight / 2, scheme)


@pytest.fixture
def own_name() -> Any:
    register_method("halved", halved)
    yield "halved"
    del registry._METHODS["halved"]


def test_an_own_method_works_by_name_and_as_such(own_name: str) -> None:
    weight = torch.randn(8, 64)
    expected = pack_matrix(weight / 2, "w4g32a")
    assert same(fit_matrix(weight, "w4g32a", own_name), expected)
    assert same(fit_matrix(weight, "w4g32a", halved), expected)
    linear = nn.Linear(64, 8)
    layer = PackedLinearLayer.from_float(linear, "w4g32a", method=own_name)
    assert same(layer.packed(), pack_matrix(linear.weight.detach() / 2, "w4g32a"))
    assert own_name in quantization.method_names()


def test_recipes_name_methods(own_name: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 8))
    first, second, third = (layer.weight.detach().clone() for layer in model)
    known = calibrate(model, [torch.randn(10, 64)])
    recipe = {"0": "w4g32a:halved", "1": Rule("nf4g32", method="lsq"), "*": "w3g32a"}
    report = quantize_model(model, recipe, statistics=known)
    assert len(report.replaced) == 3
    assert same(model[0].packed(), pack_matrix(first / 2, "w4g32a"))
    assert same(model[1].packed(), fit_matrix(second, "nf4g32", "lsq", known["1"]))
    assert same(model[2].packed(), pack_matrix(third, "w3g32a"))


def test_a_layer_without_statistics_is_told_of() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    known = calibrate(model[0], [torch.randn(10, 64)])
    report = quantize_model(model, "w4g32a:lsq", statistics={"0": known[""]})
    assert [layer.reason for layer in report] == [
        "",
        "fitted without statistics: there are none of it",
    ]


@pytest.mark.parametrize("name", ["w4g32a", "nf4g32", "mxfp4", "w4g32af+dq", "w4"])
def test_marked_groups_are_those_of_rounding_to_nearest(name: str) -> None:
    weight = torch.randn(6, 64)
    weight[2, 40], weight[4, 0] = torch.nan, torch.inf
    with pytest.raises(ValueError, match=r"the NaN at index \(2, 40\)|index \(2, 40\)"):
        fit_matrix(weight, name, "lsq", name="fc.weight")
    marked = fit_matrix(weight, name, "lsq", nonfinite="mark").dequantize()
    plain = pack_matrix(weight, name, nonfinite="mark").dequantize()
    assert torch.equal(marked.isnan(), plain.isnan()) and plain.isnan().any()


def test_meta_and_empty_matrices_have_shapes() -> None:
    for weight in (torch.empty(4, 64, device="meta"), torch.empty(0, 64), torch.empty(4, 0)):
        made = fit_matrix(weight, "w4g32a", "lsq")
        assert made.shape == tuple(weight.shape)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: fit_matrix(torch.ones(2, 8), "w4", "lsqq"),
            ValueError,
            "there is no method 'lsqq'",
        ),
        (lambda: fit_matrix(torch.ones(2, 8), "w4", 3), TypeError, "method must be a name or"),
        (
            lambda: fit_matrix(torch.ones(2, 8), "w4", "lsq", Statistics.of(torch.ones(2, 4))),
            ValueError,
            "weight has 8 columns, and the statistics are of 4",
        ),
        (
            lambda: fit_matrix(torch.ones(2, 8), "w4", lambda w, s, k: w),
            TypeError,
            "it must give PackedWeights",
        ),
        (
            lambda: fit_matrix(torch.ones(2, 8), "w4", lambda w, s, k: pack_matrix(w, "w3")),
            ValueError,
            r"gave \(2, 8\) under w3; it was asked for \(2, 8\) under w4",
        ),
        (lambda: Rule("w8a16", method="lsq"), ValueError, "'w8:lsq' makes packed codes of 8 bits"),
        (lambda: Rule("w4:lsq", method="halved"), ValueError, "name two methods"),
        (lambda: Rule("w4:none"), ValueError, "there is no method 'none'"),
        (lambda: register_method("lsq", halved), ValueError, "there is a method 'lsq' already"),
        (lambda: register_method("a:b", halved), ValueError, "letters, digits and underscores"),
        (lambda: register_method("a", 3), TypeError, "a method is a name and a function"),
    ],
)
def test_what_is_wrong_is_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
