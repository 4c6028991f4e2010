"""One layer into another: all that hangs on it comes along, in classes of the user's own too."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
from torch import nn

from quantization.linear_layer import (
    Target,
    replace_linear_layers_with_w8a16,
)
from tests.swap.small_models import TARGET, mlp, snapshot
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

# ---- what is carried over --------------------------------------------------------------------


def test_hooks_work_and_can_still_be_removed() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    calls: list[str] = []
    handles = [
        model[0].register_forward_hook(lambda *args: calls.append("forward")),
        model[0].register_forward_pre_hook(lambda *args: calls.append("pre")),
        model[0].register_full_backward_hook(lambda *args: calls.append("backward")),
        model[0].register_forward_hook(
            lambda module, args, kwargs, output: calls.append("kwargs"), with_kwargs=True
        ),
    ]
    replace_linear_layers_with_w8a16(model, TARGET)
    model(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert calls == ["pre", "forward", "kwargs", "backward"]
    calls.clear()
    for handle in handles:
        handle.remove()
    model(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert calls == []


@pytest.mark.parametrize("training", [True, False])
def test_training_flag_and_attributes(training: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).train(training)
    model[1].train(not training)
    model[0].tag, model[0]._is_hf_initialized = "mine", True
    report = replace_linear_layers_with_w8a16(model, TARGET)
    assert (model[0].training, model[1].training) == (training, not training)
    assert model[0].tag == "mine" and model[0]._is_hf_initialized
    assert "tag" not in vars(model[1])
    assert report.model.training is training


def test_random_numbers_are_not_drawn() -> None:
    model = mlp()
    state = torch.get_rng_state()
    replace_linear_layers_with_w8a16(model, Target.Linear(Course), ["head"])
    replace_linear_layers_with_w8a16(model, TARGET)
    assert torch.equal(state, torch.get_rng_state())


# ---- classes of the user's own ---------------------------------------------------------------


class Course(nn.Module):
    """A layer as courses write it: [1, out] bias buffer, no from_float, no other option."""

    def __init__(self, in_features, out_features, bias=True, dtype=torch.float32):
        super().__init__()
        codes = torch.randint(-128, 127, (out_features, in_features)).to(torch.int8)
        self.register_buffer("int8_weights", codes)
        self.register_buffer("scales", torch.randn(out_features, dtype=dtype))
        if bias:
            self.register_buffer("bias", torch.randn((1, out_features), dtype=dtype))
        else:
            self.bias = None

    def quantize(self, weights):
        wide = weights.clone().to(torch.float32)
        self.scales = (wide.abs().max(dim=-1).values / 127).to(weights.dtype)
        self.int8_weights = torch.round(wide / self.scales.unsqueeze(1)).to(torch.int8)

    def forward(self, x):
        y = nn.functional.linear(x, self.int8_weights.to(x.dtype)) * self.scales
        return y if self.bias is None else y + self.bias


class ParameterBias(Course):
    def __init__(self, in_features, out_features, bias=True, dtype=torch.float32):
        super().__init__(in_features, out_features, False, dtype)
        del self.bias
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype)) if bias else None


class BiasLess(Course):
    def __init__(self, in_features, out_features, bias=True, dtype=torch.float32):
        super().__init__(in_features, out_features, False, dtype)


@pytest.mark.parametrize("cls", [Course, ParameterBias])
def test_a_class_of_the_users_own(cls: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4, bias=False))
    x = torch.randn(3, 16)
    wanted, bias = model(x), model[0].bias.detach().clone()
    for target in (Target.Linear(cls), cls):
        report = replace_linear_layers_with_w8a16(model, target)
        assert type(model[0]) is cls and len(report) == 2
        assert torch.equal(model[0].bias.flatten(), bias)
        assert isinstance(model[0].bias, nn.Parameter) == (cls is ParameterBias)
        assert float(((model(x) - wanted).norm() / wanted.norm()).detach()) < 0.03
    assert report.coverage == pytest.approx((128 + 32) / (128 + 32 + 8))


def test_a_class_that_lost_its_bias() -> None:
    model = mlp()
    before = snapshot(model)
    with pytest.raises(
        TypeError, match="BiasLess was built with bias=True and has no fitting bias"
    ):
        replace_linear_layers_with_w8a16(model, Target.Linear(BiasLess))
    assert snapshot(model) == before


def test_a_class_of_the_users_own_on_meta() -> None:
    model = nn.Sequential(nn.Linear(16, 8, device="meta"))
    replace_linear_layers_with_w8a16(model, Target.Linear(Course))
    assert model[0].int8_weights.is_meta and model[0].bias.is_meta


def test_hooks_of_the_new_layer_come_before_those_carried_over() -> None:
    calls: list[str] = []

    class Hooked(Course):
        def __init__(self, in_features, out_features, bias=True, dtype=torch.float32):
            super().__init__(in_features, out_features, bias, dtype)
            self.register_forward_hook(lambda *args: calls.append("new"))

    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_hook(lambda *args: calls.append("old"))
    replace_linear_layers_with_w8a16(model, Hooked)
    model(torch.randn(1, 4))
    assert calls == ["new", "old"]


def test_layers_of_one_weight_that_do_not_quantize_alike_share_nothing() -> None:
    class Random(Course):
        def quantize(self, weights):
            self.int8_weights = torch.randint_like(self.int8_weights, -127, 127)

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    replace_linear_layers_with_w8a16(model, Random)
    assert model[0].int8_weights is not model[1].int8_weights
