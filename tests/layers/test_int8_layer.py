"""The quantized layer: what it holds, what it computes, what it refuses, how it travels."""

from __future__ import annotations

import copy
import doctest
import hashlib
import io
import math
import os
import pickle
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn
from torch.nn import functional as F

from quantization import linear_layer
from quantization.linear_layer import (
    QWQALinearLayer,
    name_for_quantized_weight_buffer,
    replace_linear_layers_with_w8a16,
)
from quantization.swap import target

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def float_linear(**options: Any) -> nn.Linear:
    return nn.Linear(24, 10, **options)


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("module", [linear_layer, target], ids=lambda module: module.__name__)
def test_examples_in_the_docstrings(module: Any) -> None:
    assert doctest.testmod(module).failed == 0


# ---- construction ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_fresh_layer_works_right_away(dtype: torch.dtype, bias: bool) -> None:
    layer = QWQALinearLayer(16, 32, bias=bias, dtype=dtype)
    x = torch.randn(4, 16).to(dtype)
    y = layer(x)
    assert (y.shape, y.dtype) == ((4, 32), dtype)
    exact = F.linear(x.double(), layer.int8_weights.double() * layer.scales.double()[:, None])
    exact = exact if layer.bias is None else exact + layer.bias.double()
    assert relative(y, exact) < 8 * torch.finfo(dtype).eps


def test_a_fresh_layer_draws_the_numbers_of_nn_linear() -> None:
    torch.manual_seed(3)
    plain = nn.Linear(16, 32)
    torch.manual_seed(3)
    layer = QWQALinearLayer(16, 32)
    assert torch.equal(layer.bias, plain.bias)
    assert relative(layer.weight, plain.weight) < 0.01


def test_it_is_a_linear_layer_of_buffers() -> None:
    layer = QWQALinearLayer(16, 32, True, torch.bfloat16)
    assert isinstance(layer, nn.Linear)
    assert not list(layer.parameters())
    kinds = {name: (b.dtype, tuple(b.shape)) for name, b in layer.named_buffers()}
    assert kinds == {
        "int8_weights": (torch.int8, (32, 16)),
        "scales": (torch.bfloat16, (32,)),
        "bias": (torch.bfloat16, (32,)),
    }
    assert QWQALinearLayer(16, 32, bias=False).bias is None
    assert layer.footprint == 32 * 16 + 2 * 32 + 2 * 32


