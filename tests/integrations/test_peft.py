"""LoRA over quantized layers: trains, is saved and loaded, merges, and comes off again."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.22")
peft = pytest.importorskip("peft")

from torch import nn

import quantization.integrations.peft as integration
from quantization import PackedLinearLayer, QWQALinearLayer, dequantize_model, quantize_model
from tests import tiny_models
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

SCHEMES = ["w8a16", "w4g32a", "w8", "nf4", "kmeans4", "w3g32+dq"]
IDS = torch.arange(3, 19).view(2, 8)


def model_of(scheme: str, kind: str = "llama", **options: Any) -> Any:
    model = tiny_models.random_model(kind)
    quantize_model(model, scheme, exclude="lm_head", **options)
    return model


def lora(**options: Any) -> Any:
    options = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"} | options
    return peft.LoraConfig(task_type="CAUSAL_LM", **options)


def with_adapter(model: Any, seed: int = 1, **options: Any) -> Any:
    """An adapter that does something: PEFT's start at zero."""
    adapted = peft.get_peft_model(model, lora(**options)).eval()
    torch.manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return adapted


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def codes(model: Any) -> dict[str, torch.Tensor]:
    """All tensors of a model but those of adapters, by names without PEFT's."""
    return {
        key.replace("base_model.model.", "").replace("base_layer.", ""): tensor.clone()
        for key, tensor in model.state_dict().items()
        if "lora_" not in key
    }


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).detach().norm() / wanted.detach().norm())


def assert_equal(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(got[key], wanted[key])] == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_changes_the_adapter_and_no_code(scheme: str) -> None:
    model = model_of(scheme)
    before = codes(model)
    adapted = peft.get_peft_model(model, lora()).train()
    layer = adapted.base_model.model.model.layers[0].mlp.up_proj
    assert type(layer) is integration.QuantizedLoraLinear
    assert isinstance(layer.base_layer, (QWQALinearLayer, PackedLinearLayer))
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.01)
    losses = []
    for _ in range(12):
        loss = adapted(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert_equal(codes(adapted), before)


@pytest.mark.parametrize("scheme", ["w8a16", "w4g32a"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_is_saved_and_loaded(scheme: str, dtype: Any, tmp_path: Path) -> None:
    model = tiny_models.random_model("llama").to(dtype)
    quantize_model(model, scheme, exclude="lm_head")
    adapted = with_adapter(copy.deepcopy(model))
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(model, tmp_path).eval()
    layer = again.base_model.model.model.layers[1].self_attn.q_proj
    assert type(layer) is integration.QuantizedLoraLinear
    assert torch.equal(logits(again), logits(adapted))
    assert relative(logits(adapted).float(), logits(model_of(scheme))) > 0.01


@pytest.mark.parametrize("scheme", SCHEMES)
def test_merging_quantizes_anew_and_unmerging_is_exact(scheme: str) -> None:
    adapted = with_adapter(model_of(scheme))
    before, wanted = codes(adapted), logits(adapted)
    plain = copy.deepcopy(adapted.base_model.model.model.layers[0].mlp.up_proj)
    adapted.merge_adapter()
    merged = adapted.base_model.model.model.layers[0].mlp.up_proj
    sums = plain.base_layer.weight + plain.get_delta_weight("default")
    again = copy.deepcopy(plain.base_layer)
    again.quantize(
        plain.base_layer.packed().dequantize("float32") + plain.get_delta_weight("default")
    )
    assert torch.equal(merged.base_layer.weight, again.weight)
    assert relative(again.weight, sums) < {"w3g32+dq": 0.3, "w8": 0.02, "w8a16": 0.02}.get(
        scheme, 0.15
    )
    loose = {"w8": 0.05, "w8a16": 0.05}.get(scheme, 0.9)
    assert relative(logits(adapted), wanted) < loose
    adapted.unmerge_adapter()
    assert_equal(codes(adapted), before)
    assert torch.equal(logits(adapted), wanted)


@pytest.mark.parametrize("scheme", ["w8a16", "w8g32a"])
def test_merge_and_unload(scheme: str) -> None:
    adapted = with_adapter(model_of(scheme))
    wanted = logits(adapted)
    model = adapted.merge_and_unload()
    kinds = {type(m) for n, m in model.named_modules() if n.endswith("up_proj")}
    assert kinds <= {QWQALinearLayer, PackedLinearLayer} and kinds
    assert relative(logits(model), wanted) < 0.05
    assert not [n for n, _ in model.named_modules() if "lora" in n]


def test_unload_leaves_the_codes_as_they_were() -> None:
    model = model_of("w4g32a")
    before = codes(model)
    assert_equal(codes(with_adapter(model).unload()), before)


def test_merging_into_a_float_model_is_exact(tmp_path: Path) -> None:
    adapted = with_adapter(model_of("w4g32a"))
    wanted = logits(adapted)
    adapted.save_pretrained(tmp_path)
    model = model_of("w4g32a")
    dequantize_model(model)
    merged = peft.PeftModel.from_pretrained(model, tmp_path).merge_and_unload()
    assert type(merged.model.layers[0].mlp.up_proj) is nn.Linear
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-3, atol=1e-4)


def test_several_adapters() -> None:
    adapted = with_adapter(model_of("w8a16"))
    before, first = codes(adapted), logits(adapted)
    adapted.add_adapter("other", lora(target_modules=["q_proj", "up_proj"]))
    torch.manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if ".other." in name:
            nn.init.normal_(parameter, std=0.1)
    adapted.merge_adapter(["default"])
    adapted.merge_adapter(["other"])
    both = logits(adapted)
    assert relative(both, first) > 0.01
    adapted.unmerge_adapter()
    adapted.set_adapter("default")
    assert_equal(codes(adapted), before)
    assert torch.equal(logits(adapted), first)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}])
