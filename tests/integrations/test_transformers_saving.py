"""What is saved says what it is, and loads without arguments, whoever quantized it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.22")
pytest.importorskip("accelerate")

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel

from quantization import (
    PackedLinearLayer,
    QWQALinearLayer,
    Scheme,
    Target,
    dequantize_model,
    load_quantized,
    quantize_checkpoint,
    quantize_model,
    replace_linear_layers_with_w8a16,
    save_quantized,
)
from quantization.integrations.transformers import QuantizationConfig
from tests import tiny_models
from tests.integrations.saved_models import EVERY_EMBEDDING, assert_same, load, logits, quantized
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

# ---- what is saved -------------------------------------------------------------------------------


def test_the_config_says_everything_in_plain_values(
    floats: dict[str, Path], tmp_path: Path
) -> None:
    rules = {"re:layers.1.mlp": None, "re:mlp": "w8a16", "*": Scheme.parse("w4g64a")}
    model = load("llama", floats["llama"], quantization_config=QuantizationConfig(rules))
    model.save_pretrained(tmp_path)
    plain = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert plain["quant_method"].startswith("quantization (") and plain["format_version"] == 1
    assert plain["recipe"] == [
        {"pattern": "re:layers.1.mlp", "scheme": None},
        {"pattern": "re:mlp", "scheme": "w8a16"},
        {"pattern": "*", "scheme": "w4g64a"},
    ]
    assert plain["exclude"] == ["lm_head"]
    assert plain["layers"]["model.layers.0.mlp.up_proj"] == "w8a16"
    assert plain["layers"]["model.layers.1.self_attn.q_proj"] == "w4g64a"
    assert len(plain["layers"]) == len(quantized(model)) == 11
    assert plain["schemes"]["w4g64a"]["granularity"] == {"kind": "group", "by": 64}
    assert any("lowest bit first" in line for line in plain["how_to_read"])
    again = load("llama", tmp_path)
    assert again.config.quantization_config.recipe == plain["recipe"]


def test_numpy_alone_can_decode_what_is_saved(floats: dict[str, Path], tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import load_file as load_arrays

    model = load("llama", floats["llama"], quantization_config=QuantizationConfig("w4g32"))
    model.save_pretrained(tmp_path)
    arrays, name = load_arrays(tmp_path / "model.safetensors"), "model.layers.0.mlp.up_proj"
    bits = np.unpackbits(arrays[f"{name}.packed_weights"], axis=1, bitorder="little")
    codes = (bits.reshape(96, 64, 4) * [1, 2, 4, 8]).sum(axis=2)
    codes = np.where(codes > 7, codes - 16, codes)
    scales = arrays[f"{name}.scales"].repeat(32, axis=1)
    weight = model.get_submodule(name).weight.numpy()
    assert np.array_equal((codes * scales).astype("float32"), weight)


def test_shards(floats: dict[str, Path], tmp_path: Path) -> None:
    model = load("llama", floats["llama"], quantization_config=QuantizationConfig("w4g64a"))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same(load("llama", tmp_path), model)


def test_sharded_floats(floats: dict[str, Path], tmp_path: Path) -> None:
    load("llama", floats["llama"]).save_pretrained(tmp_path, max_shard_size="60KB")
    config = QuantizationConfig("w4g64a")
    model = load("llama", tmp_path, quantization_config=config)
    assert_same(model, load("llama", floats["llama"], quantization_config=config))


def test_a_quantized_model_loads_into_its_body(floats: dict[str, Path], tmp_path: Path) -> None:
    for kind in ("llama", "bert"):
        whole = load(kind, floats[kind], quantization_config=QuantizationConfig("w4g64a", ()))
        whole.save_pretrained(tmp_path / kind)
        body = AutoModel.from_pretrained(tmp_path / kind)
        mine, theirs = quantized(body), quantized(whole.base_model)
        assert mine.keys() == theirs.keys() and len(mine) > 8
        assert all(torch.equal(mine[n].packed_weights, theirs[n].packed_weights) for n in mine)


def test_a_model_of_which_nothing_is_quantized(floats: dict[str, Path], tmp_path: Path) -> None:
    config = QuantizationConfig("w4", "re:.")
    model = load("llama", floats["llama"], quantization_config=config)
    assert not quantized(model)
    model.save_pretrained(tmp_path)
    assert_same(load("llama", tmp_path), model)


# ---- models that were quantized by hand ----------------------------------------------------------


@pytest.mark.parametrize("kind", ["tied", "gpt2", "bert", "t5", "mixtral"])
def test_models_of_quantize_model_are_saved(
    kind: str, floats: dict[str, Path], tmp_path: Path
) -> None:
    model = load(kind, floats[kind])
    embeddings = {} if kind == "mixtral" else {EVERY_EMBEDDING: "w6g32"}
    quantize_model(model, embeddings | {nn.Module: "w4g64a"})
    if kind == "tied":
        assert model.lm_head.packed_weights is model.model.embed_tokens.packed_weights
    model.tie_weights()
    model.save_pretrained(tmp_path)
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "quantization_config")
    again = load(kind, tmp_path)
    assert_same(again, model)
    assert again.config.quantization_config.recipe is None
    assert torch.equal(logits(kind, again), logits(kind, model))
    again.save_pretrained(tmp_path / "second")
    assert_same(load(kind, tmp_path / "second"), model)


def test_models_with_int8_layers_are_saved(floats: dict[str, Path], tmp_path: Path) -> None:
    model = load("tied", floats["tied"])
    replace_linear_layers_with_w8a16(model, Target.Linear(QWQALinearLayer), "lm_head")
    model.save_pretrained(tmp_path)
    assert_same(load("tied", tmp_path), model)


def test_models_of_which_a_part_was_quantized_are_saved(
    floats: dict[str, Path], tmp_path: Path
) -> None:
    model = load("tied", floats["tied"])
    quantize_model(model.model, "w4g64a")
    model.model.layers[1].mlp.up_proj = PackedLinearLayer(64, 96, bias=False, scheme="kmeans3")
    model.save_pretrained(tmp_path)
    assert_same(load("tied", tmp_path), model)


def test_dequantize_model_brings_ties_back(floats: dict[str, Path], tmp_path: Path) -> None:
    model = load("tied", floats["tied"])
    listed = dict(model.all_tied_weights_keys)
    quantize_model(model, {EVERY_EMBEDDING: "w6g32", "*": "w4g64a"})
    assert not model.all_tied_weights_keys
    dequantize_model(model)
    assert model.all_tied_weights_keys == listed and "_tied_weights_keys" not in model.__dict__
    model.save_pretrained(tmp_path)
    assert_same(load("tied", tmp_path), model)


def test_a_float_model_is_saved_as_ever(floats: dict[str, Path], tmp_path: Path) -> None:
    load("tied", floats["tied"]).save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    mine, theirs = (load_file(f / "model.safetensors") for f in (tmp_path, floats["tied"]))
    assert mine.keys() == theirs.keys()


# ---- folders of quantization.checkpoint ------------------------------------------------------


@pytest.mark.parametrize("kind", ["tied", "bert", "t5", "gpt2"])
def test_folders_of_save_quantized_load(kind: str, floats: dict[str, Path], tmp_path: Path) -> None:
    model = load(kind, floats[kind])
    rules = {EVERY_EMBEDDING: "w6g32", nn.Linear: "w8a16", "*": "w4g64a"}
    quantize_model(model, rules if kind != "gpt2" else {EVERY_EMBEDDING: "w6g32", "*": "w4g64a"})
    save_quantized(model, tmp_path / "codes")
    again = load(kind, tmp_path / "codes")
    assert_same(again, model)
    assert torch.equal(logits(kind, again), logits(kind, model))
    save_quantized(again, tmp_path / "second")
    assert_same(load_quantized(tmp_path / "second"), model)
    again.save_pretrained(tmp_path / "third")
    assert_same(load(kind, tmp_path / "third"), model)


@pytest.mark.parametrize("recipe", ["w8a16", {"re:(embed_tokens|lm_head)$": "w8", "*": "w4g32a"}])
def test_folders_of_quantize_checkpoint_load(
    recipe: Any, floats: dict[str, Path], tmp_path: Path
) -> None:
    quantize_checkpoint(floats["tied"], tmp_path / "codes", recipe)
    model = load("tied", floats["tied"])
    quantize_model(model, recipe)
    assert_same(load("tied", tmp_path / "codes"), model)


# ---- placing and running -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "device_map",
    ["cpu", "auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}, {"": torch.device("cpu")}],
    ids=str,
)
def test_device_maps(device_map: Any, floats: dict[str, Path], tmp_path: Path) -> None:
    config = QuantizationConfig("w4g64a")
    wanted = load("llama", floats["llama"], quantization_config=config)
    model = load("llama", floats["llama"], quantization_config=config, device_map=device_map)
    assert_same(model, wanted)
    model.save_pretrained(tmp_path)
    assert_same(load("llama", tmp_path, device_map=device_map), wanted)


@pytest.mark.parametrize("kind", ["tied", "gpt2", "t5"])
def test_generate(kind: str, floats: dict[str, Path]) -> None:
    model = load(kind, floats[kind], quantization_config=QuantizationConfig("w6g32"))
    wanted = load(kind, floats[kind])
    quantize_model(wanted, "w6g32", exclude="lm_head")
    ids = tiny_models.inputs_for("llama")["input_ids"]
    options = {"max_new_tokens": 8, "do_sample": False}
    out = model.generate(ids, **options)
    assert torch.equal(out, wanted.generate(ids, **options)) and out.shape[0] == 2


def test_pipelines(floats: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = tiny_models.byte_tokenizer(transformers)
    config = QuantizationConfig("w6g32")
    model = load("llama", floats["llama"], quantization_config=config)
    options = {"max_new_tokens": 4, "do_sample": False}
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    wanted = pipe("In the beginning", **options)[0]["generated_text"]
    assert wanted.startswith("In the beginning") and len(wanted) > len("In the beginning")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pipe = transformers.pipeline("text-generation", model=str(tmp_path))
    assert pipe("In the beginning", **options)[0]["generated_text"] == wanted
    pipe = transformers.pipeline(
        "text-generation",
        model=str(floats["llama"]),
        tokenizer=tokenizer,
        model_kwargs={"quantization_config": config},
    )
    assert pipe("In the beginning", **options)[0]["generated_text"] == wanted


def test_dequantize(floats: dict[str, Path], tmp_path: Path) -> None:
    config = QuantizationConfig({EVERY_EMBEDDING: "w6g32", "*": "w4g64a"}, exclude=())
    model = load("tied", floats["tied"], quantization_config=config)
    wanted = logits("tied", model)
    assert model.dequantize() is model
    assert not quantized(model) and type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(logits("tied", model), wanted, rtol=1e-4, atol=1e-4)
    assert not hasattr(model, "hf_quantizer") and not model.is_quantized
    model.tie_weights()
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert_same(load("tied", tmp_path), model)
    again = load("tied", floats["tied"], quantization_config=config).dequantize("bfloat16")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}


def test_layers_changed_after_loading_are_saved_as_they_are(
    floats: dict[str, Path], tmp_path: Path
) -> None:
    config = QuantizationConfig("w4g64a")
    model = load("llama", floats["llama"], quantization_config=config)
    first = model.model.layers[0].mlp
    first.up_proj = first.up_proj.to_scheme("w8g32")
    first.down_proj = first.down_proj.dequantize()
    assert config.layers is None  # the user's own config is not written to
    model.save_pretrained(tmp_path)
    again = load("llama", tmp_path)
    assert_same(again, model)
    assert type(again.model.layers[0].mlp.down_proj) is nn.Linear


def test_columns_with_an_order_and_multipliers_travel(tmp_path: Path) -> None:
    model = tiny_models.random_model("llama")
    quantize_model(model, "w4g16+order+cols", exclude=["lm_head"])
    for layer in quantized(model).values():
        layer.input_order.copy_(torch.randperm(layer.in_features))
        layer.input_scale.uniform_(0.5, 1)
    model.save_pretrained(tmp_path / "a")
    save_quantized(model, tmp_path / "b")
    again = [load("llama", tmp_path / "a"), load("llama", tmp_path / "b")]
    for other in (*again, load_quantized(tmp_path / "b")):
        assert torch.equal(logits("llama", other), logits("llama", model))
    torch.testing.assert_close(
        logits("llama", dequantize_model(again[0]).model),
        logits("llama", model),
        rtol=1e-3,
        atol=1e-3,
    )
    file = tmp_path / "a/model.safetensors"
    state = load_file(file)
    state["model.layers.0.mlp.up_proj.input_order"][0] = 1
    state["model.layers.0.mlp.up_proj.input_order"][1] = 1
    save_file(state, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"up_proj\.input_order must have each of the columns"):
        load("llama", tmp_path / "a")