@pytest.mark.parametrize(("n_in", "n_out"), [(0, 3), (3, 0), (0, 0), (1, 1)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_empty_and_tiny_sizes(n_in: int, n_out: int) -> None:
    layer = QWQALinearLayer(n_in, n_out)
    y = layer(torch.randn(5, n_in))
    assert y.shape == (5, n_out)
    assert layer(torch.randn(0, n_in)).shape == (0, n_out)
    if n_in == 0:
        assert torch.equal(y, layer.bias.expand(5, n_out))


def test_bad_arguments_of_the_constructor() -> None:
    with pytest.raises(TypeError, match="dtype int8; allowed are float32"):
        QWQALinearLayer(4, 4, dtype=torch.int8)
    with pytest.raises(TypeError, match="complex64"):
        QWQALinearLayer(4, 4, dtype=torch.complex64)
    with pytest.raises(ValueError, match="in_features is -1; it must be 0 or more"):
        QWQALinearLayer(-1, 4)
    for sizes in ((2.5, 4), ("2", 4), (True, 4)):
        with pytest.raises(TypeError, match="in_features must be an integer, not"):
            QWQALinearLayer(*sizes)
    with pytest.raises(TypeError, match="out_features must be an integer, not None"):
        QWQALinearLayer(4, None)


def test_reset_parameters_and_to_empty() -> None:
    layer = QWQALinearLayer(8, 4, device="meta")
    assert layer.scales.is_meta and layer(torch.randn(2, 8, device="meta")).shape == (2, 4)
    layer.to_empty(device="cpu").reset_parameters()
    assert torch.isfinite(layer(torch.randn(2, 8))).all()
    assert 0 < layer.weight.abs().max() <= 1 / math.sqrt(8) * 1.01


def test_the_default_device_is_followed() -> None:
    with torch.device("meta"):
        assert QWQALinearLayer(8, 4).int8_weights.is_meta


def test_printed_form() -> None:
    assert repr(QWQALinearLayer(1000, 32, bias=False, dtype=torch.float16)) == (
        "QWQALinearLayer(in_features=1000, out_features=32, bias=False, dtype=float16, "
        "weights=int8 per row, 32,064 bytes)"
    )
    assert "bytes" in repr(QWQALinearLayer(10, 3, device="meta"))


def test_name_of_the_buffer() -> None:
    assert name_for_quantized_weight_buffer(torch.int8) == "int8_weights"
    assert name_for_quantized_weight_buffer("uint4") == "uint4_weights"
    with pytest.raises(TypeError, match="int64"):
        name_for_quantized_weight_buffer(torch.int64)


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


# ---- forward ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24,), (0, 24), (3, 24), (2, 3, 24), (2, 1, 3, 24)])
def test_inputs_of_any_rank(shape: tuple[int, ...]) -> None:
    layer = QWQALinearLayer.from_float(float_linear())
    x = torch.randn(shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], 10)
    torch.testing.assert_close(y, F.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)


def test_non_contiguous_input() -> None:
    layer = QWQALinearLayer.from_float(float_linear())
    x = torch.randn(24, 5).t()
    assert torch.equal(layer(x), layer(x.contiguous()))
    x = torch.randn(5, 48)[:, ::2]
    assert torch.equal(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_result_has_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    layer = QWQALinearLayer.from_float(float_linear())
    x = torch.randn(3, 24)
    assert layer(x.to(dtype)).dtype == dtype
    assert relative(layer(x.to(dtype)), layer(x)) < 4 * torch.finfo(dtype).eps + 1e-6 or (
        dtype in (torch.float16, torch.bfloat16)
        and relative(layer(x.to(dtype)), layer(x.to(dtype).float())) < 4 * torch.finfo(dtype).eps
    )


def test_half_precision_near_its_limit() -> None:
    """931.5 became inf where the scale is applied after a half precision sum (ao#1662)."""
    linear = nn.Linear(4096, 4, bias=False)
    nn.init.constant_(linear.weight, 0.25)
    layer = QWQALinearLayer.from_float(linear.half())
    y = layer(torch.full((1, 4096), 60.0, dtype=torch.float16))
    assert torch.allclose(y.float(), torch.tensor(4096 * 60 * 0.25), rtol=2e-3)


def test_wrong_inputs_are_refused() -> None:
    layer = QWQALinearLayer.from_float(float_linear())
    with pytest.raises((RuntimeError, ValueError), match="23"):
        layer(torch.randn(3, 23))
    with pytest.raises((RuntimeError, TypeError, NotImplementedError)):
        layer(torch.zeros(3, 24, dtype=torch.int64))
    with pytest.raises((RuntimeError, TypeError, AttributeError)):
        layer([1.0] * 24)


def test_gradients_flow_to_the_input() -> None:
    layer = QWQALinearLayer.from_float(float_linear())
    x = torch.randn(3, 24, requires_grad=True)
    layer(x).square().sum().backward()
    y = torch.autograd.grad(F.linear(x, layer.weight, layer.bias).square().sum(), x)[0]
    torch.testing.assert_close(x.grad, y, rtol=1e-4, atol=1e-5)
    double = QWQALinearLayer.from_float(float_linear(dtype=torch.float64))
    x = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(double, (x,))


def test_a_bias_can_be_trained() -> None:
    layer = QWQALinearLayer.from_float(float_linear())
    layer.bias = nn.Parameter(layer.bias.clone())
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    layer(torch.randn(3, 24)).sum().backward()
    assert torch.allclose(layer.bias.grad, torch.full((10,), 3.0))
    assert set(layer.state_dict()) == {"int8_weights", "scales", "bias"}
    copy.deepcopy(layer)(torch.randn(3, 24))


@pytest.mark.parametrize("training", [True, False])
def test_modes_of_torch(training: bool) -> None:
    layer = QWQALinearLayer.from_float(float_linear()).train(training)
    x = torch.randn(3, 24)
    wanted = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), wanted)
    with torch.inference_mode():
        assert torch.equal(layer(x), wanted)
        made_inside = QWQALinearLayer.from_float(float_linear())
    made_inside(x.clone().requires_grad_()).sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16 == float_linear()(x).dtype
    assert relative(y, wanted) < 0.01


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_makes_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(QWQALinearLayer(8, 16), nn.ReLU(), QWQALinearLayer(16, 4, bias=False))
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    for tokens in (1, 3, 7):
        x = torch.randn(tokens, 8)
        torch.testing.assert_close(compiled(x), model(x))
    x = torch.randn(2, 8, requires_grad=True)
    compiled(x).sum().backward()
    wanted = torch.autograd.grad(model(x).sum(), x)[0]
    torch.testing.assert_close(x.grad, wanted)