def test_variants_merge(options: dict[str, bool]) -> None:
    model = tiny_models.random_model("bert")
    quantize_model(model, "w8a16", exclude="decoder")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "dense"], **options)
    adapted = peft.get_peft_model(model, config).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            nn.init.normal_(parameter, std=0.05)
    before, wanted = codes(adapted), logits(adapted)
    adapted.merge_adapter()
    assert relative(logits(adapted), wanted) < 0.05
    adapted.unmerge_adapter()
    assert_equal(codes(adapted), before)
    assert torch.equal(logits(adapted), wanted)
    assert relative(logits(adapted.merge_and_unload(safe_merge=True)), wanted) < 0.05


def test_layers_of_conv1d() -> None:
    adapted = with_adapter(model_of("w8a16", "gpt2"), target_modules=["c_attn", "c_proj"])
    wanted = logits(adapted)
    assert relative(logits(adapted.merge_and_unload()), wanted) < 0.05


def test_embeddings() -> None:
    model = tiny_models.random_model("llama")
    quantize_model(model, {"embed_tokens": "w8g32", "*": "w8a16"})
    adapted = with_adapter(model, target_modules=["embed_tokens", "q_proj"])
    layer = adapted.base_model.model.model.embed_tokens
    assert type(layer) is integration.QuantizedLoraEmbedding
    before, wanted = codes(adapted), logits(adapted)
    adapted.merge_adapter()
    assert relative(logits(adapted), wanted) < 0.05
    adapted.unmerge_adapter()
    assert_equal(codes(adapted), before)
    assert torch.equal(logits(adapted), wanted)


def test_a_broken_adapter_does_not_break_the_layer() -> None:
    adapted = with_adapter(model_of("w4g32a"), target_modules=["q_proj"])
    before = codes(adapted)
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_A["default"].weight[0, 0] = torch.nan
    for safe in (False, True):
        with pytest.raises(ValueError, match=r"NaNs detected|the merged weight has nan at index"):
            layer.merge(safe_merge=safe)
        assert not layer.merged
        assert_equal(codes(adapted), before)


