"""Whole models in GGUF: transformers opens what was written, and what it reads is what we read."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from quantization import (
    PackedEmbedding,
    PackedLinearLayer,
    load_quantized,
    quantize_model,
    save_quantized,
)
from quantization.checkpoint.restore import restore_model
from quantization.checkpoint.stored_model import StoredModel, stored_model
from quantization.cli import main
from quantization.demo.model_download import WHEEL_MODELS, cached, fetch
from quantization.formats import FormatError
from quantization.formats.gguf import read_gguf, save_tokenizer, write_gguf
from quantization.formats.gguf.blocks import TYPES
from quantization.formats.gguf.header import read_header
from tests import tiny_models
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

SIZES = {
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "use_cache": False,
}
TOKENS = torch.tensor([[1, 5, 9, 2, 77, 30, 31, 3]])
KINDS = ["llama", "llama_tied", "llama_biased", "mistral", "qwen2", "qwen3"]


def make_model(kind: str, **more: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    name, _, variant = kind.partition("_")
    more |= {"tie_word_embeddings": variant == "tied"}
    if variant == "biased":
        more |= {"attention_bias": True, "mlp_bias": True}
    config_class, model_class = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }[name]
    if name == "mistral":
        more["sliding_window"] = None
    if name == "qwen3":
        more["head_dim"] = 128  # not hidden_size / heads, and what transformers takes for granted
    model = model_class(config_class(**SIZES, **more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases of any value, weights that speak
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def stored_of(model: torch.nn.Module) -> StoredModel:
    return stored_model(model, model.config.to_dict())


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def fresh(config: Any) -> torch.nn.Module:
    torch.manual_seed(1)
    made = transformers.AutoConfig.for_model(**config)
    return transformers.AutoModelForCausalLM.from_config(made).eval()


EACH_ITS_OWN = {
    torch.nn.Embedding: "w8g32+f16",
    "lm_head": "w8g32+f16",
    "q_proj": "w4g32+f16",
    "k_proj": "mxfp4",
    "v_proj": "w5g32+f16",
    "o_proj": "ternary+f16",
    "gate_proj": "w4g32a+f16",
    "up_proj": "binary+f16",
    "down_proj": "w3g64+f16",
}


# Its reader of GGUF makes no biases of Llama.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "llama_biased"])
def test_transformers_opens_what_we_write(kind: str, tmp_path: Path) -> None:
    model = make_model(kind)
    quantize_model(model, EACH_ITS_OWN)
    written = write_gguf(stored_of(model), tmp_path / "m.gguf", types={"*.o_proj": "TQ2_0"})
    types = {each.type for each in written}
    assert types == {"F32", "Q8_0", "Q4_0", "MXFP4", "Q5_0", "TQ2_0", "TQ1_0"}
    assert {each.moved for each in written} == {0.0}
    opened = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    ).eval()
    ours = {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, PackedLinearLayer | PackedEmbedding)
    }
    assert len(ours) == 16  # seven of each block, embedding, head
    for name, weight in ours.items():
        assert torch.equal(opened.get_submodule(name).weight, weight), name
    given, expected = logits(opened), logits(model)
    assert (given - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert expected.std() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_what_we_write_is_what_we_read(kind: str, tmp_path: Path) -> None:
    model = make_model(kind)
    quantize_model(
        model, {"re:layers.1": "w4g32+f16", torch.nn.Embedding: "w8g32+f16", "*": "w8g32+f16"}
    )
    write_gguf(stored_of(model), tmp_path / "m.gguf")
    stored = read_gguf(tmp_path / "m.gguf")
    restored = restore_model(stored, fresh(stored.config))
    assert torch.equal(logits(restored), logits(model))
    head, table = restored.lm_head, restored.model.embed_tokens
    assert isinstance(head, PackedLinearLayer) and isinstance(table, PackedEmbedding)
    assert table.padding_idx == 0
    is_tied = head.packed_weights.data_ptr() == table.packed_weights.data_ptr()
    assert is_tied == (kind == "llama_tied") == bool(stored.ties)


@pytest.mark.parametrize("kind", ["llama_tied", "qwen3"])
def test_the_command_line_there_and_back(kind: str, tmp_path: Path) -> None:
    model = make_model(kind)
    quantize_model(model, {torch.nn.Embedding: "w8g32+f16", "*": "w8g32+f16"})
    save_quantized(model, tmp_path / "folder")
    assert (
        main(["export", "--format", "gguf", *map(str, (tmp_path / "folder", tmp_path / "m"))]) == 0
    )
    assert (
        main(["import", "--format", "gguf", *map(str, (tmp_path / "m", tmp_path / "again"))]) == 0
    )
    assert torch.equal(logits(load_quantized(tmp_path / "again")), logits(model))


def test_float_models_and_mixed_ones(tmp_path: Path) -> None:
    model = make_model("llama_tied").to(torch.bfloat16)
    types = {each.name: each.type for each in write_gguf(stored_of(model), tmp_path / "f.gguf")}
    assert types["blk.0.attn_q.weight"] == "BF16" and types["output_norm.weight"] == "F32"
    assert "output.weight" not in types
    stored = read_gguf(tmp_path / "f.gguf", dtype="bfloat16")
    assert stored.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    restored, same = (fresh(stored.config) for _ in range(2))
    same.load_state_dict(model.state_dict())
    assert torch.equal(logits(restore_model(stored, restored)), logits(same))
    assert restored.lm_head.weight is restored.model.embed_tokens.weight
    quantize_model(model, {"lm_head": None, "*": "w8g32+f16"})
    write_gguf(
        stored_of(model), tmp_path / "g.gguf", types={"*.q_proj": "BF16"}, allow_rounding=True
    )
    stored = read_gguf(tmp_path / "g.gguf", dtype="bfloat16")
    assert "model.layers.0.self_attn.q_proj" not in stored.layers
    assert str(stored.layers["model.layers.0.self_attn.k_proj"].scheme) == "w8g32+f16"


def test_config_comes_back(tmp_path: Path) -> None:
    model = make_model("llama_biased", rms_norm_eps=3e-6)
    model.config.rope_parameters = {"rope_type": "linear", "rope_theta": 12345.0, "factor": 4.0}
    write_gguf(stored_of(model), tmp_path / "m.gguf")
    given, before = read_gguf(tmp_path / "m.gguf").config, model.config.to_dict()
    for key in (
        *SIZES,
        "rms_norm_eps",
        "rope_parameters",
        "attention_bias",
        "mlp_bias",
        "head_dim",
    ):
        if key != "use_cache":
            assert given[key] == before[key], key
    assert json.loads(json.dumps(given)) == given


def test_rotary_angles_of_llama_3(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = make_model("llama", rope_parameters=rope)
    written = write_gguf(stored_of(model), tmp_path / "m.gguf")
    assert "rope_freqs.weight" in {each.name for each in written}
    stored = read_gguf(tmp_path / "m.gguf")
    assert stored.config["rope_parameters"] == rope
    assert torch.equal(logits(restore_model(stored, fresh(stored.config))), logits(model))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "gpt2"}, r"'gpt2' have no known names.*llama, mistral, qwen2, qwen3 have"),
        ({"hidden_act": "gelu"}, r"hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, r"rotary angles are of type 'yarn'"),
        ({"use_sliding_window": True, "sliding_window": 8}, r"sliding_window is 8"),
        ({"intermediate_size": None}, r"the config must say intermediate_size"),
        ({"num_hidden_layers": 3}, r"9 tensors of the architecture llama are missing: model\."),
        ({"num_hidden_layers": 1}, r"which is none of the architecture llama"),
    ],
)
def test_models_without_a_place(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    stored = stored_of(make_model("llama"))
    changed = StoredModel(stored.layers, stored.tensors, stored.ties, stored.config | change)
    with pytest.raises(FormatError, match=reason):
        write_gguf(changed, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_model_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"has no config.*plain=True"):
        write_gguf(stored_model(make_model("llama")), tmp_path / "m.gguf")


def facts_file(path: Path, name: str = "llama", pieces: int = 1, **facts: Any) -> Path:
    """A file of llama.cpp's with some metadata, and the tensors of a model of one block."""
    writer = gguf.GGUFWriter(path, name)
    known = {
        "block_count": 1,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "context_length": 8,
        "attention.head_count": 2,
    }
    for key, value in (known | facts).items():
        if value is not None:
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            (writer.add_string if isinstance(value, str) else add)(f"{name}.{key}", value)
    writer.add_uint16("split.count", pieces)
    writer.add_layer_norm_rms_eps(1e-5)
    shapes = {"attn_norm": (64,), "ffn_norm": (64,), "ffn_gate": (96, 64), "ffn_up": (96, 64)}
    shapes |= {f"attn_{each}": (64, 64) for each in ("q", "k", "v", "output")}
    shapes = {f"blk.0.{each}": shape for each, shape in (shapes | {"ffn_down": (64, 96)}).items()}
    for each, shape in (shapes | {"token_embd": (10, 64), "output_norm": (64,)}).items():
        writer.add_tensor(f"{each}.weight", np.ones(shape, "float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"name": "granite"}, r"architecture 'granite'; known are llama, qwen2, qwen3"),
        ({"block_count": 1 << 30}, r"says llama\.block_count = 1073741824 and has 11 tensors"),
        ({"block_count": None}, r"must say llama\.block_count, one whole number above 0"),
        ({"pieces": 3}, r"the file is one of 3 pieces"),
        ({"expert_count": 8}, r"llama\.expert_count = 8, which models of LlamaForCausalLM do not"),
        ({"attention.head_count": 0}, r"must say llama\.attention\.head_count"),
        ({"rope.scaling.type": "yarn"}, r"rotary angles are of type 'yarn'"),
        ({"rope.dimension_count": 16}, r"turns 16 of the 32 features of a head"),
        ({"attention.head_count": 3}, r"64 rows, no even number for each of 3 heads"),
        ({"block_count": 2}, r"9 tensors of the architecture llama are missing"),
    ],
)
def test_files_that_no_model_here_obeys(facts: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=reason):
        read_gguf(facts_file(tmp_path / "m.gguf", **facts))
    assert read_gguf(tmp_path / "m.gguf", plain=True).config is None


