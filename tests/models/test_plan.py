"""A plan says what quantize_model then does, to the byte, and changes nothing."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn

from quantization import PackedLinearLayer, plan, quantize_model
from quantization.models import expected, planned
from tests.models.small_models import Model
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


def tied() -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(32, 64), "head": nn.Linear(64, 32, bias=False)})
    model["head"].weight = model["embed"].weight
    return model


def mixed() -> nn.Module:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    return nn.Sequential(
        conv1d(48, 16), nn.Linear(48, 8), nn.LSTM(8, 4), nn.MultiheadAttention(16, 2),
        nn.LazyLinear(3), nn.LayerNorm(8), nn.Linear(8, 8).half(),
    )  # fmt: skip


def quantized() -> nn.Module:
    model = Model()
    quantize_model(model, {"head": "w8a16", "up": "w3", "*": None})
    return model


CASES: list[tuple[Any, Any, dict]] = [
    (Model, "w4g32a", {}),
    (Model, "w8a16", {"exclude": "head"}),
    (Model, {"head": "nf4:lsq", "embed": "w8", "*": None}, {}),
    (tied, "w4", {}),
    (tied, "w4", {"untie": True}),
    (tied, {"embed": "w4", "head": "w4"}, {}),
    (tied, {"embed": "w4", "head": "w8"}, {}),
    (tied, {"embed": "w4", "*": None}, {"untie": True}),
    (mixed, "w4g32af+dq", {}),
    (mixed, "w8a16", {"split_attention": False}),
    (quantized, "w4", {}),
    (quantized, {PackedLinearLayer: "w8", "*": None}, {}),
    (lambda: nn.Linear(8, 8), "w2", {}),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_the_deed_is_as_planned(case: int, device: str) -> None:
    build, recipe, options = CASES[case]
    model = build().to(device)
    before = {name: id(module) for name, module in model.named_modules()}
    numbers = copy.deepcopy(model.state_dict()) if case < 10 and device == "cpu" else {}
    found = plan(model, recipe, **options)
    assert {name: id(module) for name, module in model.named_modules()} == before
    for name, tensor in model.state_dict().items():
        assert name not in numbers or str(numbers[name]) == str(tensor)
    report = quantize_model(model, found)
    assert (found.bytes_before, found.bytes_after) == (
        report.model_bytes_before, report.model_bytes_after
    )  # fmt: skip
    assert found.coverage == pytest.approx(report.coverage)
    assert found.bits_per_weight == pytest.approx(report.bits_per_weight)
    for candidate in report:
        row = found[candidate.name or "weight"]
        assert (row.status, row.reason) == (candidate.status, candidate.reason)
        if candidate.status == "replaced":
            assert row.scheme == (candidate.scheme or "w8a16") and row.kernel
            assert row.bits_per_weight == candidate.bits_per_weight
            assert (row.sqnr is None) == (device == "meta" or case == 11)
    if build is not mixed:  # a lazy layer and the attention that is split have other names
        everything = {name for row in found for name in (row.name, *row.aliases)}
        assert {name for name, _ in build().named_parameters()} <= everything


def test_sharing_is_told() -> None:
    rows = plan(tied(), "w4")
    assert rows["head"].what.startswith("left: tied to embed.weight") and rows["head"].shares
    assert rows["embed"].what == "stays: Embedding"
    (row,) = plan(tied(), {"embed": "w4", "head": "w4"})
    assert row.aliases == ("head.weight",) and "(also head.weight)" in row.called


def test_odd_numbers_are_found() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight[3, 4], model[0].weight[5, 6] = math.nan, -math.inf
        model[1].weight[7, 8] = -9.0
    rows = plan(model, "w4g32")
    assert [rows[str(i)].nonfinite for i in range(3)] == [2, 0, 0]
    assert [rows[str(i)].outliers for i in range(3)] == [0, 1, 0]
    assert "2 numbers are NaN or infinite" in rows["0"].what
    assert rows["2"].sqnr == pytest.approx(20, abs=4)
    with pytest.raises(ValueError, match="finite"):
        rows.apply()
    assert plan(model, "w4g32", nonfinite="mark").apply().replaced


def test_a_plan_of_what_has_changed_is_refused() -> None:
    model = Model()
    found = plan(model, "w4")
    with pytest.raises(ValueError, match="the plan of another model"):
        quantize_model(Model(), found)
    with pytest.raises(TypeError, match="a plan knows its options"):
        quantize_model(model, found, exclude="head")
    found.apply()
    with pytest.raises(ValueError, match=r"has changed since it was planned: .* plan it again"):
        found.apply()
    with pytest.raises(ValueError, match="strict: 1 layers would be left"):
        plan(tied(), "w4", strict=True).apply()
    with pytest.raises(KeyError, match="no row 'bdy'"):
        found["bdy"]


def test_mistakes_are_those_of_quantize_model() -> None:
    for arguments in ((nn.Linear(2, 2), {"nope": "w4"}), (3, "w4"), (nn.Linear(2, 2), "w9")):
        with pytest.raises((TypeError, ValueError)) as one:
            plan(*arguments)
        with pytest.raises(type(one.value)) as two:
            quantize_model(*arguments)
        assert str(one.value) == str(two.value)


def test_many_layers_are_joined_when_printed_with_their_worst_figures() -> None:
    model = nn.Sequential(*[nn.Linear(16, 16, bias=False) for _ in range(30)])
    found = plan(model, "w4", progress=(told := []).append and (lambda *n: told.append(n)))
    assert told[-1] == (30, 30)
    text = found.to_text(200)
    assert "* (30 parameters)" in text or "*.weight (30 parameters)" in text
    assert f"{min(row.sqnr for row in found):.1f}" in text and len(found.table()) == 30
    assert len(found.to_dict()["sqnr"]) == 30 == str(found._repr_html_()).count("<tr>") - 1


def test_places_are_spread() -> None:
    for length in range(1, 40):
        places = planned.spread(length, 16)
        assert len({*places}) == min(length, 16) and places[-1] == length - 1 and places[0] == 0
    assert expected.sqnr(torch.zeros(3), torch.zeros(3)) is None
