"""The packed operator in what torch does with an operator, and in Python as in C."""

from __future__ import annotations

from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")

from quantization import pack_matrix
from quantization.ops import operators, torch_kernels
from quantization.ops.torch_ops import packed_linear
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

OUT, IN = 24, 70
SCHEMES = [
    "w4g32a",
    "w3g64",
    "w8",
    "nf4g64",
    "w5g16af",
    "mxfp4",
    "ternaryg32",
    "w4g64a+dq",
    "kmeans3r",
]

generator = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(OUT, IN, generator=generator) / 8
BIAS = torch.randn(OUT, generator=generator)


def parts(scheme: str, dtype: torch.dtype = torch.float32) -> tuple:
    """What packed_linear takes between x and bias, then bits and group; and the exact weight."""
    packed = pack_matrix(WEIGHT.to(dtype), scheme)
    tensors = (
        packed.packed_weights,
        packed.scales,
        packed.scale_steps,
        packed.zero_points,
        packed.codebook,
    )
    return tensors, packed.scheme.kernel_numbers(IN)[:2], packed.dequantize(torch.float64)


def function(scheme: str, dtype: torch.dtype = torch.float32) -> tuple[Callable, torch.Tensor]:
    tensors, numbers, weight = parts(scheme, dtype)
    return lambda x, bias=BIAS: packed_linear(x, *tensors, bias, *numbers), weight


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, IN, dtype=torch.float64, generator=generator).to(dtype)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_values_are_those_of_the_dequantized_weight(scheme: str, dtype: torch.dtype) -> None:
    apply, weight = function(scheme, dtype)
    x = rows(2, 3, dtype=dtype)
    y = apply(x)
    exact = x.double() @ weight.T + BIAS.double()
    size = x.double().abs() @ weight.abs().T + BIAS.double().abs()
    unit = {torch.float32: 2.0**-24, torch.float64: 2.0**-24}.get(dtype, 2.0**-8)
    assert y.dtype == dtype and y.shape == (2, 3, OUT)
    assert ((y.double() - exact).abs() <= (IN + 8) * 2.0**-24 * size + 2 * unit * size).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_flow_to_x_and_bias(scheme: str) -> None:
    apply, weight = function(scheme)
    x, bias = rows(4).requires_grad_(), BIAS.clone().requires_grad_()
    apply(x, bias).square().sum().backward()
    other, other_bias = x.detach().clone().requires_grad_(), BIAS.clone().requires_grad_()
    (other @ weight.float().T + other_bias).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias.grad, other_bias.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "transform",
    [
        torch.func.grad,
        lambda f: torch.vmap(torch.func.grad(f)),
        torch.func.hessian,
        lambda f: lambda x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    ],
    ids=["grad", "vmap-grad", "hessian", "jvp"],
)
def test_function_transforms(transform: Callable) -> None:
    apply, weight = function("w4g32a")
    x = rows(3)
    have = transform(lambda x: apply(x).sin().sum())(x)
    expected = transform(lambda x: (x @ weight.float().T + BIAS).sin().sum())(x)
    torch.testing.assert_close(have, expected, rtol=2e-3, atol=2e-3)


def test_compiles_whole_with_its_gradient() -> None:
    apply, _ = function("nf4g64")
    compiled = torch.compile(lambda x: apply(x).relu().sum(), fullgraph=True, backend="aot_eager")
    x = rows(5).requires_grad_()
    compiled(x).backward()
    other = x.detach().clone().requires_grad_()
    apply(other).relu().sum().backward()
    assert torch.equal(x.grad, other.grad)


def test_the_operators_pass_opcheck() -> None:
    (weights, scales, *optional), (bits, group), _ = parts("w4g32a")
    filled = [scales if tensor is None else tensor for tensor in optional]
    present = operators.HAS_ZEROS | operators.HAS_BIAS
    arguments = (rows(3), weights, scales, *filled, BIAS, bits, group, present, torch.float32)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.quantization.packed.default, arguments, test_utils=tests)
    grad = torch.randn(3, OUT)
    numbers = (IN, bits, group, operators.HAS_ZEROS, torch.float32)
    arguments = (grad, weights, scales, *filled, *numbers)
    torch.library.opcheck(
        torch.ops.quantization.packed_backward.default, arguments, test_utils=tests
    )


