"""Devices without kernels of ours: the operators in torch alone, beside those in C."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn
from torch._subclasses import FakeTensorMode

from quantization import PackedEmbedding, PackedLinearLayer, QWQALinearLayer, quantize_model
from quantization.ops import operators, torch_devices
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SCHEMES = [
    *(f"w{bits}g16" for bits in range(2, 9)),
    *("w1a", "w4a", "w4t", "w3g7a", "w4g16+f32", "nf4", "fp4g16+dq", "mxfp4", "kmeans3"),
    *("kmeans2r", "binaryg16", "ternary", "ternaryg16+dq", "w3g16af", "w5g16a+dq", "w3g16af+dq"),
]
#: The operators as torch alone computes them, beside torch.ops.quantization.
IN_TORCH = SimpleNamespace(
    **{row.name: row.kernel(torch_devices.multiply) for row in operators.OPERATORS}
)
OUT, IN = 37, 45
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11}
UNIT[torch.bfloat16] = 2.0**-8


def arguments_of(layer: nn.Module) -> tuple[Any, ...]:
    """What an operator takes between x and bias, and after it."""
    if isinstance(layer, QWQALinearLayer):
        return (layer.int8_weights, layer.scales), ()
    tensors = [layer.packed_weights, layer.scales]
    present = 0
    optional = (layer.scale_steps, layer.zero_points, layer.codebook)
    flags = (operators.HAS_STEPS, operators.HAS_ZEROS, operators.HAS_CODEBOOK)
    for tensor, flag in zip(optional, flags, strict=True):
        tensors.append(layer.scales if tensor is None else tensor)
        present |= 0 if tensor is None else flag
    return tuple(tensors), (layer._bits, layer._group, present)


def forward(layer: nn.Module, x: torch.Tensor, dtype: torch.dtype, where: Any) -> torch.Tensor:
    """The layer's map, by the operators of ``where``."""
    tensors, numbers = arguments_of(layer)
    if not numbers:
        if layer.bias is None:
            return where.linear(x, *tensors, dtype)
        return where.linear_bias(x, *tensors, layer.bias, dtype)
    bits, group, present = numbers
    bias = tensors[1] if layer.bias is None else layer.bias
    present |= 0 if layer.bias is None else operators.HAS_BIAS
    return where.packed(x, *tensors, bias, bits, group, present, dtype)


def backward(layer: nn.Module, grad: torch.Tensor, dtype: torch.dtype, where: Any) -> torch.Tensor:
    tensors, numbers = arguments_of(layer)
    if not numbers:
        return where.linear_backward(grad, *tensors, dtype)
    return where.packed_backward(grad, *tensors, layer.in_features, *numbers, dtype)


