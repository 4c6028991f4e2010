"""from_pretrained quantizes while it loads: the layers of quantize_model, bit for bit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.22")
pytest.importorskip("accelerate")

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from quantization import PackedEmbedding, PackedLinearLayer, quantize_model, unfuse_experts
from quantization.demo.model_download import cached
from quantization.demo.model_sources import load_model
from quantization.integrations.transformers import QuantizationConfig
from quantization.integrations.transformers_weights import FloatWeights
from tests import tiny_models
from tests.integrations.saved_models import (
    EVERY_EMBEDDING,
    KINDS,
    assert_same,
    load,
    logits,
    quantized,
)
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# ---- quantized while it loads --------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe",
    ["w4g64a", "w8a16", {"re:(mlp|DenseReluDense|intermediate)": "nf4", "*": "w3g32+dq"}],
    ids=["scheme", "int8 layers", "rules"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_those_of_quantize_model(
    kind: str, recipe: Any, floats: dict[str, Path], tmp_path: Path
) -> None:
    wanted = load(kind, floats[kind])
    quantize_model(wanted, recipe, exclude=[] if kind == "bert" else ["lm_head"])
    model = load(kind, floats[kind], quantization_config=QuantizationConfig(recipe))
    assert_same(model, wanted)
    assert len(quantized(model)) >= 8 and not model.training
    assert torch.equal(logits(kind, model), logits(kind, wanted))

    model.save_pretrained(tmp_path)
    again = load(kind, tmp_path)
    assert_same(again, model)
    assert torch.equal(logits(kind, again), logits(kind, model))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["tied", "t5"])
def test_every_dtype(kind: str, dtype: Any, floats: dict[str, Path], tmp_path: Path) -> None:
    rules = {EVERY_EMBEDDING: "w8", "*": "w4g32+f16" if dtype is torch.bfloat16 else "w4g32a"}
    wanted = load(kind, floats[kind], dtype=dtype)
    quantize_model(wanted, rules)
    model = load(
        kind, floats[kind], dtype=dtype, quantization_config=QuantizationConfig(rules, exclude=())
    )
    assert_same(model, wanted)
    assert model.dtype == dtype and model.lm_head.dtype == dtype
    model.save_pretrained(tmp_path)
    assert_same(load(kind, tmp_path), model)


def test_a_dtype_on_loading_casts_floats_and_no_codes(
    floats: dict[str, Path], tmp_path: Path
) -> None:
    config = QuantizationConfig({"re:mlp": "w4g32+f32", "*": "w4g32a"})
    model = load("llama", floats["llama"], quantization_config=config)
    model.save_pretrained(tmp_path)
    other = load("llama", tmp_path, dtype=torch.bfloat16)
    up, query = (
        other.get_submodule(f"model.layers.0.{name}")
        for name in ("mlp.up_proj", "self_attn.q_proj")
    )
    assert query.scales.dtype == torch.bfloat16 and up.scales.dtype == torch.float32
    assert torch.equal(
        query.packed_weights, model.get_submodule("model.layers.0.self_attn.q_proj").packed_weights
    )


def test_float_weights_are_never_all_alive(
    floats: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[weakref.ref] = []
    most = 0
    receive = FloatWeights.receive

    def counting(self: Any, key: str, weight: Any, missing: Any) -> None:
        nonlocal most
        seen.append(weakref.ref(weight))
        most = max(most, sum(each() is not None for each in seen))
        receive(self, key, weight, missing)

    monkeypatch.setattr(FloatWeights, "receive", counting)
    model = load("llama", floats["llama"], quantization_config=QuantizationConfig("w4g64a"))
    assert len(seen) == len(quantized(model)) == 14 and most == 1
    assert not [m for m in model.modules() if type(m) is nn.Linear and m is not model.lm_head]


_MEASURE = """
import sys, threading, time
import torch, transformers
import quantization.integrations.transformers as integration
def anonymous():
    line = next(l for l in open("/proc/self/status") if l.startswith("RssAnon"))
    return int(line.split()[1]) * 1024
