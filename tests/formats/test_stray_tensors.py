"""What older programs wrote beside a model is left with a warning, and nothing that it needs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from quantization.formats.awq import read_awq
from quantization.formats.compressed_tensors import (
    read_compressed_tensors,
    write_compressed_tensors,
)
from quantization.formats.gptq import read_gptq
from tests.formats.compressed_calls import packed_of, stored_of
from tests.formats.foreign_oracle import awq_tensors, gptq_tensors, write_folder
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

GPTQ = {"bits": 4, "group_size": 32, "quant_method": "gptq"}
AWQ = {"bits": 4, "group_size": 32, "version": "gemm", "quant_method": "awq"}
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "intermediate_size": 32}
QWEN = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "intermediate_size": 32}
OPT = {"model_type": "opt", "architectures": ["OPTForCausalLM"], "ffn_dim": 32}
NEOX = {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "intermediate_size": 32}
ATTENTION = "model.layers.0.self_attn"


def kept(
    place: Path, config: dict[str, Any] | None, tensors: dict[str, torch.Tensor], awq: bool = False
) -> set[str]:
    """The keys that a reader keeps of tensors beside quantized layers of those names."""
    rng, layers = np.random.default_rng(0), {}
    names = [f"{ATTENTION}.q_proj", f"{ATTENTION}.o_proj", "model.decoder.layers.0.fc1"]
    for name in names:
        codes, zeros = rng.integers(0, 16, (32, 32)), np.full((1, 32), 8)
        scales = np.ones((1, 32), np.float16)
        places = np.zeros(32, int)
        layers[name] = (
            awq_tensors(codes, zeros, scales)
            if awq
            else gptq_tensors(codes, zeros, scales, places, 4, 1)
        )
    config = None if config is None else SMALL | config
    write_folder(place, layers, AWQ if awq else GPTQ, config=config, **tensors)
    return set((read_awq if awq else read_gptq)(place).tensors)


@pytest.mark.parametrize("awq", [False, True])
def test_zero_biases_go_where_the_class_has_none(
    awq: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("transformers")
    query, output = f"{ATTENTION}.q_proj.bias", f"{ATTENTION}.o_proj.bias"
    fc1 = "model.decoder.layers.0.fc1.bias"
    zeros = {key: torch.zeros(32) for key in (query, output, fc1)}
    with caplog.at_level(logging.WARNING, "quantization"):
        assert kept(tmp_path / "llama", LLAMA, zeros, awq) == {fc1}  # of a module unknown to it
    assert "2 tensors are left, as the model has no place for them" in caplog.text
    assert kept(tmp_path / "qwen", QWEN, zeros, awq) == {query, fc1}
    assert kept(tmp_path / "opt", OPT, zeros, awq) == {query, output, fc1}
    assert kept(tmp_path / "unknown", {"model_type": "mine"}, zeros, awq) == set(zeros)
    assert kept(tmp_path / "none", None, zeros, awq) == set(zeros)
    caplog.clear()
    real = zeros | {query: torch.ones(32)}
    assert kept(tmp_path / "real", LLAMA, real, awq) == {query, fc1}  # loading will say so


@pytest.mark.parametrize("config", [LLAMA, None])
def test_buffers_of_old_classes_go(config: dict[str, Any] | None, tmp_path: Path) -> None:
    old = [f"{ATTENTION}.rotary_emb.inv_freq", f"{ATTENTION}.k_scale", f"{ATTENTION}.v_scale"]
    old += [f"{ATTENTION}.attention.masked_bias", "model.rotary_emb.inv_freq"]
    others = {f"{ATTENTION}.rotary.bias": torch.ones(8), f"{ATTENTION}.attn.bias": torch.ones(8)}
    tensors = {key: torch.ones(8) for key in old} | others
    mask = {f"{ATTENTION}.attention.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool)}
    assert kept(tmp_path, config, tensors | mask) == set(others)


def test_buffers_of_the_class_itself_stay(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    esm = {"model_type": "esm", "architectures": ["EsmModel"], "position_embedding_type": "rotary"}
    esm |= {"intermediate_size": 32, "pad_token_id": 0}
    model = transformers.EsmModel(transformers.EsmConfig(**SMALL | esm))
    keys = [key for key in model.state_dict() if key.endswith("rotary_embeddings.inv_freq")]
    assert keys
    assert kept(tmp_path, esm, {key: torch.ones(8) for key in keys}) == set(keys)


def test_compressed_tensors_too(tmp_path: Path, rng: np.random.Generator) -> None:
    pytest.importorskip("transformers")
    name = f"{ATTENTION}.k_proj"
    stored = stored_of({name: packed_of(rng, "w4g32", 32, 32, torch.float32)}, config=SMALL | LLAMA)
    write_compressed_tensors(stored, tmp_path / "a")
    from safetensors.torch import load_file, save_file

    file = tmp_path / "a/model.safetensors"
    more = {f"{name}.bias": torch.zeros(32), f"{ATTENTION}.k_scale": torch.ones(1)}
    save_file(load_file(file) | more, file)
    assert read_compressed_tensors(tmp_path / "a").tensors == {}
