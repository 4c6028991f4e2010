"""Unfused experts as compressed-tensors: the names of their family, and what readers find."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from quantization import quantize_model, unfuse_experts
from quantization.checkpoint.stored_model import StoredModel, stored_model
from quantization.formats import FormatError
from quantization.formats.compressed_experts import is_of_expert, with_family_names
from quantization.formats.compressed_tensors import (
    read_compressed_tensors,
    write_compressed_tensors,
)
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 16}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 16}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
MANY = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
#: Class -> its sizes, and the parts of an expert on disk: gate, what it gates, down.
FAMILIES: dict[str, tuple[dict[str, Any], tuple[str, str, str]]] = {
    "Mixtral": (LOCAL, ("block_sparse_moe.experts.1.w1", "w3", "w2")),
    "Qwen3Moe": (MANY | {"head_dim": 16}, ("mlp.experts.1.gate_proj", "up_proj", "down_proj")),
    "Qwen2Moe": (MANY | {"shared_expert_intermediate_size": 32},
                 ("mlp.experts.1.gate_proj", "up_proj", "down_proj")),
    "Olmoe": ({"num_experts": 4, "num_experts_per_tok": 2},
              ("mlp.experts.1.gate_proj", "up_proj", "down_proj")),
    "Phimoe": (LOCAL, ("block_sparse_moe.experts.1.w1", "w3", "w2")),
    "DeepseekV3": (
        {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
         "topk_group": 1, "first_k_dense_replace": 0, "q_lora_rank": 32, "kv_lora_rank": 32,
         "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "n_shared_experts": 1},
        ("mlp.experts.1.gate_proj", "up_proj", "down_proj"),
    ),
    "Jamba": (
        {"num_experts": 4, "expert_layer_period": 1, "expert_layer_offset": 0,
         "attn_layer_period": 1, "attn_layer_offset": 0, "use_mamba_kernels": False},
        ("feed_forward.experts.1.gate_proj", "up_proj", "down_proj"),
    ),
    "Lfm2Moe": (MANY | {"num_dense_layers": 0, "layer_types": ["full_attention"]},
                ("feed_forward.experts.1.w1", "w3", "w2")),
}  # fmt: skip
DEEP = [pytest.param(name, marks=pytest.mark.deep) for name in list(FAMILIES)[2:]]


def model_of(family: str, recipe: Any = "w4g32", **more: Any) -> Any:
    """A quantized model with unfused experts that matter."""
    config = getattr(transformers, f"{family}Config")(
        **SMALL | FAMILIES.get(family, ({},))[0], **more
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    unfuse_experts(model)
    return quantize_model(model, recipe, exclude=["lm_head"]).model


def stored_of(model: Any) -> StoredModel:
    config = json.loads(model.config.to_json_string())
    return stored_model(model, config | {"architectures": [type(model).__name__]})


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", *DEEP])
def test_readers_find_the_experts_of_a_family(family: str, tmp_path: Path) -> None:
    model, ids = model_of(family), torch.arange(1, 9)[None]
    stored = stored_of(model)
    write_compressed_tensors(stored, tmp_path / "a")
    again = read_compressed_tensors(tmp_path / "a")
    gate, up, down = FAMILIES[family][1]
    first = f"model.layers.0.{gate}"
    names = [first, *(f"{first.rpartition('.')[0]}.{part}" for part in (up, down))]
    assert all(is_of_expert(name) for name in names) and set(names) <= set(again.layers)
    ours = next(name for name in stored.layers if name.endswith("experts.1.gate_up_proj"))
    both = torch.cat([again.layers[name].load().dequantize() for name in names[:2]])
    assert torch.equal(both, stored.layers[ours].load().dequantize())
    pytest.importorskip("compressed_tensors")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            theirs, info = type(model).from_pretrained(tmp_path / "a", output_loading_info=True)
        finally:
            logging.disable(logging.NOTSET)
        expected, found = model(ids).logits, theirs.eval()(ids).logits
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_experts_may_be_of_another_scheme_than_the_rest(tmp_path: Path) -> None:
    stored = stored_of(model_of("Qwen3Moe", {"*experts*": "w4g32", "*q_proj": "w6g32", "*": "w8"}))
    write_compressed_tensors(stored, tmp_path / "a")
    config = json.loads((tmp_path / "a/config.json").read_text())["quantization_config"]
    targets = [group["targets"] for group in config["config_groups"].values()]
    assert sum(target.startswith("re:") for group in targets for target in group) == 1
    again = read_compressed_tensors(tmp_path / "a")
    schemes = {name.rpartition(".")[2]: str(layer.scheme) for name, layer in again.layers.items()}
    assert schemes["down_proj"] == schemes["gate_proj"] == "w4g32"
    assert schemes["q_proj"] == "w6g32" and schemes["k_proj"] == "w8"


def test_experts_in_float_are_cut_apart_too() -> None:
    model = model_of("Mixtral", {"*q_proj": "w4"})
    stored = with_family_names(stored_of(model))
    fused = model.model.layers[0].mlp.experts
    up, down = (fused.get_submodule(f"2.{part}").weight for part in ("gate_up_proj", "down_proj"))
    name = "model.layers.0.block_sparse_moe.experts.2"
    found = [stored.tensors[f"{name}.{part}.weight"].load() for part in ("w1", "w3", "w2")]
    assert torch.equal(torch.cat(found[:2]), up) and torch.equal(found[2], down)
    assert stored.tensors[f"{name}.w1.weight"].shape == (64, 32)
    assert "model.layers.0.block_sparse_moe.gate.weight" in stored.tensors


@pytest.mark.parametrize(
    ("family", "recipe", "message"),
    [
        ("GptOss", "w4g32", "no reader would know them: their family, gpt_oss, keeps them fused"),
        ("GraniteMoe", "w4g32", "their family, granitemoe, keeps"),
        ("Mixtral", "w4g32a", r"experts\.0\.w1 \(w4g32a\): it is an expert with zero points"),
        ("Mixtral", {"*down_proj": "w8", "*": "w4g32"}, "cannot hold experts of several schemes"),
    ],
)
def test_what_no_reader_knows_is_refused(
    family: str, recipe: Any, message: str, tmp_path: Path
) -> None:
    more = LOCAL | ({"head_dim": 16} if family == "GptOss" else {}) if family != "Mixtral" else {}
    with pytest.raises(FormatError, match=message):
        write_compressed_tensors(stored_of(model_of(family, recipe, **more)), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_without_a_config_experts_have_no_names(tmp_path: Path) -> None:
    stored = stored_model(model_of("Mixtral"))
    with pytest.raises(FormatError, match="no reader would know them: no config names it"):
        write_compressed_tensors(stored, tmp_path / "a")


def test_experts_that_never_were_fused_keep_their_names() -> None:
    parts = {part: torch.nn.Linear(32, 32) for part in ("gate_proj", "up_proj", "down_proj")}
    model = torch.nn.Module()
    model.experts = torch.nn.ModuleList([torch.nn.ModuleDict(parts)])
    stored = stored_model(quantize_model(model, "w4").model)
    assert with_family_names(stored) is stored
