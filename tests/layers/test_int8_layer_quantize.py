"""Numbers into the quantized layer: by quantize, from float layers, and what is refused."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn

from quantization.linear_layer import (
    QWQALinearLayer,
    replace_linear_layers_with_w8a16,
)
from tests.layers.int8_calls import FLOATS, float_linear, relative
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

# ---- quantize and from_float -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_codes_are_those_of_the_torch_expression(dtype: torch.dtype) -> None:
    linear = float_linear(dtype=dtype)
    layer = QWQALinearLayer.from_float(linear)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    weight = linear.weight.detach().to(wide)
    scales = (weight.abs().amax(dim=1) / 127).to(dtype)
    codes = (weight / scales.to(wide)[:, None]).round().clamp(-127, 127).to(torch.int8)
    assert layer.scales.dtype == dtype
    assert torch.equal(layer.scales, scales)
    assert torch.equal(layer.int8_weights, codes)
    assert torch.equal(layer.bias, linear.bias)


def test_the_scale_is_rounded_before_codes_are_made() -> None:
    weight = torch.randn(64, 64)
    layer = QWQALinearLayer(64, 64, dtype=torch.bfloat16)
    layer.quantize(weight)
    after = QWQALinearLayer(64, 64)
    after.quantize(weight)
    after.to(torch.bfloat16)
    assert torch.equal(layer.scales, after.scales)
    errors = [
        (one.int8_weights.float() * one.scales.float()[:, None] - weight).norm()
        for one in (layer, after)
    ]
    assert errors[0] < errors[1]


def test_quantize_takes_another_shape() -> None:
    layer = QWQALinearLayer(8, 4)
    bias = layer.bias.clone()
    layer.quantize(torch.randn(4, 6))
    assert (layer.in_features, layer.out_features) == (6, 4)
    assert torch.equal(layer.bias, bias)
    layer.quantize(torch.randn(9, 5, dtype=torch.float64))
    assert layer.int8_weights.shape == (9, 5) and layer.scales.dtype == torch.float32
    assert torch.equal(layer.bias, torch.zeros(9))
    assert layer(torch.randn(2, 5)).shape == (2, 9)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "parameter"])
def test_quantize_takes_any_layout(layout: str) -> None:
    weight = torch.randn(6, 8)
    given = {
        "transposed": weight.t().contiguous().t(),
        "strided": torch.stack([weight, weight], dim=2)[..., 1],
        "expanded": weight[:1].expand(6, 8),
        "parameter": nn.Parameter(weight),
    }[layout]
    layer = QWQALinearLayer(8, 6)
    layer.quantize(given)
    plain = QWQALinearLayer(8, 6)
    plain.quantize(given.detach().contiguous())
    assert torch.equal(layer.int8_weights, plain.int8_weights)
    assert not layer.scales.requires_grad


@pytest.mark.parametrize("trained", [False, True])
def test_the_bias_follows_the_weights_to_another_device(trained: bool) -> None:
    layer = QWQALinearLayer(4, 3)
    layer.bias = nn.Parameter(layer.bias) if trained else layer.bias
    layer.quantize(torch.empty(3, 4, device="meta"))
    assert layer.bias.is_meta and isinstance(layer.bias, nn.Parameter) == trained
    layer.quantize(torch.eye(3, 4))
    assert torch.equal(layer.bias, torch.zeros(3)) and layer(torch.ones(4)).shape == (3,)


def test_quantize_on_meta_gives_shapes() -> None:
    layer = QWQALinearLayer(8, 4)
    layer.quantize(torch.empty(3, 7, device="meta"))
    assert layer.int8_weights.is_meta and layer.int8_weights.shape == (3, 7)
    assert layer.scales.is_meta and layer.bias.is_meta
    assert layer(torch.empty(2, 7, device="meta")).shape == (2, 3)
    meta = QWQALinearLayer.from_float(float_linear(device="meta", dtype=torch.bfloat16))
    assert meta.scales.is_meta and meta.scales.dtype == torch.bfloat16 and meta.bias.is_meta


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (torch.zeros(4, 8, dtype=torch.int8), TypeError, "int8"),
        (torch.zeros(4, 8, dtype=torch.complex64), TypeError, "complex64"),
        ([[1.0]], TypeError, "weights is a list"),
        (torch.zeros(8), ValueError, r"shape \(8,\); expected \[out_features, in_features\]"),
        (torch.zeros(2, 2, 2), ValueError, r"shape \(2, 2, 2\)"),
        (torch.tensor([[1.0, 2.0], [math.nan, 0.0]]), ValueError, r"weights.*nan.*\[?1, 0"),
        (torch.tensor([[1.0, -math.inf]]), ValueError, r"weights.*inf.*0, 1"),
    ],
)
def test_quantize_refuses_and_leaves_the_layer_alone(
    weights: Any, error: type[Exception], message: str
) -> None:
    layer = QWQALinearLayer(8, 4)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(error, match=message):
        layer.quantize(weights)
    assert (layer.in_features, layer.out_features) == (8, 4)
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


def test_a_row_with_nan_can_be_marked() -> None:
    linear = float_linear()
    with torch.no_grad():
        linear.weight[3, 5] = math.nan
        linear.weight[7, 0] = math.inf
    layer = QWQALinearLayer.from_float(linear, nonfinite="mark")
    y = layer(torch.randn(4, 24))
    bad = torch.isnan(y).all(dim=0)
    assert bad.nonzero().flatten().tolist() == [3, 7]
    assert torch.isfinite(y[:, ~bad]).all()
    with pytest.raises(ValueError, match=r"head\.weight.*nan"):
        QWQALinearLayer.from_float(linear, name="head.weight")


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-40, 1e-38, 3e38])
def test_rows_of_any_size_are_within_half_a_step(size: float) -> None:
    weight = torch.tensor([[1.0, -0.5, 0.25], [0.0, 0.0, 0.0]]) * size
    layer = QWQALinearLayer(3, 2, bias=False)
    layer.quantize(weight)
    assert torch.isfinite(layer.scales).all() and (layer.scales > 0).all()
    step = layer.scales.double()[:, None]
    exact = layer.int8_weights.double() * step
    assert ((exact - weight.double()).abs() <= step / 2 * (1 + 1e-4)).all()


def test_from_float_carries_flag_dtype_and_device() -> None:
    for training in (True, False):
        layer = QWQALinearLayer.from_float(float_linear(bias=False).train(training))
        assert layer.training is training and layer.bias is None


def test_from_float_draws_no_random_numbers() -> None:
    linear = float_linear()
    state = torch.get_rng_state()
    QWQALinearLayer.from_float(linear)
    assert torch.equal(state, torch.get_rng_state())


def test_from_float_leaves_the_source_alone() -> None:
    linear = float_linear()
    before = linear.weight.detach().clone()
    QWQALinearLayer.from_float(linear)
    assert torch.equal(linear.weight, before) and linear.weight.requires_grad


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.LazyLinear(3), "lazy"),
        (nn.Conv2d(1, 1, 1), "Conv2d is not nn.Linear"),
        (nn.Linear(2, 2, dtype=torch.complex64), "complex64"),
        ("linear", "not a torch.nn.Module"),
    ],
)
def test_from_float_says_what_it_cannot_take(module: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        QWQALinearLayer.from_float(module)


class Conv1D(nn.Module):
    """As in transformers."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


