"""Files whose names and tensors are not those of the class: streamed as transformers loads them."""

from __future__ import annotations

import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.22")
pytest.importorskip("accelerate")
from safetensors.torch import load_file, save_file

from quantization import (
    load_quantized,
    quantize_checkpoint,
    quantize_model,
    save_quantized,
    unfuse_experts,
)
from quantization.checkpoint import CheckpointError
from quantization.checkpoint.disk.safetensors_files import TensorFolder
from quantization.checkpoint.source.conversion import by_transformers
from quantization.checkpoint.source.skeleton import skeleton_of_config
from quantization.swap.experts import UnfusedExperts
from tests.checkpoint_models import peak_of_streaming, state_equal
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_TEXT = _SIZES | {"num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 64}
_EXPERTS = _TEXT | {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
_VISION = _SIZES | {"image_size": 32, "patch_size": 8}
_MARIAN = {
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
#: Class -> sizes. Joined and renamed, cut apart, joined only, renamed by prefix, computed, turned.
FAMILIES: dict[str, dict[str, Any]] = {
    "MixtralForCausalLM": _TEXT | {"num_local_experts": 4},
    "OlmoeForCausalLM": _TEXT | {"num_experts": 4},
    "JambaForCausalLM": _TEXT | {"num_experts": 2, "num_hidden_layers": 4, "mamba_d_state": 4},
    "ViTForImageClassification": _VISION,
    "LlavaForConditionalGeneration": {
        "text_config": _TEXT | {"model_type": "llama"},
        "vision_config": _VISION | {"model_type": "clip_vision_model"},
    },
    "MarianMTModel": _MARIAN,
    "GptOssForCausalLM": _TEXT | {"num_local_experts": 4, "head_dim": 16},
}


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """A small model in a folder, as ``from_pretrained`` loads it."""
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    cls(cls.config_class(**FAMILIES[name] | more)).to(dtype).save_pretrained(folder)
    return cls.from_pretrained(folder).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_that_of_quantize_model(name: str, tmp_path: Path) -> None:
    unfused = name in ("OlmoeForCausalLM", "GptOssForCausalLM")
    model = saved(name, tmp_path / "float", torch.bfloat16 if unfused else torch.float32)
    if unfused:
        unfuse_experts(model)
    report = quantize_model(model, "w8g32")
    streamed = quantize_checkpoint(
        tmp_path / "float", tmp_path / "small", "w8g32", unfuse_experts=unfused
    )
    assert [c.name for c in streamed.replaced] == [c.name for c in report.replaced]
    assert state_equal(load_quantized(tmp_path / "small", verify=True), model)
    assert any(isinstance(m, UnfusedExperts) for m in streamed.model.modules()) == unfused


def test_a_loaded_model_unfuses_its_experts_or_is_as_it_was(tmp_path: Path) -> None:
    model = saved("MixtralForCausalLM", tmp_path / "float")
    unfuse_experts(model)
    quantize_model(model, "w8g32", exclude=["lm_head", "*.experts.1.*"])
    save_quantized(model, tmp_path / "small")
    fresh = saved("MixtralForCausalLM", tmp_path / "float")
    assert state_equal(load_quantized(tmp_path / "small", fresh), model)
    other = saved("MixtralForCausalLM", tmp_path / "other", intermediate_size=32)
    before = other.state_dict().keys()
    with pytest.raises(ValueError, match="shape"):
        load_quantized(tmp_path / "small", other)
    assert other.state_dict().keys() == before


def test_one_expert_is_read_at_a_time(tmp_path: Path) -> None:
    saved("MixtralForCausalLM", tmp_path)
    files = TensorFolder(tmp_path)
    sources = by_transformers(files, skeleton_of_config(tmp_path))
    fused = sources["model.layers.0.mlp.experts.gate_up_proj"]
    read = []
    for file in files.files.values():
        whole = file._read
        file._read = lambda dtype, shape, at, whole=whole: (
            read.append(shape) or whole(dtype, shape, at)
        )
    assert fused.rows is not None
    assert torch.equal(fused.rows(2, 3)[0], fused.load()[2]) and fused.shape == (4, 192, 64)
    assert read[:2] == [(96, 64), (96, 64)] and len(read) == 10


@pytest.mark.deep
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_one_expert(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 1}
    saved("MixtralForCausalLM", tmp_path / "float", num_local_experts=32, **sizes)
    saved("MixtralForCausalLM", tmp_path / "warm")
    fused = 32 * 2 * 1024 * 512 * 4
    for unfuse, most in ((True, fused / 2), (False, 1.5 * fused)):
        places = tmp_path / "float", tmp_path / f"new{unfuse}", tmp_path / "warm"
        assert peak_of_streaming(*places, "w4g64a", unfuse_experts=unfuse) < most


def test_ties_that_the_files_do_not_have_are_parted(tmp_path: Path) -> None:
    for differ in (False, True):
        folder = tmp_path / f"float{differ}"
        model = saved("MixtralForCausalLM", folder, tie_word_embeddings=True)
        tensors = load_file(folder / "model.safetensors")
        head = tensors["model.embed_tokens.weight"] + differ
        save_file(
            tensors | {"lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"}
        )
        model = type(model).from_pretrained(folder)
        quantize_model(model, "w8g32")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            quantize_checkpoint(folder, tmp_path / f"small{differ}", "w8g32")
        again = load_quantized(tmp_path / f"small{differ}")
        assert state_equal(again, model)
        assert hasattr(again.lm_head, "packed_weights") == differ


def test_what_a_rule_lacks_is_named(tmp_path: Path) -> None:
    saved("MixtralForCausalLM", tmp_path / "float")
    path = tmp_path / "float/model.safetensors"
    tensors = load_file(path)
    for gone in (r"layers.0.*experts\.3\.w1", r"layers.0.*experts\.\d\.w2", r"layers.0.*\.gate\."):
        left = {key: value for key, value in tensors.items() if not re.search(gone, key)}
        save_file(left, path, {"format": "pt"})
        with pytest.raises(CheckpointError, match=r"model\.layers\.0\."):
            quantize_checkpoint(tmp_path / "float", tmp_path / "small", "w8g32")
        assert not (tmp_path / "small").exists()


def test_floats_have_the_dtype_that_transformers_gives_them(tmp_path: Path) -> None:
    saved("ViTForImageClassification", tmp_path / "float")
    path = tmp_path / "float/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "bfloat16"}))
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path / "float")
    assert model.dtype == torch.bfloat16
    quantize_model(model, "w8g32")
    quantize_checkpoint(tmp_path / "float", tmp_path / "small", "w8g32")
    assert state_equal(load_quantized(tmp_path / "small"), model)
