"""nn.MultiheadAttention of quantized layers against the float one of the same numbers."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from itertools import product
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn

from quantization import load_quantized, quantize_model, save_quantized
from quantization.layers.attention import IN_PROJECTIONS, LayeredAttention
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

pytestmark = pytest.mark.filterwarnings("ignore")

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False, "batch_first": True},
    "other sizes": {"kdim": 24, "vdim": 40},
    "bias_kv": {"add_bias_kv": True, "batch_first": True},
    "zeros": {"add_zero_attn": True, "add_bias_kv": True},
}


def pair(scheme: str = "w4g16a", **options: Any) -> tuple[nn.Module, nn.Module]:
    """Attention of codes, and the float one of the numbers that they stand for."""
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(32, 4, **options)
    if plain.in_proj_bias is not None:
        nn.init.normal_(plain.in_proj_bias)
        nn.init.normal_(plain.out_proj.bias)
    model = nn.Sequential(copy.deepcopy(plain))
    report = quantize_model(model, scheme)
    assert [c.name for c in report.replaced] == [f"0.{n}" for n in (*IN_PROJECTIONS, "out_proj")]
    layered: Any = model[0]
    assert type(layered) is LayeredAttention and isinstance(layered, nn.MultiheadAttention)
    fill(plain, layered)
    return layered, plain


def fill(plain: Any, layered: Any) -> None:
    """Give float attention the numbers of the layers."""
    with torch.no_grad():
        if plain.in_proj_weight is None:
            assert layered.in_proj_weight is None
            for name in IN_PROJECTIONS:
                getattr(plain, f"{name}_weight").copy_(getattr(layered, name).weight)
        else:
            plain.in_proj_weight.copy_(layered.in_proj_weight)
        plain.out_proj.weight.copy_(layered.out_proj.weight)


def modes() -> list[tuple[bool, bool]]:
    return list(product((True, False), (True, False)))


def grad(enabled: bool) -> AbstractContextManager[Any]:
    return torch.enable_grad() if enabled else torch.no_grad()


def masks() -> dict[str, dict[str, Any]]:
    blocked = torch.rand(5, 7) < 0.3
    blocked[:, 0] = False
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 4:] = True
    numbers = torch.randn(5, 7)
    by_head = torch.randn(12, 5, 7)
    causal = torch.ones(5, 7, dtype=torch.bool).triu(1)
    return {
        "none": {},
        "bool": {"attn_mask": blocked},
        "float": {"attn_mask": numbers},
        "by head": {"attn_mask": by_head},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": padding.float() * -3},
        "both": {"attn_mask": blocked, "key_padding_mask": padding},
        "causal": {"attn_mask": causal, "is_causal": True},
        "causal, padding": {"attn_mask": causal, "is_causal": True, "key_padding_mask": padding},
    }


def inputs(options: dict[str, Any]) -> list[torch.Tensor]:
    sizes = (32, options.get("kdim", 32), options.get("vdim", 32))
    made = [torch.randn(3, 5 if i == 0 else 7, size) for i, size in enumerate(sizes)]
    return made if options.get("batch_first") else [x.transpose(0, 1) for x in made]


def same(got: Any, wanted: Any) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("mask", masks())
def test_all_masks_in_all_modes(kind: str, mask: str) -> None:
    options, given = OPTIONS[kind], masks()[mask]
    layered, plain = pair(**options)
    xs = inputs(options)
    for (train, with_grad), (need, average) in product(modes(), [(0, 0), (1, 1), (1, 0)]):
        layered.train(train), plain.train(train)
        more = {"need_weights": bool(need), "average_attn_weights": bool(average)} | given
        with grad(with_grad):
            same(layered(*xs, **more), plain(*xs, **more))


def test_self_attention_rows_without_a_batch_and_gradients() -> None:
    layered, plain = pair("w8a16", batch_first=True)
    for shape in ((3, 5, 32), (5, 32)):
        x = torch.randn(shape, requires_grad=True)
        other = x.detach().clone().requires_grad_()
        same(layered(x, x, x), plain(other, other, other))
        layered(x, x, x)[0].square().sum().backward()
        plain(other, other, other)[0].square().sum().backward()
        same(x.grad, other.grad)
    with pytest.raises(RuntimeError, match="pass it too"):
        layered(x, x, x, is_causal=True)


@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_with_padding_in_all_modes(norm_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=True, norm_first=norm_first)
    plain = nn.TransformerEncoder(layer, 2)
    model = copy.deepcopy(plain)
    report = quantize_model(model, "w4g16a")
    assert len(report.replaced) == 12 and not report.left
    for own, other in zip(model.layers, plain.layers, strict=True):
        fill(other.self_attn, own.self_attn)
        with torch.no_grad():
            for name in ("linear1", "linear2"):
                getattr(other, name).weight.copy_(getattr(own, name).weight)
    x, padding = torch.randn(3, 6, 32), torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:] = padding[2, 2:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    for (train, with_grad), given in product(
        modes(), [{}, {"src_key_padding_mask": padding}, {"mask": causal, "is_causal": True}]
    ):
        model.train(train), plain.train(train)
        with grad(with_grad):
            got, wanted = model(x, **given), plain(x, **given)
        hidden = padding if "src_key_padding_mask" in given else torch.zeros_like(padding)
        same(got[~hidden], wanted[~hidden])


def test_a_decoder_layer() -> None:
    torch.manual_seed(0)
    plain = nn.TransformerDecoderLayer(32, 4, 48, 0.0, batch_first=True).eval()
    model = copy.deepcopy(plain)
    assert len(quantize_model(model, "w8g16").replaced) == 10
    x, memory = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    with torch.no_grad():
        got = model(x, memory, tgt_mask=mask, tgt_is_causal=True)
        wanted = plain(x, memory, tgt_mask=mask, tgt_is_causal=True)
    assert (got - wanted).abs().max() < 0.05


def test_saved_loaded_and_given_a_float_checkpoint(tmp_path: Any) -> None:
    def fresh() -> nn.Module:
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 1)

    plain = fresh().eval()
    model, x = copy.deepcopy(plain), torch.randn(2, 5, 32)
    quantize_model(model, "w4g16a", exclude="linear1")
    save_quantized(model, tmp_path / "saved")
    with torch.no_grad():
        again = load_quantized(tmp_path / "saved", fresh()).eval()
        assert torch.equal(again(x), model(x))
        other = copy.deepcopy(model)
        other.load_state_dict({k: v * 0.5 for k, v in plain.state_dict().items()})
        half = plain.state_dict()["layers.0.self_attn.in_proj_weight"] * 0.5
        assert (other.layers[0].self_attn.in_proj_weight - half).abs().max() < 0.05
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), model(x))


def test_what_nothing_came_of_stays_what_it_was() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True).eval()
    attention = layer.self_attn
    for options in ({"exclude": "self_attn"}, {"exclude": nn.MultiheadAttention}):
        report = quantize_model(copy.deepcopy(layer), "w4", **options)
        assert len(report.replaced) == 2 and not report.left
    quantize_model(layer, {"linear*": "w4g16", "*": None})
    assert layer.self_attn is attention and layer.activation_relu_or_gelu == 0
    with pytest.raises(ValueError, match="has nan at index"):
        layer.self_attn.in_proj_weight.data[40, 3] = torch.nan
        quantize_model(layer, "w8g16")
    assert layer.self_attn is attention
    assert quantize_model(layer, "w8g16", split_attention=False).left
    assert layer.self_attn is attention
