"""A packed layer whose columns have multipliers: everywhere it may travel."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from torch import nn

from quantization import (
    PackedEmbedding,
    PackedLinearLayer,
    Scheme,
    dequantize_model,
    load_quantized,
    pack_matrix,
    quantize_model,
    save_quantized,
)
from quantization.checkpoint.stored_model import stored_model
from quantization.distributed.shares import shard
from quantization.formats import FormatError, writer
from tests.layers.packed_layers import check_torch_features
from tests.packed_calls import check_decoding, same
from tests.packed_oracle import numbers
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

NAMES = ["w4g16+cols", "w3+cols", "w4g16+order+cols", "nf4g16+dq+cols", "ternaryg16+cols",
         "w4g16af+dq+cols", "w2t+cols", "kmeans2r+cols"]  # fmt: skip


def multiplied(name: str = "w4g16+cols", dtype: torch.dtype = torch.float32, rows: int = 24):
    """A layer of 72 columns with multipliers (and shuffled columns) and a bias."""
    packed = pack_matrix(torch.randn(rows, 72).to(dtype), name)
    own = {"input_scale": (torch.rand(72) + 0.25).to(dtype) * torch.randn(72).sign().to(dtype)}
    if packed.scheme.input_order:
        own["input_order"] = torch.randperm(72, dtype=torch.int32)
    return PackedLinearLayer.from_packed(
        dataclasses.replace(packed, **own), torch.randn(rows).to(dtype)
    )


@pytest.mark.parametrize("name", NAMES)
def test_weight_and_product_are_those_of_the_matrix(name: str) -> None:
    layer, x = multiplied(name), torch.randn(2, 3, 72, requires_grad=True)
    assert str(layer.scheme) == name
    check_decoding(layer.packed())
    weight = torch.from_numpy(numbers(layer.packed()))
    torch.testing.assert_close(layer.weight.double(), weight, rtol=1e-6, atol=1e-7)
    found = layer(x)
    exact = nn.functional.linear(x.double(), weight, layer.bias.double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)
    grad = torch.randn_like(found)
    (mine,) = torch.autograd.grad(found, x, grad)
    torch.testing.assert_close(mine.double(), grad.double() @ weight, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_results_have_the_type_of_the_inputs(dtype: torch.dtype) -> None:
    for layer in (multiplied(dtype=dtype), multiplied()):
        x = torch.randn(3, 72).to(dtype)
        exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
        assert layer(x).dtype == dtype
        assert (layer(x).double() - exact).abs().max() < 30 * torch.finfo(dtype).eps + 1e-4


def test_names_fields_and_sizes() -> None:
    scheme = Scheme.parse("w4g16a+f16+order+cols")
    assert scheme.input_scale and scheme.input_order and str(scheme) == "w4g16a+f16+order+cols"
    assert Scheme.from_dict(scheme.to_dict()) == scheme
    assert "input_scale" not in Scheme.parse("w4g16").to_dict()
    assert scheme.buffers((8, 64), "bfloat16")["input_scale"] == ((64,), "bfloat16")
    with pytest.raises(ValueError, match="says twice that columns have multipliers"):
        Scheme.parse("w4+cols+cols")
    with pytest.raises(TypeError, match="input_scale must be True or False, not 1"):
        Scheme(4, input_scale=1)
    with pytest.raises(ValueError, match=r"take it without \+order, \+cols for an embedding"):
        PackedEmbedding(8, 32, scheme="w4g16+cols")


def test_rounding_to_nearest_leaves_multipliers_at_one() -> None:
    weight = torch.randn(8, 40)
    plain, packed = pack_matrix(weight, "w4g16"), pack_matrix(weight, "w4g16+cols")
    assert packed.input_scale.tolist() == [1.0] * 40
    assert torch.equal(packed.dequantize(), plain.dequantize())
    assert pack_matrix(weight.to("meta"), "w4g16+cols").input_scale.is_meta
    assert pack_matrix(weight.numpy(), "w4g16+cols").input_scale.dtype == "float32"
    model = quantize_model(nn.Sequential(nn.Linear(40, 8)), "w4g16+cols:lsq").model
    assert model[0].input_scale.tolist() == [1.0] * 40


def test_numbers_beyond_the_type_become_its_largest() -> None:
    packed = pack_matrix(torch.tensor([[-6e4, 5e4]]).half(), "w8+cols")
    packed = dataclasses.replace(packed, input_scale=torch.tensor([8.0, 8.0]).half())
    assert packed.dequantize().tolist() == [[-65504.0, 65504.0]]


def test_what_is_wrong_is_named() -> None:
    layer = multiplied()
    wrong = layer.input_scale.clone()
    wrong[3] = torch.inf
    with pytest.raises(ValueError, match="input_scale must be finite, and column 3 has inf"):
        PackedLinearLayer.from_packed(dataclasses.replace(layer.packed(), input_scale=wrong))
    with pytest.raises(RuntimeError, match="input_scale must be finite"):
        layer.load_state_dict(layer.state_dict() | {"input_scale": wrong})
    for scale in (wrong[:5], wrong.int(), None):
        with pytest.raises((TypeError, ValueError), match=r"input_scale|float"):
            dataclasses.replace(layer.packed(), input_scale=scale)
    with pytest.raises(RuntimeError, match="has no such tensor"):
        PackedLinearLayer(72, 24, scheme="w4g16").load_state_dict(layer.state_dict())
    with pytest.raises(ValueError, match="has a multiplier for each column, and int8 layers"):
        multiplied("w8+cols").to_int8()


@pytest.mark.parametrize("name", ["w4g16a+cols", "w4g16+order+cols"])
def test_copies_casts_and_folders(name: str, tmp_path: Path) -> None:
    layer, x = multiplied(name), torch.randn(2, 72)
    fresh = PackedLinearLayer(72, 24, scheme=layer.scheme)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.input_scale.dtype is torch.bfloat16 and half(x.bfloat16()).dtype is torch.bfloat16
    model = nn.Sequential(layer, nn.ReLU())
    save_quantized(model, tmp_path / "a")
    again = load_quantized(tmp_path / "a", nn.Sequential(nn.Linear(72, 24), nn.ReLU()), verify=True)
    assert same(again[0].packed(), layer.packed()) and torch.equal(again(x), model(x))
    assert '"input_scale"\n ]' in (tmp_path / "a/quantization.json").read_text()
    torch.testing.assert_close(dequantize_model(model).model(x), again(x), rtol=1e-4, atol=1e-4)


def test_other_schemes() -> None:
    layer = multiplied("w4g16+order+cols")
    for name in ("w8g8+order+cols", "w5g16+order+cols"):
        wider = layer.to_scheme(name)
        assert torch.equal(wider.weight, layer.weight)
        assert torch.equal(wider.input_scale, layer.input_scale)
    assert torch.equal(multiplied("w4+cols").to_scheme("w5g72+order+cols").input_order,
                       torch.arange(72, dtype=torch.int32))  # fmt: skip
    one = multiplied("w4g128+order+cols")  # one group: the order does not matter to scales
    assert torch.equal(one.to_scheme("w5+cols").weight, one.weight)
    assert (layer.to_scheme("w8g8").weight - layer.weight).abs().max() < 0.1  # quantized anew
    plain = PackedLinearLayer(72, 24, scheme="w4g16")
    assert torch.equal(plain.to_scheme("w8g8+cols").weight, plain.weight)


@pytest.mark.parametrize("name", ["w4g16a+cols", "w4+cols", "w4g16+order+cols"])
def test_shares(name: str) -> None:
    layer, x = multiplied(name, rows=72), torch.randn(2, 72)  # as many rows as columns
    rows = [shard(layer, 0, i, 3) for i in range(3)]
    assert torch.equal(torch.cat([share(x) for share in rows], -1), layer(x))
    if layer.scheme.input_order:
        with pytest.raises(ValueError, match="cannot be shared by 2"):
            shard(layer, 1, 0, 2)
        return
    parts = [shard(layer, 1, i, 2) for i in range(2)]
    left, right = x[:, : parts[0].in_features], x[:, parts[0].in_features :]
    torch.testing.assert_close(parts[0](left) + parts[1](right), layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["compressed-tensors", "onnx", "gguf"])
def test_formats_without_a_place_for_it_refuse(name: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf") if name == "gguf" else None
    options = {"plain": True} if name == "gguf" else {}
    for scheme in ("w4g32+cols", "w4g32af+cols"):
        model = nn.Sequential(nn.Linear(64, 32))
        quantize_model(model, scheme)
        with pytest.raises(FormatError, match=r"0.* \(.*\+cols.*quantize without \+cols"):
            writer(name)(stored_model(model), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_torch_features() -> None:
    layer, x = multiplied("w4g16+order+cols"), torch.randn(3, 72)
    check_torch_features(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16


@pytest.mark.deep
def test_compile_and_export() -> None:
    layer, x = multiplied("w4g16+order+cols"), torch.randn(3, 72)
    expected = layer(x)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), expected)
