"""What the packed layer computes, in every mode of torch, and what it leaves alone."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from torch import nn
from torch.nn import functional as F

from quantization import PackedLinearLayer
from tests.layers.packed_layers import FLOATS, packed, relative
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

# ---- forward ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(45,), (0, 45), (3, 45), (2, 1, 3, 45)])
def test_inputs_of_any_rank(shape: tuple[int, ...]) -> None:
    layer, x = packed(), torch.randn(shape)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    assert layer(x).shape == (*shape[:-1], 10)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("of_layer", FLOATS, ids=str)
def test_the_result_has_the_dtype_of_the_input(dtype: torch.dtype, of_layer: torch.dtype) -> None:
    layer, x = packed(dtype=of_layer), torch.randn(3, 45).to(dtype)
    y = layer(x)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    assert y.dtype == dtype
    assert relative(y, exact) < 4 * max(torch.finfo(dtype).eps, torch.finfo(of_layer).eps) + 1e-6


def test_wrong_inputs_are_refused() -> None:
    layer = packed()
    for length in (23, 44, 46, 0):  # 46 codes of 4 bits take as many bytes as 45
        with pytest.raises(RuntimeError, match=f"input has {length} features.* this layer 45"):
            layer(torch.randn(3, length))
    with pytest.raises((RuntimeError, IndexError)):
        layer(torch.tensor(1.0))
    with pytest.raises((RuntimeError, TypeError, NotImplementedError)):
        layer(torch.zeros(3, 45, dtype=torch.int64))


def test_gradients_flow_to_the_input_and_to_a_trained_bias() -> None:
    layer = packed()
    layer.bias = nn.Parameter(layer.bias.clone())
    x = torch.randn(3, 45, requires_grad=True)
    layer(x).square().sum().backward()
    mine = x.grad, layer.bias.grad
    x.grad = layer.bias.grad = None
    F.linear(x, layer.weight, layer.bias).square().sum().backward()
    torch.testing.assert_close(mine, (x.grad, layer.bias.grad), rtol=1e-4, atol=1e-5)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert "bias" in copy.deepcopy(layer).state_dict()


@pytest.mark.parametrize("training", [True, False])
def test_modes_of_torch(training: bool) -> None:
    layer, x = packed().train(training), torch.randn(3, 45)
    wanted = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), wanted)
    with torch.inference_mode():
        assert torch.equal(layer(x), wanted)
        made_inside = packed()
        inside = [made_inside, made_inside.to_scheme("nf4"), made_inside.to_scheme("w8g4")]
        inside += [packed("w4").to_int8(), made_inside.dequantize()]
    for made in inside:
        made(x.clone().requires_grad_()).sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
    assert relative(y, wanted) < 0.01


def test_compile_and_function_transforms() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(PackedLinearLayer(8, 16, scheme="w3g5a"), nn.ReLU(), packed_tail())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (1, 3):
        x = torch.randn(tokens, 8)
        torch.testing.assert_close(compiled(x), model(x))
    x = torch.randn(3, 8)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))
    torch.testing.assert_close(torch.vmap(model)(x), model(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))
    torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))
    asked = x.clone().requires_grad_()
    got = torch.func.grad(lambda x: model(x).sum())(x)
    torch.testing.assert_close(got, torch.autograd.grad(model(asked).sum(), asked)[0])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scheme", ["w4g16", "w3a", "nf4+dq"])
def test_a_layer_alone_can_be_exported(bias: bool, scheme: str) -> None:
    fresh = PackedLinearLayer(45, 10, bias=bias, scheme=scheme)
    made = packed(scheme, bias=bias)
    x = torch.randn(3, 45)
    for layer in (
        fresh,
        made,
        made.to_scheme("w2"),
        PackedLinearLayer.from_float(made.dequantize()),
    ):
        assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))


def packed_tail() -> PackedLinearLayer:
    return PackedLinearLayer(16, 4, bias=False, scheme="w4")


def test_forward_changes_no_buffer() -> None:
    layer = packed()
    before = {key: (value.data_ptr(), value.clone()) for key, value in layer.state_dict().items()}
    for tokens in (1, 7, 40):
        layer(torch.randn(tokens, 45, requires_grad=True)).sum().backward()
    for key, value in layer.state_dict().items():
        assert value.data_ptr() == before[key][0] and torch.equal(value, before[key][1])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.parametrize("scheme", ["w4g64a", "nf4"])
def test_forward_keeps_no_float_copy_of_the_weight(scheme: str) -> None:
    layer = PackedLinearLayer(2048, 4096, scheme=scheme)  # 4 MiB of codes, 32 MiB as floats

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    with torch.no_grad():
        for tokens in (1, 40):
            layer(torch.randn(tokens, 2048))
        before = resident()
        for tokens in (1, 40, 40, 1):
            layer(torch.randn(tokens, 2048))
    assert resident() - before < 4 << 20
