"""The replacement inside the models that people have: torch's own, and those of transformers."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn

from quantization.linear_layer import QWQALinearLayer, Target, replace_linear_layers_with_w8a16
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

TARGET = Target.Linear(QWQALinearLayer)
pytestmark = pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors", "ignore:enable_nested_tensor is True"
)


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[QWQALinearLayer]:
    """The layers whose forward was called, in order."""
    called: list[QWQALinearLayer] = []
    forward = QWQALinearLayer.forward

    def counting(self: QWQALinearLayer, input: torch.Tensor) -> torch.Tensor:
        called.append(self)
        return forward(self, input)

    monkeypatch.setattr(QWQALinearLayer, "forward", counting)
    return called


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    got, wanted = got.detach().double(), wanted.detach().double()
    assert got.shape == wanted.shape
    return float((got - wanted).norm() / wanted.norm())


MODES: dict[str, Callable[[], Any]] = {
    "grad": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


# ---- torch's transformers --------------------------------------------------------------------


def encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    options = {"batch_first": True, "dropout": 0.0} | options
    return nn.TransformerEncoderLayer(16, 2, 32, **options)


def padding() -> torch.Tensor:
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 3:] = mask[2, 1:] = True
    return mask


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mask", [None, padding()], ids=["no mask", "mask"])
@pytest.mark.parametrize(
    "options",
    [{}, {"activation": "gelu", "norm_first": True}, {"batch_first": False}, {"bias": False}],
    ids=str,
)
def test_encoder_layer(
    mode: str, training: bool, mask: Any, options: dict[str, Any], calls: list[Any]
) -> None:
    model = encoder_layer(**options).train(training)
    x = torch.randn(3, 5, 16) if model.self_attn.batch_first else torch.randn(5, 3, 16)
    with MODES[mode]():
        wanted = model(x, src_key_padding_mask=mask)
        report = replace_linear_layers_with_w8a16(model, TARGET)
        got = model(x, src_key_padding_mask=mask)
    assert [c.name for c in report.replaced] == ["linear1", "linear2"]
    assert [c.name for c in report.left] == ["self_attn.out_proj"]
    assert calls == [model.linear1, model.linear2]
    keep = slice(None) if mask is None or mode == "grad" or training else ~mask
    if not model.self_attn.batch_first:
        got, wanted = got.transpose(0, 1), wanted.transpose(0, 1)
    assert error(got[keep], wanted[keep]) < 0.02


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "mask", [None, padding(), padding().flip(1)], ids=["none", "left", "right"]
)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_encoder(mode: str, training: bool, mask: Any, activation: str, calls: list[Any]) -> None:
    layer = encoder_layer(activation=activation)
    model = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16)).train(training)
    x = torch.randn(3, 5, 16)
    with MODES[mode]():
        wanted = model(x, src_key_padding_mask=mask)
        replace_linear_layers_with_w8a16(model, TARGET)
        got = model(x, src_key_padding_mask=mask)
    assert len(calls) == 4
    nested = mask is not None and error(wanted[mask], torch.ones_like(wanted[mask])) == 1.0
    assert nested == (mode != "grad" and not training and mask is not None and not mask[1, 0])
    keep = slice(None) if mask is None or nested else ~mask
    assert error(got[keep], wanted[keep]) < 0.02


def test_encoder_swapped_from_inside_or_by_hand() -> None:
    model = nn.TransformerEncoder(encoder_layer(), 2).eval()
    inside, by_hand = copy.deepcopy(model), copy.deepcopy(model)
    x = torch.randn(3, 5, 16)
    for layer in inside.layers:
        replace_linear_layers_with_w8a16(layer, TARGET)
    for layer in by_hand.layers:
        layer.linear1 = QWQALinearLayer.from_float(layer.linear1)
        layer.linear2 = QWQALinearLayer.from_float(layer.linear2)
    for mask in (None, padding()):
        with torch.no_grad():
            wanted = model(x, src_key_padding_mask=mask)
            assert error(inside(x, src_key_padding_mask=mask), wanted) < 0.02
            assert error(by_hand(x, src_key_padding_mask=mask), wanted) < 0.02


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict"])
def test_the_fast_path_stays_off_in_copies(way: str, calls: list[Any]) -> None:
    model = nn.TransformerEncoder(encoder_layer(), 2).eval()
    replace_linear_layers_with_w8a16(model, TARGET)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        other = nn.TransformerEncoder(encoder_layer(), 2).eval()
        replace_linear_layers_with_w8a16(other, TARGET, quantize=False)
        other.load_state_dict(model.state_dict())
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        assert torch.equal(other(x), model(x))
    assert len(calls) == 8


def test_an_encoder_that_cannot_be_converted_is_as_it_was() -> None:
    model = nn.TransformerEncoder(encoder_layer(), 2).eval()
    with torch.no_grad():
        model.layers[1].linear2.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"layers\.1\.linear2\.weight"):
        replace_linear_layers_with_w8a16(model, TARGET)
    assert [layer.activation_relu_or_gelu for layer in model.layers] == [1, 1]


def test_an_excluded_encoder_layer_keeps_its_fast_path() -> None:
    model = nn.TransformerEncoder(encoder_layer(), 2).eval()
    replace_linear_layers_with_w8a16(model, TARGET, ["layers.1"])
    assert [layer.activation_relu_or_gelu for layer in model.layers] == [0, 1]


class Plain(nn.Module):
    """A layer of a user's own that has no weight to read."""

    def __init__(self, in_features, out_features, bias=True, dtype=torch.float32):
        super().__init__()
        self.register_buffer("w", torch.zeros(out_features, in_features, dtype=dtype))
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype) if bias else None)

    def quantize(self, weights):
        self.w = weights.clone()

    def forward(self, x):
        return nn.functional.linear(x, self.w, self.bias)


