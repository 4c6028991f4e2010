"""The quantized layer: what it holds, what it computes, what its weight is."""

from __future__ import annotations

import copy
import doctest
import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn
from torch.nn import functional as F

from quantization import dequantize_model
from quantization.layers import int8_layer
from quantization.linear_layer import (
    QWQALinearLayer,
    name_for_quantized_weight_buffer,
)
from quantization.swap import target
from tests.layers.int8_calls import FLOATS, float_linear, relative
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


@pytest.mark.parametrize("module", [int8_layer, target], ids=lambda module: module.__name__)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weight_near_the_largest_number_stays_finite(dtype: torch.dtype) -> None:
    """A scale that was rounded up times 127 is beyond the largest number."""
    largest = torch.finfo(dtype).max
    shares = torch.linspace(0.98, 1, 300, dtype=torch.float64).unsqueeze(1)
    linear = nn.Linear(2, 300, bias=False, dtype=dtype)
    linear.weight.data = (shares * torch.tensor([[largest, -largest / 2]])).to(dtype)
    layer = QWQALinearLayer.from_float(linear)
    products = layer.codes.double() * layer.scales.double().unsqueeze(1)
    assert products.to(dtype).isinf().any(), "some must overflow, or nothing is tested"
    assert torch.equal(layer.weight, products.clamp(-largest, largest).to(dtype))
    assert torch.equal(layer.weight, layer.packed().dequantize())
    model = nn.Sequential(layer)
    dequantize_model(model)
    assert model[0].weight.isfinite().all()


def test_a_marked_row_stays_nan() -> None:
    linear = nn.Linear(4, 2, dtype=torch.float16)
    linear.weight.data[1, 2] = torch.inf
    layer = QWQALinearLayer.from_float(linear, nonfinite="mark")
    assert layer.weight[1].isnan().all() and layer.weight[0].isfinite().all()


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