def test_tracing_export_and_function_transforms() -> None:
    model = nn.Sequential(QWQALinearLayer(8, 16), nn.ReLU(), QWQALinearLayer(16, 4))
    x = torch.randn(3, 8)
    wanted = model(x)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), wanted)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), wanted)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), wanted)
    torch.testing.assert_close(torch.vmap(model)(x), wanted)
    torch.testing.assert_close(
        torch.func.functional_call(model, dict(model.named_buffers()), x), wanted
    )
    got = torch.func.grad(lambda x: model(x).sum())(x)
    asked = x.clone().requires_grad_()
    torch.testing.assert_close(got, torch.autograd.grad(model(asked).sum(), asked)[0])
    again = torch.utils.checkpoint.checkpoint(model, asked, use_reentrant=False)
    torch.testing.assert_close(again, wanted)


# ---- the weight ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_weight_is_what_the_codes_stand_for(dtype: torch.dtype) -> None:
    layer = QWQALinearLayer.from_float(float_linear(dtype=dtype))
    exact = layer.int8_weights.double() * layer.scales.double()[:, None]
    assert layer.weight.dtype == dtype and layer.weight.device == layer.scales.device
    assert torch.equal(layer.weight, exact.to(dtype))
    assert not layer.weight.requires_grad


def test_weight_cannot_be_assigned() -> None:
    layer = QWQALinearLayer(4, 4)
    for value in (torch.zeros(4, 4), nn.Parameter(torch.zeros(4, 4)), None):
        with pytest.raises(AttributeError, match=r"call layer\.quantize\(weights\)"):
            layer.weight = value
    with pytest.raises(AttributeError, match="cannot be assigned"):
        layer.register_parameter("weight", nn.Parameter(torch.zeros(4, 4)))
    assert "weight" not in layer.state_dict()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_back_to_float(dtype: torch.dtype, bias: bool) -> None:
    layer = QWQALinearLayer.from_float(float_linear(dtype=dtype, bias=bias)).eval()
    linear = layer.dequantize()
    assert type(linear) is nn.Linear and not linear.training
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in linear.parameters())
    assert torch.equal(linear.weight, layer.weight) and linear.weight.dtype == dtype
    assert (linear.bias is not None) == bias
    with torch.no_grad():
        linear.weight.zero_()
        if bias:
            assert torch.equal(linear.bias, layer.bias)
            linear.bias.fill_(3.0)
    assert layer.weight.abs().sum() > 0 and (not bias or (layer.bias < 1).all())


def test_bytes_and_bits() -> None:
    layer = QWQALinearLayer(64, 32, dtype=torch.bfloat16)
    assert (layer.nbytes, layer.footprint) == (32 * 64 + 2 * 32, 32 * 64 + 4 * 32)
    assert layer.bits_per_weight == 8 + 16 / 64
    assert QWQALinearLayer(64, 32, device="meta").nbytes == 32 * 64 + 4 * 32


# ---- dtypes and copies -----------------------------------------------------------------------


def test_moves_never_touch_the_codes() -> None:
    layer = QWQALinearLayer.from_float(float_linear())
    codes, x = layer.int8_weights.clone(), torch.randn(3, 24)
    wanted = layer(x)
    for move, dtype in (
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.half(), torch.float16),
        (lambda m: m.double(), torch.float64),
    ):
        moved = move(copy.deepcopy(layer))
        assert torch.equal(moved.int8_weights, codes)
        assert moved.scales.dtype == moved.bias.dtype == moved.weight.dtype == dtype
        assert relative(moved(x.to(dtype)), wanted) < 0.01
    assert layer.to("meta").int8_weights.is_meta


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "share_memory", "module"])
def test_copies_compute_the_same(way: str, tmp_path: Path) -> None:
    layer = QWQALinearLayer.from_float(float_linear()).eval()
    x = torch.randn(3, 24)
    wanted = layer(x)
    if way == "deepcopy":
        other = copy.deepcopy(layer)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    elif way == "torch.save":
        torch.save(layer.state_dict(), tmp_path / "state.pt")
        other = QWQALinearLayer(24, 10)
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    elif way == "share_memory":
        other = layer.share_memory()
        assert other.int8_weights.is_shared()
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert torch.equal(other(x), wanted)