@pytest.mark.parametrize("mode", MODES)
def test_an_encoder_with_a_class_of_the_users_own(mode: str) -> None:
    model = nn.TransformerEncoder(encoder_layer(), 2).eval()
    x, mask = torch.randn(3, 5, 16), padding()
    with MODES[mode]():
        wanted = model(x, src_key_padding_mask=mask)
        replace_linear_layers_with_w8a16(model, Target.Linear(Plain))
        assert error(model(x, src_key_padding_mask=mask)[~mask], wanted[~mask]) < 1e-5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("training", [True, False])
def test_whole_transformer(mode: str, training: bool, calls: list[Any]) -> None:
    model = nn.Transformer(16, 2, 2, 2, 32, dropout=0.0, batch_first=True).train(training)
    source, target = torch.randn(3, 5, 16), torch.randn(3, 4, 16)
    with MODES[mode]():
        wanted = model(source, target)
        report = replace_linear_layers_with_w8a16(model, TARGET)
        got = model(source, target)
    assert len(report.replaced) == 8 == len(calls)
    assert {c.name.split(".")[-1] for c in report.left} == {"out_proj"}
    assert error(got, wanted) < 0.02


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("weights", [True, False])
def test_multihead_attention_is_left_and_works(mode: str, training: bool, weights: bool) -> None:
    model = nn.ModuleDict(
        {"mha": nn.MultiheadAttention(16, 2, batch_first=True), "fc": nn.Linear(16, 4)}
    )
    model.train(training)
    x = torch.randn(3, 5, 16)
    with MODES[mode]():
        wanted = model["mha"](x, x, x, need_weights=weights)[0]
        report = replace_linear_layers_with_w8a16(model, TARGET)
        assert torch.equal(model["mha"](x, x, x, need_weights=weights)[0], wanted)
    assert "reads this weight itself" in report["mha.out_proj"].reason
    assert report.float_tensors[0].name == "mha.in_proj_weight"


def test_multihead_attention_reads_a_weight_put_there_by_hand() -> None:
    mha = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    x = torch.randn(3, 5, 16)
    wanted = mha(x, x, x)[0]
    layer = QWQALinearLayer(16, 16)
    layer.quantize(mha.out_proj.weight.detach())
    layer.bias = mha.out_proj.bias.detach()
    mha.out_proj = layer
    for mode in MODES.values():
        with mode():
            assert error(mha(x, x, x)[0], wanted) < 0.02


# ---- transformers ----------------------------------------------------------------------------

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 97}


def bert() -> tuple[nn.Module, dict[str, torch.Tensor], set[str]]:
    from transformers import BertConfig, BertForMaskedLM

    model = BertForMaskedLM(BertConfig(**SIZES, num_hidden_layers=2))
    return model, {}, {"cls.predictions.decoder"}


def t5() -> tuple[nn.Module, dict[str, torch.Tensor], set[str]]:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    model = T5ForConditionalGeneration(config)
    return model, {"decoder_input_ids": torch.randint(0, 97, (2, 5))}, {"lm_head"}


def gpt2() -> tuple[nn.Module, dict[str, torch.Tensor], set[str]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    )
    return model, {}, {"lm_head"}