peak, done = 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
config = integration.QuantizationConfig("w4g64a", ())
transformers.AutoModelForCausalLM.from_pretrained(sys.argv[2], quantization_config=config)
before = anonymous()
thread = threading.Thread(target=watch); thread.start()
model = transformers.AutoModelForCausalLM.from_pretrained(
    sys.argv[1], quantization_config=config, dtype=torch.bfloat16)
done = True; thread.join()
print(peak - before, model.get_memory_footprint())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_near_that_of_the_quantized_model(
    floats: dict[str, Path], tmp_path: Path
) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16}
    big = tiny_models.random_model("llama", **sizes)
    floating = sum(p.numel() for p in big.parameters()) * 2
    big.save_pretrained(tmp_path)  # float32, so that a cast to bfloat16 makes a copy
    command = [sys.executable, "-c", _MEASURE, str(tmp_path), str(floats["llama"])]
    given_back = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is not kept
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=given_back)
    peak, footprint = map(int, done.stdout.split())
    assert footprint < 0.35 * floating
    assert peak < footprint + 20e6 < 0.5 * floating, (peak, footprint, floating)


def test_the_report_tells_what_became_of_each_layer(floats: dict[str, Path]) -> None:
    model = load("llama", floats["llama"], quantization_config=QuantizationConfig("w4g64a"))
    report = model.hf_quantizer.report
    assert len(report.replaced) == 14 and report["lm_head"].reason == "by 'lm_head'"
    assert report.bytes_after < report.bytes_before / 3
    assert '"exclude": [\n    "lm_head"\n  ]' in repr(model.config.quantization_config)


# ---- ties and embeddings -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tied", "gpt2", "t5", "bert"])
def test_a_tied_head_shares_codes(kind: str, floats: dict[str, Path], tmp_path: Path) -> None:
    config = QuantizationConfig({EVERY_EMBEDDING: "w6g32", "*": "w4g64a"}, exclude=())
    model = load(kind, floats[kind], quantization_config=config)
    wanted = load(kind, floats[kind])
    quantize_model(wanted, {EVERY_EMBEDDING: "w6g32", "*": "w4g64a"})
    assert_same(model, wanted)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert type(table) is PackedEmbedding and type(head) is PackedLinearLayer
    assert head.packed_weights is table.packed_weights
    if kind == "bert":
        assert head.bias.data_ptr() == model.cls.predictions.bias.data_ptr()
        assert isinstance(model.cls.predictions.bias, nn.Parameter) and "bias" in head._buffers
    model.tie_weights()
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "model.safetensors").keys()
    assert sum(key.endswith(".packed_weights") for key in keys) == len(
        {id(m.packed_weights) for m in quantized(model).values()}
    )
    again = load(kind, tmp_path)
    head, table = again.get_output_embeddings(), again.get_input_embeddings()
    assert head.packed_weights is table.packed_weights
    assert_same(again, model)
    assert torch.equal(logits(kind, again), logits(kind, model))
    again.save_pretrained(tmp_path / "second")
    assert_same(load(kind, tmp_path / "second"), model)


def test_a_tied_head_of_another_scheme(floats: dict[str, Path], tmp_path: Path) -> None:
    config = QuantizationConfig({"embed_tokens": "w8", "*": "w4g64a"}, exclude=())
    model = load("tied", floats["tied"], quantization_config=config)
    wanted = load("tied", floats["tied"])
    quantize_model(wanted, {"embed_tokens": "w8", "*": "w4g64a"})
    assert_same(model, wanted)
    model.save_pretrained(tmp_path)
    assert_same(load("tied", tmp_path), model)


