"""Plans of bits: measured, within their budget, better than the same bits for all."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn

from quantization import Rule, calibrate, divergence, pack_matrix, plan_bits, quantize_model
from tests.tiny_models import random_model
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

CHOICES = ("w2g32a", "w4g32a", "w8g32a")


class Uneven(nn.Module):
    """Layers of which some matter a thousand times as much as others."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 64)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.head = nn.Linear(64, 40, bias=False)
        nn.init.normal_(self.embed.weight, std=0.3)
        if tied:
            self.head.weight = self.embed.weight
        self.gains = (1.0, 0.03, 0.3, 0.003)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer, gain in zip(self.layers, self.gains, strict=True):
            x = x + gain * layer(x)
        return self.head(x)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(40, (6, 16), generator=torch.Generator().manual_seed(5))


def test_it_is_the_best_of_all_plans_by_what_was_measured(ids: torch.Tensor) -> None:
    model = Uneven()
    before = copy.deepcopy(model.state_dict())
    plan = plan_bits(model, target_bits=5.5, choices=CHOICES, batches=ids)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert len(plan.layers) == 5 and plan.measure == "kl"
    found = []
    for names in itertools.product(CHOICES, repeat=5):
        pairs = list(zip(plan.layers, names, strict=True))
        if sum(layer.nbytes[name] for layer, name in pairs) * 8 <= 5.5 * (4 * 4096 + 2560):
            found.append(sum(layer.losses[name] for layer, name in pairs))
    assert plan.predicted == pytest.approx(min(found))
    assert plan.bound <= plan.predicted and plan.bits <= 5.5
    bits = {layer.name: layer.choice.scheme.bits for layer in plan.layers}
    assert bits["layers.0"] > bits["layers.3"] == 2


def test_what_was_measured_is_what_quantizing_gives(ids: torch.Tensor) -> None:
    model = Uneven()
    plan = plan_bits(model, target_bits=6, choices=CHOICES, batches=ids)
    for layer, name in ((plan.layers[1], "w4g32a"), (plan.layers[4], "w2g32a")):
        one = copy.deepcopy(model)
        quantize_model(one, {layer.name: name, "*": None})
        assert divergence(one, model, ids).kl == pytest.approx(layer.losses[name], rel=1e-3)
    whole = copy.deepcopy(model)
    report = quantize_model(whole, plan.recipe)
    assert divergence(whole, model, ids).kl == pytest.approx(plan.measured.kl, rel=1e-3)
    assert len(report.replaced) == 5
    stored = sum(module.packed().nbytes for module in whole.modules() if hasattr(module, "packed"))
    assert stored == plan.nbytes
    uniform = copy.deepcopy(model)
    quantize_model(uniform, "w4g32a")
    same_bytes = sum(layer.nbytes["w4g32a"] for layer in plan.layers)
    plan = plan.at(max_bytes=same_bytes + plan.other_bytes)
    quantize_model(whole := copy.deepcopy(model), plan.recipe)
    assert divergence(whole, model, ids).kl < divergence(uniform, model, ids).kl


def test_budgets_in_bytes_and_by_divergence(ids: torch.Tensor) -> None:
    model = Uneven(tied=True)
    plan = plan_bits(model, max_bytes=20_000, choices=CHOICES, batches=ids)
    assert [layer.name for layer in plan.layers] == [f"layers.{i}" for i in range(4)]  # head tied
    quantize_model(quantized := copy.deepcopy(model), plan.recipe)
    tensors = {t.data_ptr(): t for t in (*quantized.parameters(), *quantized.buffers())}
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert total == plan.nbytes + plan.other_bytes <= 20_000
    most = plan.measured.kl / 3
    closer = plan_bits(model, max_divergence=most, choices=CHOICES, batches=ids)
    assert closer.measured.kl <= most and closer.nbytes > plan.nbytes
    assert closer.nbytes < sum(layer.nbytes["w8g32a"] for layer in closer.layers)
    points = closer.frontier
    assert points[0].cost == sum(layer.nbytes["w2g32a"] for layer in closer.layers)
    assert sorted(points) == list(points)
    assert closer.at(max_bytes=plan.nbytes + plan.other_bytes).measured is None
    assert "layers.3" in str(plan.table()) and "bits a weight" in str(plan)


def test_inputs_of_its_own_methods_and_encoders() -> None:
    model = random_model("bert")
    known = calibrate(model, tokens=(8, 8))
    told = []
    plan = plan_bits(
        model, target_bits=6, choices=[Rule("w3g32a+cols", "sinq_lsq"), "w6g32a:lsq"],
        statistics=known,
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert told[-1][0] == told[-1][1] == 2 * len(plan.layers)
    assert {str(layer.choice) for layer in plan.layers} <= {"w3g32a+cols:sinq_lsq", "w6g32a:lsq"}
    quantize_model(model, plan.recipe, statistics=known)


def test_names_that_others_hold_too_are_told_apart() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 64)))
    plan = plan_bits(model, target_bits=5.5, choices=("w2", "w8"), batches=[torch.randn(9, 64)])
    assert list(plan.recipe) == ["re:^0$", "1.0", "*"]
    report = quantize_model(model, plan.recipe)
    assert [layer.scheme for layer in report] == [str(layer.choice) for layer in plan.layers]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of target_bits, max_bytes and max_divergence"),
        ({"target_bits": 3, "max_bytes": 9}, "give one of target_bits"),
        ({"target_bits": 0}, "a budget is above 0, not 0"),
        ({"target_bits": 1}, r"under the smallest choices they take .* raise the budget"),
        ({"target_bits": 3, "choices": ["w4"]}, "two or more different schemes"),
        ({"max_divergence": 1e-12}, "raise it, or add larger choices"),
        ({"target_bits": 8, "exclude": "*"}, "no linear layer to plan"),
    ],
)
def test_what_cannot_be_is_refused(options: Any, message: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    options = {"choices": ["w2", "w4"], "batches": [torch.randn(9, 64)]} | options
    with pytest.raises(ValueError, match=message):
        plan_bits(model, **options)


def test_an_interrupt_leaves_the_model_whole(ids: torch.Tensor) -> None:
    model, calls = Uneven().train(), []

    def method(weight: Any, scheme: Any, statistics: Any) -> Any:
        calls.append(weight)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return pack_matrix(weight, scheme)

    with pytest.raises(KeyboardInterrupt):
        plan_bits(model, target_bits=5, choices=[Rule("w2", method), "w8"], batches=ids)
    assert model.training and not any(module._forward_hooks for module in model.modules())
