"""How the packed layer travels: casts, copies, checkpoints, and into layers of another form."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn

from quantization import PackedLinearLayer, QWQALinearLayer, Scheme, pack_matrix
from tests.layers.packed_layers import FLOATS, SCHEMES, float_linear, packed, relative, same_state
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

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
