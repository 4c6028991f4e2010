"""The packed layer: what it holds, what it computes, what it refuses, how it travels."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn
from torch.nn import functional as F

from quantization import PackedLinearLayer, QWQALinearLayer, Scheme, pack_matrix
from quantization.layers.packed_module import BUFFERS
from quantization.ops.packed_rows import decode_rows

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SCHEMES = [
    *(f"w{bits}g16" for bits in range(2, 9)),
    *(f"w{bits}a" for bits in range(1, 9)),
    "w4g7a",
    "w4t",
    "w4g16+f32",
    "nf4",
    "fp4g16+dq",
    "mxfp4",
    "kmeans3",
    "kmeans2r",
    "binaryg16",
    "ternary",
    "ternaryg16+dq",
    "w3g16af",
    "w5g16a+dq",
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def float_linear(**options: Any) -> nn.Linear:
    return nn.Linear(45, 10, **options)


def packed(scheme: str = "w4g16a", **options: Any) -> PackedLinearLayer:
    return PackedLinearLayer.from_float(float_linear(**options), scheme)


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm())


def same_state(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return set(mine) == set(theirs) and all(torch.equal(mine[key], theirs[key]) for key in mine)


# ---- construction ----------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_fresh_layer_computes_what_its_weight_says(scheme: str, bias: bool) -> None:
    layer = PackedLinearLayer(45, 10, bias=bias, scheme=scheme)
    x = torch.randn(4, 45)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    assert layer.scheme == Scheme.parse(scheme)


def test_a_fresh_layer_draws_the_numbers_of_nn_linear() -> None:
    torch.manual_seed(3)
    plain = nn.Linear(45, 10)
    torch.manual_seed(3)
    layer = PackedLinearLayer(45, 10, scheme="w8")
    assert torch.equal(layer.bias, plain.bias)
    assert relative(layer.weight, plain.weight) < 0.01


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_it_holds_the_buffers_of_its_scheme_and_nothing_else(
    scheme: str, dtype: torch.dtype
) -> None:
    forms = Scheme.parse(scheme).buffers((10, 45), dtype)
    wanted = {name: (tuple(form.shape), form.dtype) for name, form in forms.items()}
    wanted["bias"] = ((10,), str(dtype).removeprefix("torch."))
    fresh = PackedLinearLayer(45, 10, scheme=scheme, dtype=dtype)
    for layer in (fresh, packed(scheme, dtype=dtype), copy.deepcopy(fresh).to("meta")):
        got = {
            name: (tuple(buffer.shape), str(buffer.dtype).removeprefix("torch."))
            for name, buffer in layer.named_buffers()
        }
        assert got == wanted and not list(layer.parameters())
        assert layer.dtype == dtype and isinstance(layer, nn.Linear)
        held = [v for v in vars(layer).values() if isinstance(v, torch.Tensor)]
        assert not held and layer.nbytes == Scheme.parse(scheme).nbytes((10, 45), dtype)
        assert layer.footprint == layer.nbytes + 10 * dtype.itemsize
        assert layer.bits_per_weight == 8 * layer.nbytes / 450


@pytest.mark.parametrize(("n_in", "n_out"), [(0, 3), (3, 0), (0, 0), (1, 1)])
@pytest.mark.parametrize("scheme", ["w4g16a", "w3", "w3a", "ternary", "kmeans2r"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_empty_and_tiny_sizes(n_in: int, n_out: int, scheme: str) -> None:
    layer = PackedLinearLayer(n_in, n_out, scheme=scheme)
    y = layer(torch.randn(5, n_in))
    assert y.shape == (5, n_out) and layer(torch.randn(0, n_in)).shape == (0, n_out)
    if n_in == 0:
        assert torch.equal(y, layer.bias.expand(5, n_out)) and layer.bits_per_weight == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtype": torch.int8}, TypeError, "dtype int8; allowed are float32"),
        ({"in_features": -1}, ValueError, "in_features is -1; it must be 0 or more"),
        ({"out_features": 2.5}, TypeError, "out_features must be an integer"),
        ({"scheme": "w9"}, ValueError, "1..8"),
        ({"scheme": "q4"}, ValueError, "'q4' names no scheme"),
        ({"scheme": None}, TypeError, "scheme must be a Scheme or its short name"),
    ],
)
def test_bad_arguments_of_the_constructor(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        PackedLinearLayer(**({"in_features": 4, "out_features": 4} | arguments))


def test_meta_then_real() -> None:
    layer = PackedLinearLayer(45, 10, device="meta", dtype=torch.bfloat16)
    assert layer.scales.is_meta and layer.weight.is_meta and layer.weight.shape == (10, 45)
    layer.to_empty(device="cpu").reset_parameters()
    assert 0 < layer.weight.abs().max() <= 1 / math.sqrt(45) * 1.1
    with torch.device("meta"):
        assert PackedLinearLayer(45, 10).packed_weights.is_meta
    meta = PackedLinearLayer.from_float(float_linear(device="meta"), "w3a")
    assert meta.packed_weights.is_meta and meta.bias.is_meta


def test_printed_form() -> None:
    layer = PackedLinearLayer(1000, 32, bias=False, scheme="w4g64a", dtype=torch.bfloat16)
    assert repr(layer) == (
        "PackedLinearLayer(in_features=1000, out_features=32, bias=False, dtype=bfloat16, "
        "weights=w4g64a, 17,280 bytes)"
    )
    assert "bytes" in repr(PackedLinearLayer(10, 3, device="meta"))


# ---- quantize, from_float, from_packed -------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_from_float_packs_the_matrix(scheme: str) -> None:
    linear = float_linear(dtype=torch.bfloat16).eval()
    layer = PackedLinearLayer.from_float(linear, scheme)
    wanted = pack_matrix(linear.weight.detach(), scheme)
    for name in BUFFERS:
        mine, theirs = getattr(layer, name), getattr(wanted, name)
        assert (mine is None and theirs is None) or torch.equal(mine, theirs)
    assert torch.equal(layer.weight, wanted.dequantize()) and not layer.training
    assert layer.bias.data_ptr() == linear.bias.data_ptr() and not layer.bias.requires_grad
    again = PackedLinearLayer.from_packed(layer.packed(), layer.bias)
    assert same_state(again, layer) and again.packed_weights is layer.packed_weights


def test_importance_goes_to_the_choice_of_levels() -> None:
    linear, importance = float_linear(), torch.arange(45.0)
    layer = PackedLinearLayer.from_float(linear, "kmeans2", importance=importance)
    wanted = pack_matrix(linear.weight.detach(), "kmeans2", importance=importance)
    assert torch.equal(layer.codebook, wanted.codebook)
    layer.quantize(linear.weight)
    assert not torch.equal(layer.codebook, wanted.codebook)


def test_from_packed_refuses() -> None:
    good = pack_matrix(torch.ones(3, 4), "w4")
    with pytest.raises(ValueError, match=r"bias has shape \(4,\); expected \(3,\)"):
        PackedLinearLayer.from_packed(good, torch.ones(4))
    with pytest.raises(TypeError, match="packed is a Tensor; pack_matrix makes one"):
        PackedLinearLayer.from_packed(torch.ones(3, 4))
    with pytest.raises(TypeError, match="holds ndarrays"):
        PackedLinearLayer.from_packed(pack_matrix(torch.ones(3, 4).numpy(), "w4"))


def test_scales_are_rounded_to_the_layers_dtype_before_codes_are_made() -> None:
    weight = torch.randn(64, 64)
    layer = PackedLinearLayer(64, 64, scheme="w8", dtype=torch.bfloat16)
    layer.quantize(weight)
    int8 = QWQALinearLayer(64, 64, dtype=torch.bfloat16)
    int8.quantize(weight)
    assert torch.equal(layer.scales[:, 0], int8.scales)
    assert torch.equal(layer.packed_weights.view(torch.int8), int8.int8_weights)
    assert layer.scheme == Scheme.int8()


def test_quantize_takes_another_shape() -> None:
    layer = PackedLinearLayer(8, 4, scheme="w4g8")
    layer.quantize(torch.randn(9, 20, dtype=torch.float64))
    assert (layer.in_features, layer.out_features, layer.scales.shape) == (20, 9, (9, 3))
    assert torch.equal(layer.bias, torch.zeros(9)) and layer.scales.dtype == torch.float32
    x = torch.randn(2, 20)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight))


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (torch.zeros(4, 8, dtype=torch.int8), TypeError, "int8"),
        ([[1.0]], TypeError, "weights is a list"),
        (torch.zeros(8), ValueError, r"shape \(8,\); expected \[out_features, in_features\]"),
        (torch.tensor([[1.0, 2.0], [math.nan, 0.0]]), ValueError, r"weights.*nan.*\[?1, 0"),
    ],
)
def test_quantize_refuses_and_leaves_the_layer_alone(
    weights: Any, error: type[Exception], message: str
) -> None:
    layer = PackedLinearLayer(8, 4)
    before = copy.deepcopy(layer)
    with pytest.raises(error, match=message):
        layer.quantize(weights)
    assert same_state(layer, before) and (layer.in_features, layer.out_features) == (8, 4)


def test_a_group_with_nan_can_be_marked() -> None:
    linear = float_linear()
    with torch.no_grad():
        linear.weight[3, 5] = math.nan
    layer = PackedLinearLayer.from_float(linear, "w4g16", nonfinite="mark")
    y = layer(torch.randn(4, 45))
    assert torch.isnan(y).all(dim=0).nonzero().flatten().tolist() == [3]
    with pytest.raises(ValueError, match=r"head\.weight.*nan"):
        PackedLinearLayer.from_float(linear, "w4g16", name="head.weight")


def test_from_float_says_what_it_cannot_take() -> None:
    for module, message in ((nn.LazyLinear(3), "lazy"), (nn.Conv2d(1, 1, 1), "not nn.Linear")):
        with pytest.raises(TypeError, match=message):
            PackedLinearLayer.from_float(module, "w4")


def test_from_float_draws_no_random_numbers() -> None:
    linear = float_linear()
    state = torch.get_rng_state()
    PackedLinearLayer.from_float(linear, "w4")
    assert torch.equal(state, torch.get_rng_state())


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


# ---- the weight ------------------------------------------------------------------------------


def test_weight_cannot_be_assigned() -> None:
    layer = packed()
    assert not layer.weight.requires_grad and "weight" not in layer.state_dict()
    for value in (torch.zeros(10, 45), nn.Parameter(torch.zeros(10, 45)), None):
        with pytest.raises(AttributeError, match=r"call layer\.quantize\(weights\)"):
            layer.weight = value
    with pytest.raises(AttributeError, match="cannot be assigned"):
        layer.register_parameter("weight", nn.Parameter(torch.zeros(10, 45)))
    with pytest.raises(AttributeError):
        layer.scheme = Scheme.int8()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_decode_to_the_same_numbers_in_torch_alone(scheme: str) -> None:
    layer = packed(scheme)
    parts = [getattr(layer, name) for name in BUFFERS]
    assert torch.equal(decode_rows(*parts, layer._bits, layer._group, 45), layer.weight)


# ---- dtypes and copies -----------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_casts_touch_floats_and_never_codes(scheme: str) -> None:
    layer = packed(scheme)
    x, wanted = torch.randn(3, 45), layer(torch.ones(1, 45))
    for move, dtype in (
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.half(), torch.float16),
        (lambda m: m.double(), torch.float64),
    ):
        moved = move(copy.deepcopy(layer))
        forms = layer.scheme.buffers((10, 45), dtype)
        for name, form in forms.items():
            buffer = getattr(moved, name)
            assert buffer.dtype == getattr(torch, form.dtype)
            assert form.dtype != "uint8" or torch.equal(buffer, getattr(layer, name))
        assert moved.dtype == moved.weight.dtype == moved.bias.dtype == dtype
        assert relative(moved(torch.ones(1, 45)), wanted) < 0.02
        assert moved(x.to(dtype)).dtype == dtype
    assert layer.to("meta").packed_weights.is_meta


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "share_memory", "module"])
def test_copies_compute_the_same(way: str, tmp_path: Path) -> None:
    layer, x = packed().eval(), torch.randn(3, 45)
    wanted = layer(x)
    if way == "deepcopy":
        other = copy.deepcopy(layer)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    elif way == "torch.save":
        torch.save(layer.state_dict(), tmp_path / "state.pt")
        other = PackedLinearLayer(45, 10, scheme=layer.scheme)
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    elif way == "share_memory":
        other = layer.share_memory()
        assert other.packed_weights.is_shared()
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert torch.equal(other(x), wanted) and other.scheme == layer.scheme


def test_safetensors_round_trip(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    layer = packed(dtype=torch.bfloat16)
    safetensors.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = PackedLinearLayer(45, 10, scheme=layer.scheme, dtype=torch.bfloat16)
    other.load_state_dict(safetensors.load_file(tmp_path / "layer.safetensors"))
    assert same_state(other, layer)


# ---- loading ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("assign", [False, True])
def test_a_float_checkpoint_is_quantized(scheme: str, assign: bool) -> None:
    linear = float_linear(dtype=torch.bfloat16)
    layer = PackedLinearLayer(45, 10, scheme=scheme)
    result = layer.load_state_dict(linear.state_dict(), assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    assert layer.dtype == (torch.bfloat16 if assign else torch.float32)
    wanted = PackedLinearLayer(45, 10, scheme=scheme, dtype=layer.dtype)
    wanted.quantize(linear.weight)
    assert torch.equal(layer.packed_weights, wanted.packed_weights)
    assert torch.equal(layer.weight, wanted.weight)
    assert torch.equal(layer.bias, linear.bias.to(layer.dtype))


def test_assign_brings_a_meta_layer_to_life() -> None:
    source = packed()
    for state in (source.state_dict(), float_linear().state_dict()):
        layer = PackedLinearLayer(45, 10, scheme=source.scheme, device="meta")
        layer.load_state_dict(state, assign=True)
        assert torch.isfinite(layer(torch.randn(2, 45))).all()


def state_of(scheme: str, **shape: int) -> dict[str, torch.Tensor]:
    sizes = {"in_features": 45, "out_features": 10} | shape
    return PackedLinearLayer(**sizes, scheme=scheme).state_dict()


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize(
    ("state", "message"),
    [
        (state_of("w3g16a"), r"fc\.packed_weights.*\(10, 17\).*\(10, 23\).*scheme w4g16a"),
        (state_of("w4g8a"), r"fc\.scales.*\(10, 6\).*\(10, 3\).*scheme w4g16a"),
        (state_of("w4g16"), r"without fc\.zero_points"),
        (state_of("w4g16af"), r"size mismatch for fc\.zero_points.*\(10, 3\).*\(10, 2\)"),
        (state_of("w4g16a+dq"), "fc.scale_steps is there, and scheme w4g16a has no such tensor"),
        (state_of("nf4g16"), "fc.codebook is there, and scheme w4g16a has no such tensor"),
        (state_of("w4g16a", out_features=9), r"size mismatch for fc\.packed_weights"),
        (state_of("w4g16a") | {"codebook": torch.ones(1, 16)}, "fc.codebook is there.*w4g16a has"),
        (QWQALinearLayer(45, 10).state_dict(), "fc.int8_weights is there, and scheme w4g16a"),
        (state_of("w4g16a") | {"weight": torch.ones(10, 45)}, "keep one of them"),
        ({"packed_weights": torch.zeros(10, 23, dtype=torch.uint8)}, "without fc.scales"),
        ({"weight": torch.zeros(10, 44)}, r"size mismatch for fc.weight.*\(10, 44\)"),
        ({"weight": torch.full((10, 45), math.nan)}, "fc.weight.*nan"),
        ({"weight": torch.zeros(10, 45, dtype=torch.uint8)}, "fc.weight has dtype uint8"),
        (state_of("w4g16a") | {"packed_weights": torch.zeros(10, 23)}, "codes are uint8"),
    ],
)
def test_a_checkpoint_that_does_not_fit(
    state: dict[str, Any], message: str, strict: bool, assign: bool
) -> None:
    model = nn.ModuleDict({"fc": packed("w4g16a")})
    before = copy.deepcopy(model)
    full = {f"fc.{key}": value for key, value in state.items()}
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(full, strict=strict, assign=assign)
    assert same_state(model, before)


@pytest.mark.parametrize("scheme", ["nf4g16", "nf4g16+dq", "mxfp4", "binary"])
def test_a_checkpoint_of_other_levels(scheme: str) -> None:
    layer = packed(scheme)
    state = layer.state_dict()
    for dtype in (torch.bfloat16, torch.float32):  # levels rounded once still are the same ones
        layer.to(dtype).load_state_dict(state)
    state["codebook"] = state["codebook"].flip(1)
    before = copy.deepcopy(layer)
    message = f"codebook has other levels than scheme {layer.scheme}: the checkpoint"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        layer.load_state_dict(state)
    assert same_state(layer, before)
    fitted = packed("kmeans3")
    fitted.load_state_dict(packed("kmeans3").state_dict())


# ---- from one form to another ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_the_int8_layer_is_the_8_bit_case(dtype: torch.dtype, bias: bool) -> None:
    int8 = QWQALinearLayer.from_float(float_linear(dtype=dtype, bias=bias)).eval()
    layer = int8.to_scheme(Scheme.int8())
    assert type(layer) is PackedLinearLayer and not layer.training
    # A packed weight is computed in float32 whatever its dtype: codes and scales are the same.
    same = torch.equal if dtype != torch.float64 else torch.allclose
    assert same(layer.weight, int8.weight) and layer.dtype == dtype
    assert layer.packed_weights.data_ptr() == int8.int8_weights.data_ptr()
    back = layer.to_int8()
    assert same_state(back, int8) and not back.training
    grouped = int8.to_scheme("w8g7")
    assert same(grouped.weight, int8.weight) and grouped.scales.shape == (10, 7)
    x = torch.randn(3, 45).to(dtype)
    torch.testing.assert_close(layer(x), int8(x))


@pytest.mark.parametrize("scheme", ["w2", "w5", "w7a", "w8", "w1a", "w6t", "ternary", "binary"])
def test_to_int8_is_exact_where_the_codes_are_whole(scheme: str) -> None:
    layer = packed(scheme)
    assert torch.equal(layer.to_int8().weight, layer.weight)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("w4g16", "gives a row 3 scales, and int8 layers have one"),
        ("w8g16a", "gives a row 3 scales"),
        ("w8a", r"do not stand for whole numbers of -128\.\.127"),
        ("nf4r", "do not stand for whole numbers"),
        ("kmeans3", "do not stand for whole numbers"),
        ("w4raf", "do not stand for whole numbers"),
    ],
)
def test_to_int8_refuses_what_would_not_be_exact(scheme: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        packed(scheme).to_int8()


@pytest.mark.parametrize(
    ("scheme", "wider"),
    [
        ("w4g16", "w5g16"),
        ("w4g16", "w8g8"),
        ("w3a", "w4"),
        ("w3g32a", "w8g16"),
        ("w2", "w2g5"),
        ("ternary", "w2"),
        ("ternaryg16", "w4g8"),
        ("binary", "w3"),
        ("w4t", "w5t"),
        ("w4t", "w5g8"),
    ],
)
def test_wider_codes_hold_the_same_weight(scheme: str, wider: str) -> None:
    layer = packed(scheme)
    new = layer.to_scheme(wider)
    assert torch.equal(new.weight, layer.weight) and str(new.scheme) == wider
    assert torch.equal(new.bias, layer.bias)


@pytest.mark.parametrize(
    "other", ["w3", "w4g16", "w4g9a", "w8g32", "nf4g16", "mxfp4", "w8g16+dq", "w8t"]
)
def test_narrower_codes_are_quantized_anew(other: str) -> None:
    layer = packed("w4g16a")
    new = layer.to_scheme(other)
    wanted = pack_matrix(layer.weight, other)
    assert torch.equal(new.packed_weights, wanted.packed_weights)
    assert torch.equal(new.weight, wanted.dequantize())
    assert layer.to_scheme("w4g16a").packed_weights is layer.packed_weights


def test_conversions_on_meta_give_shapes() -> None:
    int8 = QWQALinearLayer(45, 10, device="meta")
    layer = int8.to_scheme("w4g16a")
    assert layer.packed_weights.is_meta and layer.packed_weights.shape == (10, 23)
    assert int8.to_scheme("int8").to_int8().int8_weights.is_meta


def test_back_to_float() -> None:
    layer = packed(dtype=torch.bfloat16).eval()
    linear = layer.dequantize()
    assert type(linear) is nn.Linear and not linear.training
    assert torch.equal(linear.weight, layer.weight) and torch.equal(linear.bias, layer.bias)
    again = PackedLinearLayer.from_float(linear, dataclasses.replace(layer.scheme))
    assert relative(again.weight, layer.weight) < 0.02