def test_other_adapters_train_and_refuse_to_merge() -> None:
    config = peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    )
    adapted = peft.get_peft_model(model_of("w4g32a"), config)
    adapted(IDS, labels=IDS).loss.backward()
    assert [p for p in adapted.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    for merge in (adapted.merge_adapter, adapted.merge_and_unload):
        with pytest.raises(ValueError, match="cannot be merged into a quantized layer"):
            merge()


_BY_HAND = """
import peft, torch
from torch import nn
from quantization import PackedLinearLayer
model = nn.Sequential(PackedLinearLayer(16, 16, scheme="w4"), nn.LayerNorm(16))
adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]))
import quantization.integrations.peft
try:
    adapted.merge_adapter()
except ValueError as error:
    print(error)
"""


def test_layers_made_before_the_import_say_so() -> None:
    done = subprocess.run([sys.executable, "-c", _BY_HAND], capture_output=True, text=True)
    assert "import quantization.integrations.peft before the adapter is made" in done.stdout


def test_a_swap_is_enough_of_an_import() -> None:
    script = (
        "import peft, sys\nfrom torch import nn\nfrom quantization import quantize_model\n"
        "model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))\nquantize_model(model, 'w4')\n"
        "adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=['0']))\n"
        "print(type(adapted.base_model.model[0]).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "QuantizedLoraLinear", done.stderr


def test_a_model_quantized_on_loading_is_trained_and_merged(tmp_path: Path) -> None:
    from quantization.integrations.transformers import QuantizationConfig

    tiny_models.random_model("tied").save_pretrained(tmp_path / "float")
    cls = type(tiny_models.random_model("tied"))
    config = QuantizationConfig("w8a16")
    model = cls.from_pretrained(tmp_path / "float", quantization_config=config)
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    adapted = with_adapter(model)
    adapted.train()(IDS, labels=IDS).loss.backward()
    wanted = logits(adapted.eval())
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = cls.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again), logits(merged))
    assert relative(logits(again), wanted) < 0.05


# ---- modules that are trained themselves ---------------------------------------------------------


@pytest.mark.parametrize("scheme", ["w4g32a", "w8a16"])
def test_a_quantized_module_to_save_is_trained_as_a_float_copy(scheme: str, tmp_path: Path) -> None:
    model = tiny_models.random_model("llama")
    quantize_model(model, scheme)
    wanted, ids = logits(model), IDS
    assert isinstance(model.lm_head, (PackedLinearLayer, QWQALinearLayer))
    adapted = peft.get_peft_model(
        model, lora(target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    head = adapted.base_model.model.lm_head
    own = head.modules_to_save["default"]
    assert type(own) is nn.Linear and own.weight.requires_grad
    assert isinstance(head.original_module, (PackedLinearLayer, QWQALinearLayer))
    assert (logits(adapted) - wanted).abs().max() < 1e-4

    before = own.weight.detach().clone()
    adapted(ids, labels=ids).loss.backward()
    torch.optim.SGD([own.weight], lr=1.0).step()
    assert not torch.equal(own.weight, before)
    adapted.save_pretrained(tmp_path)
    again = tiny_models.random_model("llama")
    quantize_model(again, scheme)
    loaded = peft.PeftModel.from_pretrained(again, tmp_path)
    trained = loaded.base_model.model.lm_head.modules_to_save["default"]
    assert torch.equal(trained.weight, own.weight) and not trained.weight.requires_grad
    assert torch.equal(logits(loaded), logits(adapted.eval()))
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), wanted)
    merged = adapted.merge_and_unload()
    assert type(merged.lm_head) is nn.Linear and torch.equal(merged.lm_head.weight, own.weight)


def test_what_a_module_to_save_holds_is_float_too() -> None:
    model = tiny_models.random_model("llama")
    quantize_model(model, {"embed_tokens": "w8", "*": "w4g32a"})
    adapted = peft.get_peft_model(
        model, lora(target_modules=["q_proj"], modules_to_save=["mlp", "embed_tokens"])
    )
    names = [name for name, each in adapted.named_parameters() if each.requires_grad]
    assert sum("mlp.modules_to_save.default" in name for name in names) == 6
    assert sum("embed_tokens.modules_to_save.default.weight" in name for name in names) == 1