def llama(**options: Any) -> tuple[nn.Module, dict[str, torch.Tensor], set[str]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SIZES, num_hidden_layers=2, num_key_value_heads=2, **options)
    return LlamaForCausalLM(config), {}, set()


MODELS = {"bert": bert, "t5": t5, "gpt2": gpt2, "llama": llama}


@pytest.fixture(params=MODELS)
def pretrained(request: pytest.FixtureRequest) -> tuple[nn.Module, dict[str, Any], set[str]]:
    pytest.importorskip("transformers")
    model, inputs, tied = MODELS[request.param]()
    return model.eval(), {"input_ids": torch.randint(0, 97, (2, 7))} | inputs, tied


def test_transformers_models(pretrained: Any) -> None:
    model, inputs, tied = pretrained
    with torch.no_grad():
        wanted = model(**inputs).logits
    report = replace_linear_layers_with_w8a16(model, TARGET)
    assert {c.name for c in report.left} == tied
    assert all("tied to" in c.reason for c in report.left)
    assert not [m for m in model.modules() if type(m).__name__ == "Conv1D"]
    for mode in MODES.values():
        with mode():
            assert error(model(**inputs).logits, wanted) < 0.03
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert error(model(**inputs).logits.float(), wanted) < 0.06


def test_transformers_models_in_bfloat16(pretrained: Any) -> None:
    model, inputs, _ = pretrained
    model = model.to(torch.bfloat16)
    with torch.no_grad():
        wanted = model(**inputs).logits
        replace_linear_layers_with_w8a16(model, TARGET)
        got = model(**inputs).logits
    assert got.dtype == torch.bfloat16 and error(got, wanted) < 0.06


def test_transformers_models_train_around_frozen_codes(pretrained: Any) -> None:
    model, inputs, _ = pretrained
    replace_linear_layers_with_w8a16(model.train(), TARGET)
    model(**inputs).logits.square().mean().backward()
    embedding = model.get_input_embeddings().weight
    assert torch.isfinite(embedding.grad).all() and embedding.grad.abs().sum() > 0


def test_transformers_models_untied(pretrained: Any) -> None:
    model, inputs, tied = pretrained
    with torch.no_grad():
        wanted = model(**inputs).logits
        report = replace_linear_layers_with_w8a16(model, TARGET, untie=True, strict=True)
        assert error(model(**inputs).logits, wanted) < 0.03
    assert {c.name for c in report.replaced if c.reason} == tied


@pytest.mark.parametrize("build", [llama, gpt2])
def test_generate(build: Callable[[], Any]) -> None:
    pytest.importorskip("transformers")
    model = build()[0].eval()
    prompt = torch.randint(1, 97, (1, 4))
    replace_linear_layers_with_w8a16(model, TARGET, ["lm_head"])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    out = model.generate(prompt, **options)
    assert out.shape == (1, 10)
    assert torch.equal(out, copy.deepcopy(model).generate(prompt, **options))
    with torch.no_grad():
        assert int(model(prompt).logits[0, -1].argmax()) == int(out[0, 4])


def test_compile_makes_one_graph_of_a_llama() -> None:
    pytest.importorskip("transformers")
    torch._dynamo.reset()
    model = llama()[0].eval()
    replace_linear_layers_with_w8a16(model, TARGET, ["lm_head"])
    ids = torch.randint(0, 97, (1, 6))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
        assert error(compiled(ids, use_cache=False).logits, wanted) < 1e-5


def test_save_and_load_of_a_state_dict(tmp_path: Any) -> None:
    pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.torch")
    model = llama(tie_word_embeddings=False)[0].eval()
    ids = torch.randint(0, 97, (1, 6))
    replace_linear_layers_with_w8a16(model, TARGET, ["lm_head"])
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        other = llama(tie_word_embeddings=False)[0].eval()
    replace_linear_layers_with_w8a16(other, TARGET, ["lm_head"], quantize=False)
    other.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"), assign=True)
    other.model.rotary_emb = model.model.rotary_emb  # its table is no part of a state dict
    with torch.no_grad():
        assert torch.equal(other(ids).logits, model(ids).logits)


def test_two_heads_tied_to_each_other_share_codes() -> None:
    pytest.importorskip("transformers")
    model = llama(tie_word_embeddings=False)[0].eval()
    mlp = model.model.layers[0].mlp
    model.model.layers[1].mlp.up_proj.weight = mlp.up_proj.weight
    replace_linear_layers_with_w8a16(model, TARGET)
    assert mlp.up_proj.int8_weights is model.model.layers[1].mlp.up_proj.int8_weights