def test_a_tied_file_of_llama_cpp(tmp_path: Path) -> None:
    stored = read_gguf(facts_file(tmp_path / "m.gguf"))
    assert stored.config["tie_word_embeddings"] and stored.config["vocab_size"] == 10
    assert stored.tensors["lm_head.weight"].shape == (10, 64)


# ---- tokenizers --------------------------------------------------------------------------------


def save_byte_level(folder: Path) -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=80, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False
    )
    inner.train_from_iterator(
        ["in the beginning god created the heaven and the earth"] * 4, trainer
    )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    made.save_pretrained(folder)
    return made


def test_a_byte_level_tokenizer_travels_along(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    tokenizer = save_byte_level(folder)
    stored = stored_of(make_model("llama"))
    stored = StoredModel(
        stored.layers, stored.tensors, stored.ties, stored.config, tuple(folder.iterdir())
    )
    write_gguf(stored, tmp_path / "m.gguf")
    save_tokenizer(tmp_path / "m.gguf", tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    text = "</s>the earth and the heaven"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (again.bos_token, again.eos_token, again.pad_token) == ("<s>", "</s>", "<pad>")


def test_another_tokenizer_is_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_models.tokenizer_for(transformers).save_pretrained(tmp_path)
    stored = stored_of(make_model("llama"))
    assets = (tmp_path / "tokenizer.json",)
    stored = StoredModel(stored.layers, stored.tensors, stored.ties, stored.config, assets)
    with caplog.at_level(logging.WARNING, "quantization"):
        write_gguf(stored, tmp_path / "m.gguf")
    assert "is left out: it is no byte-level BPE tokenizer" in caplog.text
    assert read_gguf(tmp_path / "m.gguf").config["eos_token_id"] == 2
    with pytest.raises(FormatError, match=r"m\.gguf has no tokenizer"):
        save_tokenizer(tmp_path / "m.gguf", tmp_path / "again")


# ---- the real one ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> Path:
    if not cached("smollm2").is_dir() and not os.environ.get("QUANTIZATION_TEST_MODELS"):
        pytest.skip("smollm2 is not in the cache; QUANTIZATION_TEST_MODELS=1 downloads it")
    return fetch("smollm2") / str(WHEEL_MODELS["smollm2"].gguf)


def test_a_real_file_is_read_as_gguf_restores_it(smollm2: Path) -> None:
    plain, checked = read_gguf(smollm2, plain=True), 0
    for tensor in read_header(smollm2).tensors:
        if tensor.type not in TYPES:
            continue
        kind = TYPES[tensor.type]
        expected = torch.from_numpy(
            gguf.dequantize(tensor.data, gguf.GGMLQuantizationType[kind.name])
        )
        given = plain.layers[tensor.name.removesuffix(".weight")].load().dequantize()
        largest = 0.0
        if kind.name == "Q4_1":
            largest = np.abs(kind.decode(tensor.data.reshape(-1, kind.nbytes)).minima).max()
        assert ((given - expected).abs() <= 2.0**-23 * (largest + 2 * expected.abs())).all()
        assert largest or torch.equal(given, expected)
        checked += 1
    assert checked == 211 and len(plain.layers) == 211


def test_a_real_file_runs_as_in_transformers_and_is_written_again(
    smollm2: Path, tmp_path: Path
) -> None:
    stored = read_gguf(smollm2)
    assert len(stored.layers) == 212 and stored.config["num_hidden_layers"] == 30
    opened = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    ).eval()
    given, expected = logits(restore_model(stored, fresh(stored.config))), logits(opened)
    assert (given - expected).abs().max() <= 1e-3 * expected.abs().max()
    written = write_gguf(stored, tmp_path / "again.gguf")
    assert max(each.moved for each in written) == 0
    before, after = (
        {tensor.name: tensor for tensor in read_header(path).tensors}
        for path in (smollm2, tmp_path / "again.gguf")
    )
    assert before.keys() == after.keys() and len(before) == 272
    for name, tensor in before.items():
        assert after[name].data.tobytes() == tensor.data.tobytes(), name
