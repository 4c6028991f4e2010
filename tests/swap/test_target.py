"""Targets: what may be put in a layer's place."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn

from quantization.linear_layer import (
    QWQALinearLayer,
    Target,
    replace_linear_layers_with_w8a16,
    target_class_from,
)
from tests.swap.small_models import TARGET, mlp, snapshot
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

# ---- the target ------------------------------------------------------------------------------


def test_target_is_a_value() -> None:
    assert Target.Linear(QWQALinearLayer) == TARGET and hash(TARGET) == hash(copy.copy(TARGET))
    assert isinstance(TARGET, Target)
    assert pickle.loads(pickle.dumps(TARGET)) == TARGET
    assert repr(TARGET).startswith("Target.Linear(cls=")
    with pytest.raises(AttributeError):
        TARGET.cls = nn.Linear
    match TARGET:
        case Target.Linear(cls):
            assert cls is QWQALinearLayer
        case _:
            pytest.fail("no match")


def test_target_class_from() -> None:
    assert target_class_from(TARGET) is target_class_from(QWQALinearLayer) is QWQALinearLayer


class NoQuantize(nn.Module):
    def __init__(self, in_features, out_features, bias, dtype): ...


class NoDtype(nn.Module):
    def __init__(self, in_features, out_features, bias=True): ...

    def quantize(self, weights): ...


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (nn.Linear, r"needs a method quantize\(weights\)"),
        (NoQuantize, r"needs a method quantize\(weights\)"),
        (NoDtype, "must take the keywords in_features, out_features, bias, dtype"),
        (int, "derived from torch.nn.Module"),
        ("QWQALinearLayer", r"give Target\.Linear\(QWQALinearLayer\)"),
        (None, r"give Target\.Linear\(QWQALinearLayer\)"),
        (Target, "derived from torch.nn.Module"),
        (QWQALinearLayer(2, 2), r"give Target\.Linear"),
    ],
)
def test_targets_of_a_wrong_kind(target: Any, message: str) -> None:
    model = mlp()
    before = snapshot(model)
    with pytest.raises(TypeError, match=message):
        replace_linear_layers_with_w8a16(model, target, [])
    assert snapshot(model) == before
