"""A packed layer whose columns are stored in an order of their own: everywhere it may travel."""

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
    PackedWeights,
    QWQALinearLayer,
    Scheme,
    dequantize_model,
    load_quantized,
    pack_matrix,
    quantize_model,
    save_quantized,
)
from quantization.checkpoint.disk.json_files import CheckpointError
from quantization.checkpoint.stored_model import stored_model
from quantization.distributed.shares import shard
from quantization.formats import FormatError, writer
from tests.layers.packed_layers import check_torch_features
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

NAMES = ["w4g16", "w3g16a", "nf4g16+dq", "w8g40", "ternaryg16", "w4g16af"]


def ordered(name: str = "w4g16", rows: int = 24, cols: int = 72) -> PackedLinearLayer:
    """A layer with shuffled columns and a bias."""
    order = torch.randperm(cols, dtype=torch.int32)
    packed = pack_matrix(torch.randn(rows, cols), name)
    scheme = dataclasses.replace(packed.scheme, input_order=True)
    packed = dataclasses.replace(packed, scheme=scheme, input_order=order)
    return PackedLinearLayer.from_packed(packed, torch.randn(rows))


def weight_by_definition(layer: PackedLinearLayer) -> torch.Tensor:
    """Column ``input_order[k]`` of the weight is stored column k."""
    packed = layer.packed()
    plain = dataclasses.replace(packed.scheme, input_order=False)
    stored = dataclasses.replace(packed, scheme=plain, input_order=None).dequantize()
    weight = torch.full_like(stored, torch.nan)
    for k, column in enumerate(packed.input_order.tolist()):
        weight[:, column] = stored[:, k]
    return weight


@pytest.mark.parametrize("name", NAMES)
def test_weight_codes_and_product_are_those_of_the_matrix(name: str) -> None:
    layer, x = ordered(name), torch.randn(2, 3, 72, requires_grad=True)
    weight = weight_by_definition(layer)
    assert torch.equal(layer.weight, weight) and torch.equal(layer.dequantize().weight, weight)
    exact = nn.functional.linear(x.double(), weight.double(), layer.bias.double())
    found = layer(x)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)
    grad = torch.randn_like(found)
    (mine,) = torch.autograd.grad(found, x, grad)
    torch.testing.assert_close(mine.double(), grad.double() @ weight.double(), rtol=1e-5, atol=1e-4)
    stored = layer.codes.clone()
    layer.input_order.copy_(torch.arange(72))
    assert not torch.equal(layer.codes, stored)


def test_names_and_plain_values() -> None:
    scheme = Scheme.parse("w4g16a+f16+order")
    assert scheme.input_order and str(scheme) == "w4g16a+f16+order"
    assert Scheme.from_dict(scheme.to_dict()) == scheme
    assert "input_order" not in Scheme.parse("w4g16").to_dict()
    assert scheme.nbytes((8, 32)) == Scheme.parse("w4g16a+f16").nbytes((8, 32)) + 4 * 32
    with pytest.raises(ValueError, match="input_order says which columns are of one group"):
        Scheme.parse("w4+order")
    with pytest.raises(ValueError, match="says twice the order of the columns"):
        Scheme.parse("w4g16+order+order")
    with pytest.raises(TypeError, match="input_order must be True or False, not 1"):
        Scheme(4, input_order=1)
    with pytest.raises(ValueError, match=r"take it without \+order, \+cols for an embedding"):
        PackedEmbedding(8, 32, scheme="w4g16+order")


def test_what_is_quantized_here_keeps_its_order() -> None:
    weight = torch.randn(8, 40)
    plain, packed = pack_matrix(weight, "w4g16"), pack_matrix(weight, "w4g16+order")
    assert packed.input_order.tolist() == list(range(40))
    assert torch.equal(packed.dequantize(), plain.dequantize())
    assert pack_matrix(weight.to("meta"), "w4g16+order").input_order.is_meta
    assert pack_matrix(weight.numpy(), "w4g16+order").input_order.dtype == "int32"
    model = quantize_model(nn.Sequential(nn.Linear(40, 8)), "w4g16+order").model
    assert model[0].input_order.tolist() == list(range(40))


def test_an_order_must_have_each_column_once(tmp_path: Path) -> None:
    layer = ordered()
    wrong = layer.input_order.clone()
    wrong[0] = wrong[1]
    packed = dataclasses.replace(layer.packed(), input_order=wrong)
    with pytest.raises(ValueError, match=r"each of the columns 0\.\.71 once"):
        PackedLinearLayer.from_packed(packed)
    state = layer.state_dict() | {"input_order": wrong}
    with pytest.raises(RuntimeError, match=r"input_order must have each of the columns"):
        copy.deepcopy(layer).load_state_dict(state)
    for order in (wrong.long(), wrong[1:], None):
        with pytest.raises((TypeError, ValueError), match="input_order"):
            PackedWeights(packed.scheme, packed.shape, packed.packed_weights, packed.scales,
                          input_order=order)  # fmt: skip