def test_from_float_takes_a_transposed_layer() -> None:
    conv = Conv1D(6, 24)
    layer = QWQALinearLayer.from_float(conv)
    assert (layer.in_features, layer.out_features) == (24, 6)
    x = torch.randn(3, 24)
    assert relative(layer(x), conv(x)) < 0.02


@pytest.mark.parametrize("sizes", [(6, 24), (8, 8)])
@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_a_transposed_layer_takes_its_float_checkpoint(
    sizes: tuple[int, int], quantize: bool, assign: bool
) -> None:
    conv = Conv1D(*sizes)
    model = nn.Sequential(conv)
    replace_linear_layers_with_w8a16(model, QWQALinearLayer, [], quantize)
    state = conv.state_dict(prefix="0.")
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        each[0].quantize(torch.zeros(sizes))
        each.load_state_dict(state, assign=assign)
        wanted = QWQALinearLayer.from_float(conv)
        assert torch.equal(each[0].int8_weights, wanted.int8_weights)
        wanted.load_state_dict(conv.state_dict())
        assert torch.equal(each[0].int8_weights, wanted.int8_weights)
    with pytest.raises(RuntimeError, match=r"the checkpoint has shape \(3, 3\)"):
        model.load_state_dict(state | {"0.weight": torch.zeros(3, 3)})


def test_a_subclass_with_a_constructor_and_quantize_of_its_own() -> None:
    class Counting(QWQALinearLayer):
        def __init__(self, in_features, out_features, bias=True, dtype=torch.float32):
            super().__init__(in_features, out_features, bias, dtype)
            self.register_buffer("calls", torch.zeros(()))

        def quantize(self, weights):
            self.calls += 1
            super().quantize(weights)

    layer = Counting.from_float(float_linear())
    assert layer.calls == 1 and type(layer) is Counting
