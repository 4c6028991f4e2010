"""A replacement is done as a whole or not at all."""

from __future__ import annotations

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from quantization.linear_layer import (
    QWQALinearLayer,
    Target,
    replace_linear_layers_with_w8a16,
)
from tests.swap.small_models import TARGET, mlp, snapshot
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

# ---- all or nothing --------------------------------------------------------------------------


def exploding(error: BaseException) -> type[QWQALinearLayer]:
    """A layer class whose third quantize fails."""

    class Exploding(QWQALinearLayer):
        built = 0

        def quantize(self, weights, **options):
            Exploding.built += 1
            if Exploding.built == 3:
                raise error
            super().quantize(weights, **options)

    return Exploding


@pytest.mark.parametrize(
    "error", [RuntimeError("no"), MemoryError(), KeyboardInterrupt(), SystemExit(3)], ids=repr
)
def test_an_error_on_the_way_leaves_the_model_as_it_was(error: BaseException) -> None:
    model = mlp()
    before = snapshot(model)
    with pytest.raises(type(error)) as caught:
        replace_linear_layers_with_w8a16(model, Target.Linear(exploding(error)), [])
    assert caught.value is error
    assert "while replacing head; the model was not changed" in error.__notes__
    assert snapshot(model) == before


def test_a_nan_in_the_last_layer_leaves_the_model_as_it_was() -> None:
    model = mlp()
    with torch.no_grad():
        model["head"].weight[2, 7] = math.nan
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"head\.weight.*nan.*2, 7"):
        replace_linear_layers_with_w8a16(model, TARGET, [])
    assert snapshot(model) == before
    replace_linear_layers_with_w8a16(model, TARGET, [], nonfinite="mark")
    y = model["head"](torch.randn(3, 16))
    assert torch.isnan(y[:, 2]).all() and torch.isfinite(y[:, [0, 1, 3]]).all()


class Interrupting(dict):
    """A mapping whose n-th write is interrupted, once."""

    writes_left = 10**9

    def __setitem__(self, key: Any, value: Any) -> None:
        Interrupting.writes_left -= 1
        if Interrupting.writes_left == 0:
            raise KeyboardInterrupt
        super().__setitem__(key, value)


@pytest.mark.parametrize("write", [1, 2, 3])
def test_an_interrupt_between_assignments_takes_them_back(write: int) -> None:
    model = mlp()
    for module in model.modules():
        module.__dict__["_modules"] = Interrupting(module._modules)
    before = snapshot(model)
    Interrupting.writes_left = write
    try:
        with pytest.raises(KeyboardInterrupt):
            replace_linear_layers_with_w8a16(model, TARGET, [])
    finally:
        Interrupting.writes_left = 10**9
    assert snapshot(model) == before
    assert len(replace_linear_layers_with_w8a16(model, TARGET, []).replaced) == 3
