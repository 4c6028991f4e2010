"""The torch operator in all that torch does with an operator; C and Python kernels alike."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")

from torch.multiprocessing.reductions import StorageWeakRef

from quantization.ops import torch_ops
from quantization.ops.torch_ops import linear
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OUT, IN = 32, 20

generator = torch.Generator().manual_seed(0)
WEIGHTS = torch.randint(-127, 128, (OUT, IN), dtype=torch.int8, generator=generator)
SCALES = torch.rand(OUT, generator=generator) / 100
BIAS = torch.randn(OUT, generator=generator)


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, IN, dtype=torch.float64, generator=generator).to(dtype)


def reference(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The same in ATen, in the dtype of x."""
    weights = WEIGHTS.to(x.dtype) * SCALES.to(x.dtype)[:, None]
    return torch.nn.functional.linear(x, weights, None if bias is None else bias.to(x.dtype))


def assert_near(have: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(have, expected.to(have.dtype), rtol=2e-4, atol=2e-5)


class Layer(torch.nn.Module):
    """The smallest module around the function."""

    def __init__(self, with_bias: bool = True) -> None:
        super().__init__()
        self.register_buffer("weights", WEIGHTS)
        self.register_buffer("scales", SCALES)
        self.register_buffer("bias", BIAS if with_bias else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch_ops.linear(x, self.weights, self.scales, self.bias)


# ---- values and shapes -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("out_dtype", [None, *FLOATS])
def test_values(dtype: torch.dtype, out_dtype: torch.dtype | None) -> None:
    x = rows(5, dtype=dtype)
    y = linear(x, WEIGHTS, SCALES, BIAS, out_dtype)
    assert y.dtype == (out_dtype or dtype)
    expected = reference(x.double(), BIAS)
    narrow = min(torch.finfo(y.dtype).bits, torch.finfo(dtype).bits) == 16
    torch.testing.assert_close(y.double(), expected, rtol=0.01 if narrow else 1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", FLOATS)
def test_scales_and_bias_of_any_float_type(dtype: torch.dtype) -> None:
    x, scales, bias = rows(3), SCALES.to(dtype), BIAS.to(dtype)
    expected = torch.nn.functional.linear(x, WEIGHTS * scales.float()[:, None], bias.float())
    assert_near(linear(x, WEIGHTS, scales, bias), expected)


@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (0,), (2, 0, 3), (1, 2, 3, 4)])
def test_batches_of_any_rank(batch: tuple[int, ...]) -> None:
    x = rows(*batch)
    y = linear(x, WEIGHTS, SCALES)
    assert y.shape == (*batch, OUT)
    assert_near(y, reference(x))


def test_empty_layers() -> None:
    empty = linear(rows(3), WEIGHTS[:0], SCALES[:0])
    assert empty.shape == (3, 0)
    assert torch.equal(linear(rows(3)[:, :0], WEIGHTS[:, :0], SCALES, BIAS), BIAS.expand(3, OUT))


def test_views() -> None:
    """Transposed, stepped, expanded, negated and overlapping inputs are read as they look."""
    x, big = rows(6), torch.randn(6, 2 * IN, generator=generator)
    stepped = big[:, ::2]
    negated = torch._neg_view(x)
    for view in (rows(6).reshape(IN, 6).T, stepped, x[:1].expand(4, IN), negated, x.flip(0)):
        assert torch.equal(linear(view, WEIGHTS, SCALES), linear(view.clone(), WEIGHTS, SCALES))
    transposed = WEIGHTS.T.contiguous().T
    assert torch.equal(linear(x, transposed, SCALES), linear(x, WEIGHTS, SCALES))
    doubled = SCALES.repeat_interleave(2)[::2]
    assert torch.equal(linear(x, WEIGHTS, doubled, BIAS), linear(x, WEIGHTS, SCALES, BIAS))


def test_inputs_are_freed_on_every_path() -> None:
    """A leaked handle would keep the storage alive."""
    for width in (IN, IN - 1):
        x = rows(4)[:, :width].T.contiguous().T
        storage = StorageWeakRef(x.untyped_storage())
        for _ in range(3):
            try:
                linear(x, WEIGHTS, SCALES)
            except RuntimeError:
                assert width != IN
        del x
        assert storage.expired()


# ---- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3, IN + 1)}, "21"),
        ({"x": torch.ones(())}, r"1\.\.64 dimensions|does not fit"),
        ({"x": torch.ones(3, IN, dtype=torch.int32)}, "float32, bfloat16, float16 or float64"),
        ({"weights": WEIGHTS.float()}, "weights must be int8"),
        ({"weights": WEIGHTS[0]}, "weights"),
        ({"scales": SCALES[:-1]}, "scales"),
        ({"scales": SCALES[:, None]}, "scales"),
        ({"scales": SCALES.to(torch.int32)}, "float32, bfloat16, float16 or float64"),
        ({"bias": BIAS[:3]}, "bias"),
        ({"bias": BIAS.to(torch.int64)}, "float32, bfloat16, float16 or float64"),
        ({"out_dtype": torch.int8}, "float32, bfloat16, float16 or float64"),
        ({"scales": SCALES.clone().requires_grad_()}, "scales require a gradient"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    arguments = {"x": rows(3), "weights": WEIGHTS, "scales": SCALES, "bias": BIAS} | change
    with pytest.raises(RuntimeError, match=message):
        linear(**arguments)


def test_sparse_tensors_are_refused() -> None:
    with pytest.raises((NotImplementedError, RuntimeError)):
        linear(rows(3).to_sparse(), WEIGHTS, SCALES)


# ---- derivatives -------------------------------------------------------------------------------


def test_gradients_of_any_order() -> None:
    x, bias = rows(3, dtype=torch.float64), BIAS.double()
    inputs = (x.requires_grad_(), bias.requires_grad_())

    def map_rows(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return linear(x, WEIGHTS, SCALES, bias)

    assert torch.autograd.gradcheck(map_rows, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(map_rows, inputs, check_fwd_over_rev=True)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_have_the_dtype_of_what_they_belong_to(dtype: torch.dtype) -> None:
    x, bias = rows(2, 3, dtype=dtype).requires_grad_(), BIAS.clone().requires_grad_()
    linear(x, WEIGHTS, SCALES, bias).float().square().sum().backward()
    wide, wide_bias = x.detach().double().requires_grad_(), BIAS.double().requires_grad_()
    reference(wide, wide_bias).square().sum().backward()
    assert (x.grad.dtype, bias.grad.dtype) == (dtype, torch.float32)
    error = 0.02 if torch.finfo(dtype).bits == 16 else 1e-4
    assert (x.grad - wide.grad).norm() <= error * wide.grad.norm()
    assert (bias.grad - wide_bias.grad).norm() <= error * wide_bias.grad.norm()


def test_gradient_of_one_row_and_of_the_bias_alone() -> None:
    bias = BIAS.clone().requires_grad_()
    linear(rows(), WEIGHTS, SCALES, bias).sum().backward()
    assert torch.equal(bias.grad, torch.ones(OUT))
    x = rows().requires_grad_()
    linear(x, WEIGHTS, SCALES).sum().backward()
    assert_near(x.grad, (WEIGHTS * SCALES[:, None]).sum(0))


def test_no_graph_is_made_when_none_is_asked_for() -> None:
    x = rows(2).requires_grad_()
    with torch.no_grad():
        assert linear(x, WEIGHTS, SCALES).grad_fn is None
    with torch.inference_mode():
        assert linear(x, WEIGHTS, SCALES).is_inference()
    assert linear(x.detach(), WEIGHTS, SCALES).grad_fn is None


def test_checkpointing() -> None:
    x = rows(4).requires_grad_()
    torch.utils.checkpoint.checkpoint(Layer(), x, use_reentrant=False).square().sum().backward()
    other = x.detach().clone().requires_grad_()
    Layer()(other).square().sum().backward()
    assert torch.equal(x.grad, other.grad)


# ---- function transforms -----------------------------------------------------------------------


def loss(x: torch.Tensor) -> torch.Tensor:
    return linear(x, WEIGHTS, SCALES, BIAS).square().sum()


def reference_loss(x: torch.Tensor) -> torch.Tensor:
    return reference(x, BIAS).square().sum()


@pytest.mark.parametrize(
    "transform",
    [
        torch.func.grad,
        lambda f: torch.vmap(torch.func.grad(f)),
        lambda f: lambda x: torch.vmap(f, in_dims=1)(x.T),
        torch.func.hessian,
        lambda f: lambda x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
        lambda f: lambda x: torch.func.vjp(f, x)[1](torch.ones(()))[0],
    ],
    ids=["grad", "vmap-grad", "vmap", "hessian", "jvp", "vjp"],
)
def test_function_transforms(transform: Callable) -> None:
    x = rows(3)
    have, expected = transform(loss)(x), transform(reference_loss)(x)
    torch.testing.assert_close(have, expected, rtol=1e-3, atol=1e-4)


def test_vmap_over_weights_scales_and_bias() -> None:
    x, weights = rows(3), torch.stack([WEIGHTS, -WEIGHTS])
    y = torch.vmap(lambda w: linear(x, w, SCALES))(weights)
    assert torch.equal(y[1], -y[0])
    y = torch.vmap(lambda s, b: linear(x, WEIGHTS, s, b))(
        torch.stack([SCALES, 2 * SCALES]), torch.stack([BIAS, 2 * BIAS])
    )
    assert_near(y[1], 2 * y[0])


def test_functional_call() -> None:
    x = rows(2)
    doubled = {"scales": 2 * SCALES}
    assert_near(torch.func.functional_call(Layer(False), doubled, (x,)), 2 * Layer(False)(x))


# ---- compilers and tracers ---------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile_in_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    layer = Layer()
    compiled = torch.compile(
        lambda x: layer(x.relu()) * 2, fullgraph=True, backend=backend, dynamic=True
    )
    for tokens in (3, 7):
        x = rows(tokens).requires_grad_()
        y = compiled(x)
        y.sum().backward()
        other = x.detach().clone().requires_grad_()
        expected = layer(other.relu()) * 2
        expected.sum().backward()
        assert_near(y, expected)
        assert_near(x.grad, other.grad)
    with torch.no_grad():
        x = rows(5)
        assert_near(compiled(x), layer(x.relu()) * 2)


def test_compile_under_autocast() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(Layer(), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert compiled(rows(2)).dtype == torch.bfloat16


def test_export_with_a_dynamic_batch() -> None:
    batch = torch.export.Dim("batch", min=1)
    for strict in (False, True):
        program = torch.export.export(
            Layer(), (rows(3),), dynamic_shapes=({0: batch},), strict=strict
        )
        stored = io.BytesIO()
        torch.export.save(program, stored)
        stored.seek(0)
        x = rows(9)
        assert torch.equal(torch.export.load(stored).module()(x), Layer()(x))


def test_jit_trace_and_script() -> None:
    x = rows(5)
    for with_bias in (True, False):
        layer = Layer(with_bias)
        for made in (torch.jit.trace(layer, rows(3)), torch.jit.script(layer)):
            stored = io.BytesIO()
            torch.jit.save(made, stored)
            stored.seek(0)
            assert torch.equal(torch.jit.load(stored)(x), layer(x))


def test_fx_keeps_the_call() -> None:
    graph = torch.fx.symbolic_trace(Layer())
    assert "linear" in graph.code
    x = rows(4)
    assert torch.equal(graph(x), Layer()(x))


def test_deepcopy_and_state_dict() -> None:
    layer = copy.deepcopy(Layer())
    layer.load_state_dict(Layer().state_dict())
    x = rows(2)
    assert torch.equal(layer(x), Layer()(x))


@pytest.mark.parametrize("dtype", FLOATS)
def test_operators_pass_torchs_own_checks(dtype: torch.dtype) -> None:
    x, grad = rows(3, dtype=dtype), torch.randn(3, OUT, generator=generator).to(dtype)
    operators = torch.ops.quantization
    torch.library.opcheck(operators.linear.default, (x, WEIGHTS, SCALES, dtype))
    torch.library.opcheck(operators.linear_bias.default, (x, WEIGHTS, SCALES, BIAS, torch.float32))
    torch.library.opcheck(operators.linear_backward.default, (grad, WEIGHTS, SCALES, dtype))


# ---- devices and autocast ----------------------------------------------------------------------


def test_meta_and_fake_tensors_have_shapes() -> None:
    y = Layer().to("meta")(torch.empty(2, 3, IN, device="meta"))
    assert (y.shape, y.device.type) == ((2, 3, OUT), "meta")
    with torch._subclasses.FakeTensorMode() as mode:
        y = linear(torch.empty(4, IN), mode.from_tensor(WEIGHTS), mode.from_tensor(SCALES))
        assert (y.shape, y.dtype) == ((4, OUT), torch.float32)
    with pytest.raises(RuntimeError, match="does not fit"):
        Layer().to("meta")(torch.empty(2, IN + 1, device="meta"))


@pytest.mark.parametrize("name", ["x", "weights", "scales", "bias"])
def test_meta_tensors_do_not_mix_with_others(name: str) -> None:
    """Else the result would be memory that nobody has written."""
    arguments = {"x": rows(3), "weights": WEIGHTS, "scales": SCALES, "bias": BIAS}
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(RuntimeError, match="some tensors are on the meta device"):
        linear(**arguments)


def test_autocast_gives_what_nn_linear_gives() -> None:
    plain = torch.nn.Linear(IN, OUT)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            for x_dtype in (torch.float32, torch.bfloat16, torch.float16):
                x = rows(2, dtype=x_dtype)
                assert linear(x, WEIGHTS, SCALES).dtype == plain(x).dtype == dtype
            wide = rows(2, dtype=torch.float64)
            assert linear(wide, WEIGHTS, SCALES).dtype == plain.double()(wide).dtype
            plain.float()
            assert linear(rows(2), WEIGHTS, SCALES, None, torch.float32).dtype == torch.float32
            with torch.autocast("cpu", enabled=False):
                assert linear(rows(2), WEIGHTS, SCALES).dtype == torch.float32
    x = rows(2).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, WEIGHTS, SCALES, BIAS)
    y.sum().backward()
    assert x.grad.dtype == torch.float32
    assert_near(x.grad, (WEIGHTS * SCALES[:, None]).sum(0).expand(2, IN))
