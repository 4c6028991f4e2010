"""Layers that are no nn.Linear: subclasses that are vouched for, and what is said of others."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn
from torch.nn import functional as F

from quantization import (
    PLAIN_LINEAR,
    PackedLinearLayer,
    QWQALinearLayer,
    Target,
    load_quantized,
    quantize_model,
    replace_linear_layers_with_w8a16,
    save_quantized,
)
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


class Plain(nn.Linear):
    """As Falcon's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def model_of() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(Plain(32, 32), Scaled(32, 32), Plain(32, 8, bias=False))
    model[0].note = "kept"
    return model.eval()


NAME = f"{Plain.__module__}.{Plain.__qualname__}"


@pytest.mark.parametrize("given", [Plain, [Plain], {"Plain"}, NAME])
def test_a_subclass_that_the_user_vouches_for_is_replaced(given: Any, tmp_path: Any) -> None:
    model, x = model_of(), torch.randn(3, 32)
    report = quantize_model(model, "w8g32", plain_linear=given)
    assert [c.name for c in report.replaced] == ["0", "2"] and model[0].note == "kept"
    assert "plain_linear=Scaled" in report["1"].reason
    torch.testing.assert_close(
        model[0](x), F.linear(x, model[0].weight, model[0].bias), rtol=1e-4, atol=1e-5
    )
    save_quantized(model, tmp_path / "saved")
    assert torch.equal(load_quantized(tmp_path / "saved", model_of())(x), model(x))
    other = model_of()
    swapped = replace_linear_layers_with_w8a16(
        other, Target.Linear(QWQALinearLayer), plain_linear=given
    )
    assert [c.name for c in swapped.replaced] == ["0", "2"]


def test_a_class_can_be_made_known_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantization.layers.float_layers.PLAIN_LINEAR", {*PLAIN_LINEAR, NAME})
    model = model_of()
    assert len(quantize_model(model, "w4").replaced) == 2
    assert isinstance(model[2], PackedLinearLayer)


def test_falcon_is_known() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.FalconConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=32
    )
    model = transformers.FalconForCausalLM(config)
    report = quantize_model(model, {"lm_head": None, "*": "w8g32"})
    assert len(report.replaced) == 4 and not report.left


@pytest.mark.parametrize("wrong", [nn.Conv1d, 3, [nn.Linear, None]])
def test_what_is_no_class_of_linear_layers_is_refused(wrong: Any) -> None:
    model = model_of()
    with pytest.raises(TypeError, match=r"plain_linear has .*; give subclasses"):
        quantize_model(model, "w4", plain_linear=wrong)
    assert type(model[0]) is Plain


@pytest.mark.parametrize("exclude", [(), "2", ["0", "2"]])
def test_a_warning_where_all_was_left(exclude: Any) -> None:
    with pytest.warns(UserWarning, match=r"no layer was replaced: . is .*plain_linear="):
        quantize_model(model_of(), "w4", exclude=exclude)


def test_no_warning_where_all_was_excluded_or_is_done() -> None:
    model = model_of()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_model(model, "w4", exclude=["0", "1", "2"])
        quantize_model(model, "w4", plain_linear=Plain)
        quantize_model(model, "w4")


def test_other_layers_are_named_with_their_share() -> None:
    model = nn.ModuleDict(
        {
            "fc": nn.Linear(16, 16),
            "point": nn.Conv2d(16, 16, 1, bias=False),
            "wide": nn.Conv1d(16, 16, 3),
            "depthwise": nn.Conv1d(16, 16, 1, groups=16),
            "lstm": nn.LSTM(16, 16),
            "cell": nn.GRUCell(16, 8),
            "both": nn.Bilinear(4, 4, 4),
        }
    )
    report = quantize_model(model, {"cell": None, "*": "w4"}, exclude="both", strict=True)
    assert {c.name for c in report.left} == {"point", "lstm"}
    assert {c.name for c in report.excluded} == {"cell", "both"}
    total = sum(p.numel() for p in model.parameters()) + 272
    assert report["point"].reason.startswith(f"a convolution of kernel 1, {256 / total:.1%} of")
    assert report["lstm"].reason.startswith(f"LSTM with weights of its own, {2048 / total:.1%} of")
    assert report["lstm"].bytes_after == report["lstm"].bytes_before > 0