def test_a_head_that_is_untied_from_a_float_embedding(
    floats: dict[str, Path], tmp_path: Path
) -> None:
    left = load("tied", floats["tied"], quantization_config=QuantizationConfig("w4g64a", ()))
    assert left.lm_head.weight is left.model.embed_tokens.weight
    assert "tied to" in left.hf_quantizer.report["lm_head"].reason
    config = QuantizationConfig("w4g64a", (), untie=True)
    model = load("tied", floats["tied"], quantization_config=config)
    wanted = load("tied", floats["tied"])
    quantize_model(wanted, "w4g64a", untie=True)
    assert_same(model, wanted)
    model.tie_weights()
    assert type(model.lm_head) is PackedLinearLayer
    model.save_pretrained(tmp_path)
    assert_same(load("tied", tmp_path), model)


@pytest.mark.parametrize("differ", [False, True])
def test_a_checkpoint_that_has_both_tied_weights(
    differ: bool, floats: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "both"
    shutil.copytree(floats["tied"], folder)
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"] = head.flip(0) if differ else head
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    rules = {"embed_tokens": "w6g32", "lm_head": "w6g32", "*": "w4g64a"}
    wanted = load("tied", folder)
    quantize_model(wanted, rules)
    model = load("tied", folder, quantization_config=QuantizationConfig(rules, exclude=()))
    assert_same(model, wanted)
    shares = model.lm_head.packed_weights is model.model.embed_tokens.packed_weights
    assert shares is not differ
    model.save_pretrained(tmp_path / "saved")
    assert_same(load("tied", tmp_path / "saved"), model)


# ---- mixtures of experts -------------------------------------------------------------------------


def test_fused_experts_are_left_unless_they_are_to_be_unfused(floats: dict[str, Path]) -> None:
    model = load("mixtral", floats["mixtral"], quantization_config=QuantizationConfig("w4g64a"))
    left = model.hf_quantizer.report.left
    assert {c.name.rpartition(".")[2] for c in left} == {"gate_up_proj", "down_proj"}
    assert all("unfuse_experts" in c.reason for c in left)


@pytest.mark.parametrize("exclude", [(), ("lm_head", "re:experts.3")])
def test_unfused_experts(exclude: Any, floats: dict[str, Path], tmp_path: Path) -> None:
    wanted = load("mixtral", floats["mixtral"])
    unfuse_experts(wanted)
    quantize_model(wanted, "w4g32", exclude=exclude)
    config = QuantizationConfig("w4g32", exclude, unfuse_experts=True)
    model = load("mixtral", floats["mixtral"], quantization_config=config)
    assert_same(model, wanted)
    assert model.hf_quantizer.report.coverage > (0.6 if exclude else 0.9)
    model.save_pretrained(tmp_path)
    again = load("mixtral", tmp_path)
    assert_same(again, model)
    assert torch.equal(logits("mixtral", again), logits("mixtral", model))


# ---- the real language model ---------------------------------------------------------------------


def test_the_real_model_is_that_of_quantize_model(tmp_path: Path) -> None:
    if not cached("smollm2").is_dir() and not os.environ.get("QUANTIZATION_TEST_MODELS"):
        pytest.skip("smollm2 is not in the cache; QUANTIZATION_TEST_MODELS=1 downloads it")
    loaded = load_model("smollm2", torch.bfloat16)
    loaded.model.hf_quantizer.remove_quantization_config(loaded.model)  # that of its GGUF file
    loaded.model.save_pretrained(tmp_path / "float")
    rules = {"re:(embed_tokens|lm_head)$": "w8g64", "*": "w4g64a"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=QuantizationConfig(rules, exclude=())
    )
    quantize_model(loaded.model, rules)
    assert_same(model, loaded.model)
    model.save_pretrained(tmp_path / "codes")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "codes")
    text = loaded.tokenizer("The capital of France is", return_tensors="pt")
    options = {"max_new_tokens": 8, "do_sample": False}
    wanted = loaded.model.generate(**text, **options)
    assert torch.equal(model.generate(**text, **options), wanted)
    assert torch.equal(again.generate(**text, **options), wanted)
    assert "Paris" in loaded.tokenizer.decode(wanted[0])