def test_safetensors_round_trip(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    layer = QWQALinearLayer.from_float(float_linear(dtype=torch.bfloat16))
    safetensors.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = QWQALinearLayer(24, 10, dtype=torch.bfloat16)
    other.load_state_dict(safetensors.load_file(tmp_path / "layer.safetensors"))
    x = torch.randn(3, 24, dtype=torch.bfloat16)
    assert torch.equal(other(x), layer(x))


def test_forward_changes_no_buffer() -> None:
    layer = QWQALinearLayer.from_float(float_linear())
    before = {key: (v.data_ptr(), v.clone()) for key, v in layer.state_dict().items()}
    layer(torch.randn(7, 24))
    after = layer.state_dict()
    assert all(
        after[k].data_ptr() == p and torch.equal(after[k], v) for k, (p, v) in before.items()
    )
    assert set(after) == set(before)


# ---- loading ---------------------------------------------------------------------------------


def loaded(state: dict[str, Any], **options: Any) -> tuple[QWQALinearLayer, Any]:
    layer = QWQALinearLayer(24, 10)
    return layer, layer.load_state_dict(state, **options)


@pytest.mark.parametrize("assign", [False, True])
def test_a_float_checkpoint_is_quantized(assign: bool) -> None:
    linear = float_linear()
    state = linear.state_dict()
    layer, result = loaded(state, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    wanted = QWQALinearLayer.from_float(linear)
    assert torch.equal(layer.int8_weights, wanted.int8_weights)
    assert torch.equal(layer.scales, wanted.scales) and torch.equal(layer.bias, wanted.bias)
    assert set(state) == {"weight", "bias"}  # the caller's dict is the caller's


def test_a_float_checkpoint_of_another_dtype() -> None:
    linear = float_linear(dtype=torch.bfloat16)
    kept, _ = loaded(linear.state_dict())
    assert kept.scales.dtype == torch.float32
    taken, _ = loaded(linear.state_dict(), assign=True)
    assert taken.scales.dtype == taken.bias.dtype == torch.bfloat16


def test_assign_brings_a_meta_layer_to_life() -> None:
    source = QWQALinearLayer.from_float(float_linear())
    for state in (source.state_dict(), float_linear().state_dict()):
        layer = QWQALinearLayer(24, 10, device="meta")
        layer.load_state_dict(state, assign=True)
        assert torch.isfinite(layer(torch.randn(2, 24))).all()
    with pytest.warns(UserWarning, match="no-op"):
        QWQALinearLayer(24, 10, device="meta").load_state_dict(source.state_dict())


def test_parameters_of_a_float_checkpoint_stay_behind() -> None:
    layer, _ = loaded(float_linear().state_dict(keep_vars=True), assign=True)
    assert not list(layer.parameters())


def test_missing_and_unexpected_keys_are_those_of_nn_linear() -> None:
    bias = torch.zeros(10)
    for state in ({"bias": bias}, {"weight": torch.ones(10, 24)}, {}):
        mine, plain = QWQALinearLayer(24, 10), nn.Linear(24, 10)
        got = mine.load_state_dict(state, strict=False)
        asked = plain.load_state_dict(state, strict=False)
        native = {"int8_weights": "weight", "scales": "weight"}
        assert {native.get(key, key) for key in got.missing_keys} == set(asked.missing_keys)
        if asked.missing_keys:
            with pytest.raises(RuntimeError, match="Missing key"):
                mine.load_state_dict(state)
    state = float_linear().state_dict() | {"extra": bias}
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "extra"'):
        loaded(state)
    assert loaded(state, strict=False)[1].unexpected_keys == ["extra"]
    without = QWQALinearLayer(24, 10, bias=False)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "bias"'):
        without.load_state_dict(float_linear().state_dict())


INT8 = torch.ones(10, 24, dtype=torch.int8)
SCALES = torch.ones(10)
BIAS = {"bias": torch.zeros(10)}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": torch.zeros(10, 23)}, r"size mismatch for fc.weight.*\(10, 23\).*\(10, 24\)"),
        ({"weight": INT8}, "fc.weight has dtype int8"),
        ({"weight": torch.full((10, 24), math.nan)}, "fc.weight.*nan"),
        ({"int8_weights": torch.ones(10, 24), "scales": SCALES}, "float32; codes are int8"),
        ({"int8_weights": INT8, "scales": SCALES.long()}, "fc.scales has dtype int64"),
        ({"int8_weights": INT8[:3], "scales": SCALES}, "size mismatch for fc.int8_weights"),
        ({"int8_weights": INT8, "scales": SCALES[:3]}, "size mismatch for fc.scales"),
        ({"int8_weights": INT8, "scales": SCALES[:, None]}, "size mismatch for fc.scales"),
        ({"int8_weights": INT8}, "without fc.scales"),
        ({"scales": SCALES}, "without fc.int8_weights"),
        ({"int8_weights": INT8, "scales": SCALES, "weight": SCALES}, "keep one of them"),
        ({"int8_weights": INT8, "scales": SCALES, "bias": INT8[:, 0]}, "fc.bias has dtype int8"),
        ({"int8_weights": "codes", "scales": SCALES}, "fc.int8_weights is a str"),
    ],
)
def test_a_checkpoint_that_does_not_fit(
    state: dict[str, Any], message: str, strict: bool, assign: bool
) -> None:
    model = nn.ModuleDict({"fc": QWQALinearLayer(24, 10)})
    before = copy.deepcopy(model.state_dict())
    full = {f"fc.{key}": value for key, value in (BIAS | state).items()}
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(full, strict=strict, assign=assign)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


