"""Which float layers can be quantized, and why others cannot."""

from __future__ import annotations

import doctest
import re
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from quantization.layers import float_layers
from quantization.layers.float_layers import float_parts, is_conv1d, looks_linear, why_left
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(float_layers).failed == 0


def with_forward(linear: nn.Linear) -> nn.Linear:
    linear.forward = lambda x: x  # type: ignore[method-assign]
    return linear


def with_extra(kind: str) -> nn.Linear:
    linear = nn.Linear(2, 2)
    if kind == "module":
        linear.adapter = nn.Linear(2, 2)
    elif kind == "parameter":
        linear.gate = nn.Parameter(torch.zeros(2))
    elif kind == "buffer":
        linear.register_buffer("smooth", torch.zeros(2))
    else:
        linear.register_load_state_dict_pre_hook(lambda *args: None)
    return linear


def with_weight(value: Any) -> nn.Linear:
    linear = nn.Linear(2, 2)
    linear.weight = nn.Parameter(value, requires_grad=False)
    return linear


def with_attributes(**values: Any) -> nn.Linear:
    linear = nn.Linear(2, 2)
    for name, value in values.items():
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
            delattr(linear, name)
        setattr(linear, name, value)
    return linear


class LoraLinear(nn.Linear):
    """As in loralib: adds its adapter in forward."""


class Tagged(torch.Tensor):
    pass


class Scaled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


REASONS: dict[str, tuple[Callable[[], Any], str]] = {
    "mha": (lambda: nn.MultiheadAttention(4, 2).out_proj, "MultiheadAttention reads this weight"),
    "lazy": (lambda: nn.LazyLinear(2), "lazy: it has no weight yet"),
    "scripted": (
        lambda: torch.jit.script(nn.Sequential(nn.Linear(2, 2))),
        "TorchScript: .* replace them before it is scripted",
    ),
    "traced": (lambda: torch.jit.trace(nn.Linear(2, 2), torch.zeros(2)), "TorchScript"),
    "subclass": (lambda: LoraLinear(2, 2), "LoraLinear is a subclass of nn.Linear"),
    "weight_norm": (
        lambda: torch.nn.utils.weight_norm(nn.Linear(2, 2)),
        r"weight_norm \(weight\): torch.nn.utils.remove_weight_norm",
    ),
    "spectral_norm": (
        lambda: torch.nn.utils.spectral_norm(nn.Linear(2, 2)),
        r"spectral_norm \(weight\): torch.nn.utils.remove_spectral_norm",
    ),
    "new weight_norm": (
        lambda: parametrizations.weight_norm(nn.Linear(2, 2)),
        r"parametrized \(weight\).*remove_parametrizations",
    ),
    "parametrized": (
        lambda: parametrize.register_parametrization(nn.Linear(2, 2), "bias", Scaled()) or 0,
        r"parametrized \(bias\)",
    ),
    "pruned": (
        lambda: prune.random_unstructured(nn.Linear(2, 2), "weight", 0.5),
        r"pruned \(weight\): torch.nn.utils.prune.remove\(layer, 'weight'\)",
    ),
    "pruned bias": (lambda: prune.identity(nn.Linear(2, 2), "bias"), r"pruned \(bias\)"),
    "complex": (lambda: nn.Linear(2, 2, dtype=torch.complex64), "complex64"),
    "integer": (lambda: with_weight(torch.zeros(2, 2, dtype=torch.int8)), "weight is torch.int8"),
    "float8": (
        lambda: with_weight(torch.zeros(2, 2).to(torch.float8_e4m3fn)),
        "float8_e4m3fn.*float32, bfloat16, float16, float64 can be converted",
    ),
    "sparse": (lambda: with_weight(torch.eye(2).to_sparse()), "sparse_coo"),
    "tensor subclass": (lambda: with_weight(torch.zeros(2, 2).as_subclass(Tagged)), "Tagged"),
    "hooked forward": (lambda: with_forward(nn.Linear(2, 2)), "forward was replaced"),
    "extra module": (lambda: with_extra("module"), "more than a weight and a bias: adapter"),
    "extra parameter": (lambda: with_extra("parameter"), "a bias: gate"),
    "extra buffer": (lambda: with_extra("buffer"), "a bias: smooth"),
    "state hook": (lambda: with_extra("state hook"), "hooks on its state dict"),
    "wrong shape": (lambda: with_weight(torch.zeros(2, 2, 1)), r"shape \(2, 2, 1\)"),
    "wrong outputs": (lambda: with_weight(torch.zeros(3, 2)), "but it has 2 outputs"),
    "no weight": (lambda: with_attributes(weight=None), "it has no weight"),
    "plain tensor": (
        lambda: with_attributes(weight=torch.zeros(2, 2)),
        "weight is not a Parameter",
    ),
    "wrong bias": (
        lambda: with_attributes(bias=nn.Parameter(torch.zeros(3))),
        r"bias has shape \(3,\), expected \(2,\)",
    ),
    "not linear": (lambda: nn.Conv1d(1, 1, 1), "Conv1d is not nn.Linear"),
}


@pytest.mark.parametrize("case", REASONS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_each_reason(case: str) -> None:
    build, message = REASONS[case]
    module = build()
    reason = why_left(module)
    assert reason is not None and re.search(message, reason), reason
    with pytest.raises(TypeError, match="cannot be converted"):
        float_parts(module)
    if isinstance(module, nn.Linear):
        assert looks_linear(module)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_remedies_help() -> None:
    linear = torch.nn.utils.weight_norm(nn.Linear(2, 2))
    assert why_left(torch.nn.utils.remove_weight_norm(linear)) is None
    linear = prune.random_unstructured(nn.Linear(2, 2), "weight", 0.5)
    assert why_left(prune.remove(linear, "weight")) is None
    linear = parametrizations.orthogonal(nn.Linear(2, 2))
    parametrize.remove_parametrizations(linear, "weight")
    assert why_left(linear) is None
    lazy = nn.LazyLinear(3)
    lazy(torch.zeros(1, 2))
    assert why_left(lazy) is None


def test_what_can_be_converted() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for bias in (True, False):
            assert why_left(nn.Linear(3, 2, bias=bias, dtype=dtype)) is None
    assert why_left(nn.Linear(3, 2, device="meta")) is None
    frozen = nn.Linear(3, 2).requires_grad_(False)
    frozen.register_forward_hook(lambda *args: None)
    assert why_left(frozen) is None


def test_look_alikes() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 3, 2
            self.weight = nn.Parameter(torch.zeros(2, 3))

    assert looks_linear(Mine()) and "Mine is not nn.Linear" in why_left(Mine())
    for module in (nn.Embedding(3, 2), nn.Bilinear(2, 2, 2), nn.LayerNorm(3), nn.Conv2d(1, 1, 1)):
        assert not looks_linear(module)


def test_conv1d_of_transformers() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    module = conv1d(6, 4)
    assert is_conv1d(module) and looks_linear(module) and why_left(module) is None
    weight, bias = float_parts(module)
    assert weight.shape == (6, 4) and bias.shape == (6,)
    assert torch.equal(weight, module.weight.t())
    prune.identity(module, "weight")
    assert looks_linear(module) and "pruned" in why_left(module)