def test_state_dicts_copies_and_casts() -> None:
    layer, x = ordered("w4g16a"), torch.randn(2, 72)
    fresh = PackedLinearLayer(72, 24, scheme=layer.scheme)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.input_order.dtype is torch.int32 and half.scales.dtype is torch.bfloat16
    with pytest.raises(RuntimeError, match="has no such tensor"):
        PackedLinearLayer(72, 24, scheme="w4g16a").load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match="without input_order"):
        PackedLinearLayer(72, 24, scheme="w4g16a+order").load_state_dict(
            PackedLinearLayer(72, 24, scheme="w4g16a").state_dict()
        )


def test_folders(tmp_path: Path) -> None:
    model = nn.Sequential(ordered("w3g16a"), nn.ReLU())
    save_quantized(model, tmp_path / "a")
    again = load_quantized(tmp_path / "a", nn.Sequential(nn.Linear(72, 24), nn.ReLU()), verify=True)
    x = torch.randn(2, 72)
    assert torch.equal(again(x), model(x)) and again[0].scheme == model[0].scheme
    text = (tmp_path / "a/quantization.json").read_text()
    assert '"required_features": [\n  "input_order"\n ]' in text
    save_quantized(nn.Sequential(PackedLinearLayer(8, 8)), tmp_path / "b")
    assert '"required_features": []' in (tmp_path / "b/quantization.json").read_text()
    model[0].input_order[0] = model[0].input_order[1]
    save_quantized(model, tmp_path / "c")
    with pytest.raises((CheckpointError, ValueError), match="each of the columns"):
        load_quantized(tmp_path / "c", nn.Sequential(nn.Linear(72, 24), nn.ReLU()))


def test_other_schemes_and_forms() -> None:
    layer, x = ordered("w4g16"), torch.randn(2, 72)
    wider = layer.to_scheme("w8g8+order")
    assert torch.equal(wider.weight, layer.weight)
    assert torch.equal(wider.input_order, layer.input_order)
    assert (layer.to_scheme("w8g8").weight - layer.weight).abs().max() < 0.05  # quantized anew
    plain = PackedLinearLayer(72, 24, scheme="w4g16")
    assert torch.equal(plain.to_scheme("w8g8+order").weight, plain.weight)
    with pytest.raises(ValueError, match="no exact int8 layer"):
        layer.to_int8()
    one = ordered("w4g128")  # one group, so that the order of columns does not matter to scales
    assert torch.equal(one.to_int8().weight, one.weight)
    assert torch.equal(one.to_scheme("w8").weight, one.weight)
    assert isinstance(one.to_int8(), QWQALinearLayer)
    model = nn.Sequential(copy.deepcopy(layer))
    torch.testing.assert_close(dequantize_model(model).model(x), layer(x), rtol=1e-4, atol=1e-4)


def test_shares() -> None:
    layer, x = ordered("w4g16a", rows=72), torch.randn(2, 72)  # as many rows as columns
    rows = [shard(layer, 0, i, 3) for i in range(3)]
    assert torch.equal(torch.cat([share(x) for share in rows], -1), layer(x))
    with pytest.raises(ValueError, match="1 groups of 72 features cannot be shared by 2"):
        shard(layer, 1, 0, 2)
    assert torch.equal(shard(layer, 1, 0, 1)(x), layer(x))


@pytest.mark.parametrize("name", ["compressed-tensors", "onnx", "gguf"])
def test_formats_whose_groups_are_neighbours_refuse_it(name: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf") if name == "gguf" else None
    options = {"plain": True} if name == "gguf" else {}
    for scheme in ("w4g32", "w4g32af"):
        model = nn.Sequential(ordered(scheme, cols=64))
        with pytest.raises(FormatError, match=r"0.* \(.*\+order.*scattered over the columns"):
            writer(name)(stored_model(model), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_torch_features() -> None:
    layer, x = ordered("w4g16"), torch.randn(3, 72)
    check_torch_features(layer, x)


@pytest.mark.deep
def test_compile_and_export() -> None:
    layer, x = ordered("w4g16"), torch.randn(3, 72)
    expected = layer(x)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)
    exported = torch.export.export(layer, (x,)).module()
    assert torch.equal(exported(x), expected)