# ---- processes, threads and determinism ------------------------------------------------------


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    layer = QWQALinearLayer(200, 150)
    x = torch.randn(9, 200)
    y = layer(x)
    assert all(torch.equal(layer(x[i : i + 1])[0], y[i]) for i in range(9))


def test_threads_of_python_may_share_a_layer() -> None:
    layer = QWQALinearLayer(200, 150)
    x = torch.randn(8, 200)
    wanted = layer(x)
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda _: layer(x), range(120)))
    assert all(torch.equal(result, wanted) for result in results)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_can_run_the_layer() -> None:
    """torch's own parallel operators hang there; the child compares by NumPy for that reason."""
    layer = QWQALinearLayer(512, 512)
    x = torch.randn(64, 512).bfloat16()
    wanted = layer(x).view(torch.int16).numpy().copy()
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        os._exit(0 if (layer(x).view(torch.int16).numpy() == wanted).all() else 1)
    assert os.waitpid(child, 0)[1] == 0


def digest(layer: QWQALinearLayer) -> dict[str, str]:
    return {
        name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in layer.state_dict().items()
    }


def test_no_use_of_a_layer_changes_its_buffers(tmp_path: Path) -> None:
    """Forward in every form, training, saving, copying, compiling: the same bytes as before."""
    layer = QWQALinearLayer.from_float(float_linear(dtype=torch.bfloat16))
    before = digest(layer)
    for tokens in (1, 5, 40):
        layer(torch.randn(tokens, 24, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    assert digest(copy.deepcopy(layer)) == before
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compiled(torch.randn(3, 24, dtype=torch.bfloat16))
    assert digest(layer) == before
    again = QWQALinearLayer(24, 10, dtype=torch.bfloat16)
    again.load_state_dict(torch.load(tmp_path / "layer.pt"))
    assert digest(again) == before


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_forward_keeps_no_float_copy_of_the_weight() -> None:
    layer = QWQALinearLayer(4096, 4096)  # 16 MiB of codes, 64 MiB as floats

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    with torch.no_grad():
        for tokens in (1, 40):
            layer(torch.randn(tokens, 4096))
        before = resident()
        for tokens in (1, 40, 40, 1):
            layer(torch.randn(tokens, 4096))
    assert resident() - before < 4 << 20


def test_the_kernel_is_told_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", logger="quantization"):
        layer = QWQALinearLayer.from_float(float_linear(), name="head.weight")
    assert str(layer.kernel(128)) in caplog.text
    assert caplog.messages[0].startswith("head.weight [10, 24]: ")
    assert layer.kernel(dtype=torch.float16).dtype == "float16"
