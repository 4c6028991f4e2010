"""The packed layer: what it holds, how it is made, what its weight is."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn
from torch.nn import functional as F

from quantization import PackedLinearLayer, QWQALinearLayer, Scheme, pack_matrix
from quantization.ops.packed_rows import decode_rows
from quantization.schemes.packed_weights import PARTS
from tests.layers.packed_layers import FLOATS, SCHEMES, float_linear, packed, relative, same_state
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

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
    for name in PARTS:
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
    parts = [getattr(layer, name) for name in PARTS[:5]]
    assert torch.equal(decode_rows(*parts, layer._bits, layer._group, 45), layer.weight)
