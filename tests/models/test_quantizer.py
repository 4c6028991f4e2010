"""Models quantized by recipes, of several kinds, and back to float."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn

from quantization import (
    PackedEmbedding,
    PackedLinearLayer,
    QWQALinearLayer,
    Target,
    dequantize_model,
    quantize_model,
    replace_linear_layers_with_w8a16,
)
from quantization.layers.quantized_module import QuantizedModule
from tests.models.small_models import TOKENS, Model, schemes, snapshot, statuses
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    got, wanted = got.detach().double(), wanted.detach().double()
    assert got.shape == wanted.shape
    return float((got - wanted).norm() / wanted.norm())


# ---- a second call ---------------------------------------------------------------------------


def test_a_second_call_changes_nothing() -> None:
    model = Model(tied=True)
    recipe = {nn.Embedding: "w8", "head": "w8", "*": "w4g16a"}
    first = quantize_model(model, recipe)
    before = snapshot(model)
    again = quantize_model(model, recipe)
    assert snapshot(model) == before
    assert set(statuses(again).values()) == {"already"} and not any(c.reason for c in again)
    assert again.bytes_before == again.bytes_after == 0
    assert again.model_bytes_before == again.model_bytes_after == first.model_bytes_after
    assert again.coverage == pytest.approx(first.coverage)
    assert again.bits_per_weight == first.bits_per_weight
    assert "4 already quantized" in repr(again)


def test_quantized_layers_stay_unless_a_rule_names_their_type() -> None:
    model = Model()
    replace_linear_layers_with_w8a16(model, Target.Linear(QWQALinearLayer), ["head"])
    report = quantize_model(model, "w4")
    assert schemes(model)["body.up"] == "QWQALinearLayer" and schemes(model)["head"] == "w4"
    assert report["body.up"].status == "already"
    assert report["body.up"].reason == "a rule for the type QWQALinearLayer would make it w4"
    weight = model.body.up.weight
    report = quantize_model(model, {QWQALinearLayer: "w8g16"})
    assert [c.name for c in report.replaced] == ["body.up", "body.down"]
    assert torch.equal(model.body.up.weight, weight)
    quantize_model(model, {"head": None, PackedLinearLayer: "w3a"})
    assert schemes(model)["body.up"] == "w3a" and schemes(model)["head"] == "w4"
    before = snapshot(model)
    quantize_model(model, {"head": None, PackedLinearLayer: "w3a"})
    assert snapshot(model) == before


def test_the_int8_replacement_leaves_packed_layers_and_takes_the_class() -> None:
    model = Model()
    quantize_model(model, {"head": "w8"})
    report = replace_linear_layers_with_w8a16(model, Target.Linear(QWQALinearLayer))
    assert [c.name for c in report.left] == ["head"] and len(report.replaced) == 2
    assert report["head"].reason.startswith("quantized already, as a PackedLinearLayer")
    model = Model()
    report = replace_linear_layers_with_w8a16(model, Target.Linear(PackedLinearLayer), ["head"])
    assert schemes(model)["body.up"] == "w4g64a" == report["body.up"].scheme
    assert "scheme" in report.to_text().splitlines()[1]


def test_another_call_may_go_further() -> None:
    model = Model()
    quantize_model(model, {"head": "w8"})
    report = quantize_model(model, {"head": "w8", "*": "w4"})
    assert [c.name for c in report.replaced] == ["body.up", "body.down"]


# ---- kinds of model --------------------------------------------------------------------------


def test_the_model_itself_may_be_the_layer() -> None:
    for layer, kind in (
        (nn.Linear(32, 8), PackedLinearLayer),
        (nn.Embedding(8, 32), PackedEmbedding),
    ):
        report = quantize_model(layer, {type(layer): "w4"})
        assert type(report.model) is kind and "go on with report.model" in repr(report)
        assert type(dequantize_model(report.model).model) is type(layer)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torchs_transformer_does_not_bypass_the_layers(mode: Any) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 32)
    with mode():
        wanted = model(x)
        report = quantize_model(model, "w8")
        assert relative(model(x), wanted) < 0.02
        assert not report.left and len(report.replaced) == 12
        quantized = model(x)
        dequantize_model(model)
        assert relative(model(x), quantized) < 1e-5
    assert type(model.layers[0].linear1) is nn.Linear


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torchs_transformer_may_make_nested_tensors_of_a_mask() -> None:
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0), 2
    ).eval()
    x, mask = torch.randn(2, 5, 32), torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = True
    with torch.no_grad():
        wanted = model(x, src_key_padding_mask=mask)
        quantize_model(model, "w8")
        assert relative(model(x, src_key_padding_mask=mask)[~mask], wanted[~mask]) < 0.02


def test_an_embedding_that_cannot_be_converted_is_left_with_its_reason() -> None:
    model = nn.ModuleDict(
        {"shrinking": nn.Embedding(4, 8, max_norm=1.0), "bag": nn.EmbeddingBag(4, 8)}
    )
    with pytest.warns(UserWarning, match="no layer was replaced: shrinking is max_norm"):
        report = quantize_model(model, {nn.Embedding: "w8"})
    assert statuses(report) == {"shrinking": "left"}
    with pytest.warns(UserWarning, match="no layer was replaced: the model has no layers"):
        quantize_model(nn.Sequential(nn.ReLU()), "w4")
    with pytest.warns(
        UserWarning, match="no layer was replaced: the model has no quantized layers"
    ):
        dequantize_model(nn.Linear(2, 2))


def test_a_state_dict_goes_from_model_to_model() -> None:
    recipe = {"*": "w4g16a", nn.Embedding: "w8"}
    model, twin, empty = Model(), Model(), Model().to("meta")
    for each in (model, twin, empty):
        quantize_model(each, recipe)
    twin.load_state_dict(model.state_dict())
    empty.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    fresh = Model()
    from_float = quantize_model(copy.deepcopy(fresh), recipe).model
    model.load_state_dict(fresh.state_dict())
    assert torch.equal(model(TOKENS), from_float(TOKENS))
    assert torch.equal(twin(TOKENS), empty(TOKENS))
    assert torch.equal(pickle.loads(pickle.dumps(twin))(TOKENS), twin(TOKENS))
    other = quantize_model(Model(), {"*": "w4g8a", nn.Embedding: "w8"}).model
    with pytest.raises(RuntimeError, match=r"\(this layer has scheme w4g8a\)"):
        other.load_state_dict(twin.state_dict())


# ---- the report ------------------------------------------------------------------------------


def test_figures_of_the_report() -> None:
    model = Model()
    report = quantize_model(model, {"head": "w8", "*": "w4", "embed": "w3"})
    tensors = [*model.parameters(), *model.buffers()]
    assert report.model_bytes_after == sum(tensor.nbytes for tensor in tensors)
    layers = [m for m in model.modules() if isinstance(m, QuantizedModule)]
    assert report.bytes_after == sum(layer.footprint for layer in layers)
    count = sum(math.prod(layer._weight_shape()) for layer in layers)
    assert report.bits_per_weight == 8 * sum(layer.nbytes for layer in layers) / count
    assert report.coverage == pytest.approx(count / (count + 48))
    lines = repr(report).splitlines()
    assert lines[0] == "ReplacementReport by quantize_model: 4 of 4 layers replaced"
    assert lines[1].split()[:3] == ["layer", "scheme", "bits"]
    assert "quantized weights, 5." in report.to_text()


def test_no_float_weight_is_kept_alive() -> None:
    model = Model()
    alive = weakref.ref(model.head.weight)
    report = quantize_model(model, "w4")
    gc.collect()
    assert alive() is None and report.replaced


def test_back_to_float() -> None:
    model = Model()
    replace_linear_layers_with_w8a16(model, Target.Linear(QWQALinearLayer), ["up"])
    quantize_model(model, {"*": "w4g16a", nn.Embedding: "w8"})
    wanted = model(TOKENS)
    report = dequantize_model(model)
    assert {type(m) for m in model.modules() if not list(m.children())} == {nn.Linear, nn.Embedding}
    assert relative(model(TOKENS), wanted) < 1e-5
    assert len(report.replaced) == len(report) == 4 and report.coverage == 0
    assert report.model_bytes_after == sum(p.nbytes for p in Model().parameters())
    assert "by dequantize_model: 4 of 4 quantized layers replaced" in repr(report)
    assert [c.reason for c in report] == ["was w8", "was w4g16a", "was int8", "was int8"]
    assert all(p.requires_grad for p in model.parameters())
    with pytest.warns(UserWarning, match="no quantized layers"):
        dequantize_model(model)


# ---- models of transformers ------------------------------------------------------------------


def llama(**options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **options,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_a_llama(dtype: torch.dtype, tied: bool) -> None:
    model = llama(tie_word_embeddings=tied).to(dtype)
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        wanted = model(ids).logits
        recipe = {"lm_head": "w8", nn.Embedding: "w8", "re:mlp": "w7g16", "*": "w8g16a"}
        report = quantize_model(model, recipe, strict=True)
        assert len(report.replaced) == 2 * 7 + 2 and report.coverage > 0.98
        got = model(ids).logits
        assert relative(got, wanted) < 0.1 and got.dtype == dtype
        assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] <= 8
        is_shared = model.lm_head.packed_weights is model.model.embed_tokens.packed_weights
        assert is_shared == tied
        dequantize_model(model)
        assert relative(model(ids).logits, got) < (1e-5 if dtype == torch.float32 else 0.05)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_a_gpt2() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.tensor([[1, 2, 3, 4]])
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        wanted = model(ids).logits
        report = quantize_model(model, {"re:wte|lm_head": "w8", "*": "w8g16"})
        assert len(report.replaced) == 2 * 4 + 2 and not report.left
        got = model(ids).logits
        assert relative(got, wanted) < 0.05
        assert model.lm_head.packed_weights is model.transformer.wte.packed_weights
        model.load_state_dict(state)  # Conv1D weights come turned
        assert torch.equal(model(ids).logits, got)
        dequantize_model(model)
        assert relative(model(ids).logits, got) < 1e-5


# ---- int8 layers -----------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_w8a16_makes_int8_layers(device: str) -> None:
    model = Model().to(device)
    by_hand = copy.deepcopy(model)
    report = quantize_model(model, {"head": None, "up": "w8a16", "*": "w4g32"})
    assert type(model.body.up) is QWQALinearLayer and type(model.body.down) is PackedLinearLayer
    assert report["body.up"].scheme == ""
    assert report["body.up"].bits_per_weight == 9.0  # 8, and a scale of 32 bits for 32 columns
    replace_linear_layers_with_w8a16(by_hand, QWQALinearLayer, ["head", "down"])
    if device == "cpu":
        assert torch.equal(model.body.up.int8_weights, by_hand.body.up.int8_weights)
        assert torch.equal(model.body.up.scales, by_hand.body.up.scales)
    again = quantize_model(model, {"up": "w8a16", "*": "w4g32"}, exclude="head")
    assert {c.reason for c in again.already} == {""} and not again.replaced


def test_packed_layers_become_int8_ones_where_that_is_exact() -> None:
    model = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 8))
    quantize_model(model, "w5")
    weight = model[0].weight
    quantize_model(model, {PackedLinearLayer: "w8a16"})
    assert type(model[0]) is QWQALinearLayer and torch.equal(model[0].weight, weight)
    model = nn.Sequential(nn.Linear(64, 8))
    quantize_model(model, "w5g32")
    with pytest.raises(ValueError, match="gives a row 2 scales"):
        quantize_model(model, {PackedLinearLayer: "w8a16"})
    assert type(model[0]) is PackedLinearLayer


def test_an_embedding_is_no_int8_layer() -> None:
    model = Model()
    with pytest.raises(ValueError, match=r"'embed' matches the embedding body\.embed, and w8a16"):
        quantize_model(model, {"embed": "w8a16", "*": "w4"})
    assert type(model.body.up) is nn.Linear