def test_autocast_and_meta() -> None:
    apply, _ = function("w4g32a")
    with torch.autocast("cpu", torch.bfloat16):
        assert apply(rows(3)).dtype == torch.bfloat16
    (weights, scales, _, zeros, _), numbers, _ = parts("w4g32a")
    meta = [tensor.to("meta") for tensor in (weights, scales, zeros)]
    x = torch.empty(2, IN, device="meta")
    y = packed_linear(x, meta[0], meta[1], None, meta[2], None, None, *numbers)
    assert y.is_meta and y.shape == (2, OUT)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_kernels_in_python_give_the_same_bits(scheme: str) -> None:
    (weights, scales, *optional), (bits, group), _ = parts(scheme)
    flags = (operators.HAS_STEPS, operators.HAS_ZEROS, operators.HAS_CODEBOOK)
    pairs = zip(flags, optional, strict=True)
    present = sum(flag for flag, tensor in pairs if tensor is not None)
    filled = [scales if tensor is None else tensor for tensor in optional]
    x, grad = rows(3), torch.randn(3, OUT)
    in_python = {row.name: row.kernel(torch_kernels.multiply) for row in operators.OPERATORS}
    numbers = (bits, group, present | operators.HAS_BIAS, torch.float32)
    y = in_python["packed"](x, weights, scales, *filled, BIAS, *numbers)
    assert torch.equal(y, packed_linear(x, weights, scales, *optional, BIAS, bits, group))
    numbers = (IN, bits, group, present, torch.float32)
    grad_x = in_python["packed_backward"](grad, weights, scales, *filled, *numbers)
    assert torch.equal(
        grad_x, torch_kernels.packed_backward(grad, weights, scales, *filled, *numbers)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: (t[0][:, :-1], *t[1:]), "weights"),
        (lambda t: (t[0], t[1][:, :-1], *t[2:]), "scales"),
        (lambda t: (t[0].to(torch.int8), *t[1:]), "uint8"),
        (lambda t: (*t[:3], t[3][:, :-1], t[4]), "zero_points"),
    ],
    ids=["row bytes", "groups", "dtype", "zero points"],
)
def test_what_does_not_fit_is_refused(change: Callable, message: str) -> None:
    tensors, numbers, _ = parts("w4g16a")
    with pytest.raises(RuntimeError, match=message):
        packed_linear(rows(2), *change(tensors), BIAS, *numbers)


@pytest.mark.parametrize(
    ("bits", "group", "message"),
    [
        (9, 16, "bits must be"),
        (4, 0, "group is 0"),
        (4, -1, "group is -1"),
        (0, 16, "base-3"),
    ],
)
def test_numbers_out_of_range_are_refused(bits: int, group: int, message: str) -> None:
    tensors, _, _ = parts("w4g16a")
    with pytest.raises(RuntimeError, match=message):
        packed_linear(rows(2), *tensors, BIAS, bits, group)


@pytest.mark.parametrize("scheme", ["w4", "w4g32a", "nf4", "ternary"])
def test_rows_of_nothing_give_the_bias(scheme: str) -> None:
    packed = pack_matrix(torch.empty(OUT, 0), scheme)
    tensors = (packed.packed_weights, packed.scales, None, packed.zero_points, packed.codebook)
    x = torch.randn(3, 0, requires_grad=True)
    y = packed_linear(x, *tensors, BIAS, *packed.scheme.kernel_numbers(0)[:2])
    assert torch.equal(y, BIAS.expand(3, OUT))
    y.sum().backward()
    assert x.grad.shape == (3, 0)


def test_scales_that_ask_for_a_gradient_are_refused() -> None:
    tensors, numbers, _ = parts("w4g32")
    scales = tensors[1].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="scales require a gradient"):
        packed_linear(rows(2), tensors[0], scales, *tensors[2:], BIAS, *numbers)