def layer_of(scheme: str, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Module:
    linear = nn.Linear(IN, OUT, bias=bias, dtype=dtype)
    if scheme == "rows":
        return QWQALinearLayer.from_float(linear)
    return PackedLinearLayer.from_float(linear, scheme)


def allowed(
    terms: int, size: torch.Tensor, exact: torch.Tensor, x: torch.dtype, dtype: torch.dtype
) -> torch.Tensor:
    """How far one implementation may be from the exact product.

    A sum of K terms errs by (K + 6) u of what is summed, u that of the accumulator; a packed weight
    is a float32 number; where the result has 16 bits, weights, bias and x are rounded to those; and
    the result is rounded once.
    """
    wide = UNIT[torch.float64 if x is torch.float64 else torch.float32]
    bound = (terms + 6) * wide * size + 4 * UNIT[torch.float32] * size
    if dtype in (torch.bfloat16, torch.float16) and x is not torch.float64:
        bound = bound + 2.1 * UNIT[dtype] * size
    return bound + UNIT[dtype] * (exact.abs() + bound) + 1e-7


# ---- the same numbers ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("scheme", ["rows", *SCHEMES])
def test_both_forms_give_the_product(scheme: str, bias: bool, dtype: torch.dtype) -> None:
    layer, x = layer_of(scheme, bias=bias), torch.randn(2, 3, IN).to(dtype)
    weight = layer.weight.double()
    exact, size = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    if bias:
        exact, size = exact + layer.bias.double(), size + layer.bias.double().abs()
    for where in (IN_TORCH, torch.ops.quantization):
        y = forward(layer, x, dtype, where)
        assert y.dtype == dtype and y.shape == (2, 3, OUT)
        assert ((y.double() - exact).abs() <= allowed(IN, size, exact, dtype, dtype)).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scheme", ["rows", *SCHEMES])
def test_both_forms_give_the_gradient(scheme: str, dtype: torch.dtype) -> None:
    layer, grad = layer_of(scheme), torch.randn(2, 3, OUT).to(dtype)
    weight = layer.weight.double()
    exact, size = grad.double() @ weight, grad.double().abs() @ weight.abs()
    for where in (IN_TORCH, torch.ops.quantization):
        grad_x = backward(layer, grad, dtype, where)
        assert grad_x.dtype == dtype and grad_x.shape == (2, 3, IN)
        assert ((grad_x.double() - exact).abs() <= allowed(OUT, size, exact, dtype, dtype)).all()


@pytest.mark.parametrize("scheme", ["rows", "w4g16a", "nf4"])
@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_results_of_another_type(scheme: str, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    layer, x = layer_of(scheme), torch.randn(4, IN).to(dtype)
    exact, size = (
        x.double() @ layer.weight.double().T,
        x.double().abs() @ layer.weight.double().abs().T,
    )
    exact, size = exact + layer.bias.double(), size + layer.bias.double().abs()
    y = forward(layer, x, out_dtype, IN_TORCH)
    assert y.dtype == out_dtype
    assert ((y.double() - exact).abs() <= allowed(IN, size, exact, dtype, out_dtype)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", ["rows", "w8", "w5g16"])
def test_weights_near_the_largest_number_stay_finite(scheme: str, dtype: torch.dtype) -> None:
    """An infinite weight times 0 is NaN, in every output of the row."""
    linear = nn.Linear(IN, OUT, bias=False, dtype=dtype)
    shares = torch.linspace(0.98, 1, OUT, dtype=torch.float64).unsqueeze(1)
    linear.weight.data = (shares * torch.finfo(dtype).max).to(dtype).repeat(1, IN)
    is_rows = scheme == "rows"
    layer = QWQALinearLayer.from_float(linear) if is_rows else PackedLinearLayer.from_float(
        linear, scheme)  # fmt: skip
    x = torch.zeros(1, IN, dtype=dtype)
    x[0, 0] = 0.5
    y = forward(layer, x, dtype, IN_TORCH)
    assert y.isfinite().all() and torch.equal(y[0], layer.weight[:, 0] / 2)


@pytest.mark.parametrize("scheme", ["rows", "w4g16a", "kmeans2r", "nf4", "w5g16a+dq"])
def test_a_weight_is_made_in_blocks(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, grad = layer_of(scheme), torch.randn(4, IN), torch.randn(4, OUT)
    y = forward(layer, x, torch.float32, IN_TORCH)
    grad_x = backward(layer, grad, torch.float32, IN_TORCH)
    monkeypatch.setattr(torch_devices, "_BLOCK", 5 * IN)
    torch.testing.assert_close(forward(layer, x, torch.float32, IN_TORCH), y)
    torch.testing.assert_close(backward(layer, grad, torch.float32, IN_TORCH), grad_x)


@pytest.mark.parametrize("batch", [(), (1,), (0,), (2, 0, 3)])
@pytest.mark.parametrize("sizes", [(IN, OUT), (0, OUT), (IN, 0)])
@pytest.mark.parametrize("scheme", ["rows", "w4", "w4g16a"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_shapes_of_little_or_nothing(
    scheme: str, sizes: tuple[int, int], batch: tuple[int, ...]
) -> None:
    cols, rows = sizes
    layer = QWQALinearLayer(cols, rows)
    if scheme != "rows":
        layer = PackedLinearLayer(cols, rows, scheme=scheme)
        if cols == 0:  # a scheme without groups has a scale all the same, which operators do not
            layer.scales = layer.scales[:, :0]
            layer.zero_points = None if layer.zero_points is None else layer.zero_points[:, :0]
    x, grad = torch.randn(*batch, cols), torch.randn(*batch, rows)
    for where in (IN_TORCH, torch.ops.quantization):
        y = forward(layer, x, torch.float32, where)
        assert y.shape == (*batch, rows)
        if cols == 0:
            assert torch.equal(y, layer.bias.expand(*batch, rows))
        assert backward(layer, grad, torch.float32, where).shape == (*batch, cols)


def test_autocast_does_not_change_a_result_that_was_asked_for() -> None:
    layer, x = layer_of("w4g16a"), torch.randn(4, IN)
    y = forward(layer, x, torch.float32, IN_TORCH)
    grad_x = backward(layer, torch.ones(4, OUT), torch.float32, IN_TORCH)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(forward(layer, x, torch.float32, IN_TORCH), y)
        again = backward(layer, torch.ones(4, OUT), torch.float32, IN_TORCH)
    assert torch.equal(again, grad_x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, IN + 16)}, "does not fit"),
        ({"x": torch.ones(2, IN, dtype=torch.int32)}, "must be float32, bfloat16"),
        ({"x": torch.ones(2, IN).to_sparse()}, "only dense"),
        ({"dtype": torch.int8}, "must be float32, bfloat16"),
        ({"bias": torch.ones(3)}, "must have 37 elements"),
        ({"bias": torch.ones(OUT, device="meta")}, "meta device"),
    ],
)
@pytest.mark.parametrize("scheme", ["rows", "w4g16a"])
def test_bad_arguments(scheme: str, change: dict[str, Any], message: str) -> None:
    layer = layer_of(scheme)
    layer.bias = change.get("bias", layer.bias)
    x, dtype = change.get("x", torch.ones(2, IN)), change.get("dtype", torch.float32)
    with pytest.raises(RuntimeError, match=message.replace("does not fit", "do(es)? not\\s+fit")):
        forward(layer, x, dtype, IN_TORCH)


# ---- where the dispatcher goes ---------------------------------------------------------------


@pytest.mark.parametrize("name", [row.name for row in operators.OPERATORS])
def test_every_device_has_a_kernel(name: str) -> None:
    operator = f"quantization::{name}"
    for key in ("CPU", "CUDA", "MPS", "XPU", "PrivateUse1", "Meta"):
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(operator, key), key
    table = torch._C._dispatch_dump_table(operator)
    kernels = dict(line.split(":", 1) for line in table.splitlines() if ":" in line)
    assert kernels["CPU"] != kernels["CUDA"] == kernels["MPS"]


@pytest.fixture
def fake() -> Iterator[FakeTensorMode]:
    with FakeTensorMode() as mode:
        yield mode


def on_fake(module: nn.Module, device: str) -> nn.Module:
    """The module with fake buffers on a device that this machine need not have."""
    for each in module.modules():
        for name, tensor in each._buffers.items():
            if tensor is not None:
                each._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    return module


def a_layer(kind: str) -> nn.Module:
    if kind == "rows":
        return QWQALinearLayer(IN, OUT, device="meta")
    return PackedLinearLayer(IN, OUT, scheme=kind, device="meta")


@pytest.mark.parametrize("kind", ["rows", "w4g16a", "w3", "nf4", "mxfp4", "ternary", "w5g16a+dq"])
@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_layers_on_fake_devices(kind: str, device: str, fake: FakeTensorMode) -> None:
    layer = on_fake(a_layer(kind), device)
    x = torch.empty(2, 3, IN, device=device)  # autograd aborts where torch lacks the device
    y = layer(x)
    assert (y.device.type, y.shape, y.dtype) == (device, (2, 3, OUT), torch.float32)
    for where in (IN_TORCH, torch.ops.quantization):  # no step of it leaves the device
        assert forward(layer, x, torch.float32, where).device.type == device
        grad_x = backward(layer, y, torch.float32, where)
        assert (grad_x.device.type, grad_x.shape) == (device, x.shape)


def test_autocast_of_the_device_is_followed(fake: FakeTensorMode) -> None:
    layer = on_fake(a_layer("w4g16a"), "cuda")
    x = torch.empty(2, IN, device="cuda")
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.float32
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.float16)
    try:
        assert layer(x).dtype == torch.float16
    finally:
        torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("scheme", ["w4g16a", "nf4", "ternary", "mxfp4"])
def test_an_embedding_on_a_fake_device(scheme: str, fake: FakeTensorMode) -> None:
    table = on_fake(PackedEmbedding(20, IN, scheme=scheme, device="meta"), "cuda")
    rows = table(torch.zeros(2, 3, dtype=torch.long, device="cuda"))
    assert (rows.device.type, rows.shape) == ("cuda", (2, 3, IN))


@pytest.mark.parametrize("kind", ["rows", "w4g16a"])
def test_the_input_must_be_where_the_layer_is(kind: str, fake: FakeTensorMode) -> None:
    on_cpu, on_gpu = on_fake(a_layer(kind), "cpu"), on_fake(a_layer(kind), "cuda")
    with pytest.raises(RuntimeError, match=r"input is on cuda:0, but tensors of the layer.* cpu"):
        on_cpu(torch.empty(2, IN, device="cuda"))
    with pytest.raises(RuntimeError, match=r"input is on cpu, but tensors of the layer.* cuda:0"):
        on_gpu(torch.empty(2, IN))


@pytest.mark.parametrize("kind", ["rows", "w4g16a"])
def test_export_for_another_device(kind: str, fake: FakeTensorMode) -> None:
    layer = on_fake(a_layer(kind), "cuda")
    program = torch.export.export(layer, (torch.empty(2, IN, device="cuda"),))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any("quantization.linear_bias" in n or "quantization.packed" in n for n in names)


# ---- a real one ------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scheme", ["rows", *SCHEMES])
def test_a_gpu_gives_what_the_cpu_gives(scheme: str, dtype: torch.dtype) -> None:
    layer, x = layer_of(scheme), torch.randn(2, 3, IN).to(dtype)
    exact, size = (
        x.double() @ layer.weight.double().T,
        x.double().abs() @ layer.weight.double().abs().T,
    )
    exact, size = exact + layer.bias.double(), size + layer.bias.double().abs()
    asked = x.cuda().requires_grad_()
    y = layer.cuda()(asked)
    y.sum().backward()
    assert y.is_cuda and asked.grad.is_cuda
    error = (y.cpu().double() - exact).abs()
    assert (error <= allowed(IN, size, exact, dtype, dtype)).all()


@needs_gpu
def test_a_model_is_quantized_on_a_gpu() -> None:
    model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    words = torch.randint(0, 50, (2, 5))
    recipe = {"1": "w4g32a", nn.Embedding: "w8", "*": "nf4"}
    quantize_model(model.cuda(), recipe)
    assert all(tensor.is_cuda for tensor in model.buffers())
    y = model(words.cuda())
    torch.testing.assert_close(y.cpu(), model.cpu()(words), rtol=1e-4, atol=1e-4)


@needs_gpu
def test_compile_on_a_gpu() -> None:
    model = nn.Sequential(layer_of("w4g16a"), nn.ReLU(), QWQALinearLayer(OUT, 4)).cuda()
    x = torch.randn(3, IN, device="cuda")
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
