"""Initialisations of adapters that write the weight: the rest is quantized, or they are refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.22")
peft = pytest.importorskip("peft")

from peft.tuners.lora import loraga
from peft.tuners.lora.config import CordaConfig

from quantization import quantize_model
from tests import tiny_models
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

IDS = torch.arange(3, 19).view(2, 8)


def model_of(scheme: str | None) -> Any:
    model = tiny_models.random_model("llama").eval()
    if scheme is not None:
        quantize_model(model, scheme, exclude="lm_head")
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def config_of(how: Any, **options: Any) -> Any:
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | options
    return peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=how, **options)


def prepared(model: Any, how: Any) -> Any:
    """The configuration, after what PEFT wants done before."""
    if how == "corda":
        pytest.importorskip("attr", reason="PEFT's corda needs attrs, which it does not install")
        from peft.tuners.lora import corda

        config = config_of(how, corda_config=CordaConfig(corda_method="ipm"))
        corda.preprocess_corda(model, config, run_model=lambda: model(IDS[:1]))
        return config
    if how == "lora_ga":
        torch.manual_seed(2)
        for name, module in model.named_modules():
            if name.endswith(("q_proj", "v_proj")):
                module._peft_loraga_grad = 0.01 * torch.randn(module.weight.shape)
        return config_of(how, lora_ga_config=peft.LoraGAConfig())
    return config_of(how)


def test_pefts_corda_may_be_without_its_attrs() -> None:
    code = "import sys; sys.modules['attr'] = None; import quantization.integrations.peft"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("how", [True, "gaussian", "orthogonal", "eva", "mica"])
def test_what_only_adds_leaves_every_code(how: Any) -> None:
    model = model_of("w4g32a")
    base = model.model.layers[0].self_attn.q_proj
    codes, wanted = base.packed_weights, logits(model)
    adapted = peft.get_peft_model(model, prepared(model, how)).eval()
    assert base.packed_weights is codes
    if how != "orthogonal":  # which is no zero at the start
        assert torch.equal(logits(adapted), wanted)


@pytest.mark.parametrize("scheme", ["w8a16", "w4g32a", "nf4"])
@pytest.mark.parametrize("how", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga"])
def test_what_takes_from_the_weight_quantizes_the_rest(how: str, scheme: str) -> None:
    model = model_of(scheme)
    layer = model.model.layers[0].self_attn.q_proj
    was, wanted = layer.weight.clone(), logits(model)
    adapted = peft.get_peft_model(model, prepared(model, how)).eval()
    base = adapted.base_model.model.model.layers[0].self_attn.q_proj
    rest = was - base.get_delta_weight("default")
    fresh = type(layer)(
        *was.T.shape, bias=False, **({} if scheme == "w8a16" else {"scheme": scheme})
    )
    fresh.quantize(rest)
    assert base.base_layer is layer and not torch.equal(layer.weight, was)
    torch.testing.assert_close(layer.weight, fresh.weight, rtol=0.0, atol=0.02)
    assert {"eigens", "_peft_loraga_grad"}.isdisjoint(vars(layer))
    change = (logits(adapted) - wanted).norm() / wanted.norm()
    assert change < (0.02 if scheme == "w8a16" else 0.3)


def test_a_part_that_was_taken_comes_back_with_the_adapter(tmp_path: Path) -> None:
    adapted = peft.get_peft_model(model_of("w4g32a"), config_of("pissa")).eval()
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(model_of("w4g32a"), tmp_path).eval()
    torch.testing.assert_close(logits(again), logits(adapted))


def test_kasa_truncates_the_weight_of_codes() -> None:
    config = config_of(True, kasa_config=peft.KasaConfig())
    adapted = peft.get_peft_model(model_of("w8a16"), config)
    exact = peft.get_peft_model(model_of(None), config_of(True, kasa_config=peft.KasaConfig()))
    one, other = (each.base_model.model.model.layers[1].self_attn for each in (adapted, exact))
    error = one.q_proj.base_layer.weight - other.q_proj.base_layer.weight
    assert error.norm() < 0.02 * other.q_proj.base_layer.weight.norm()


def test_loftq_is_refused_before_anything_changes() -> None:
    for targets in (["q_proj", "lm_head"], "all-linear", None):
        model = model_of("w4g32a")
        before = {name: id(module) for name, module in model.named_modules()}
        config = config_of(True, target_modules=targets)
        config.init_lora_weights = "loftq"  # as with scipy, which PEFT wants for it
        with pytest.raises(ValueError, match=r"q_proj is quantized: .*'loftq'.*use True, 'pissa'"):
            peft.get_peft_model(model, config)
        assert {name: id(module) for name, module in model.named_modules()} == before


def test_gradients_of_codes_are_refused_before_anything_changes() -> None:
    model = model_of("w4g32a")
    asked = [p.requires_grad for p in model.parameters()]
    config = config_of("lora_ga", lora_ga_config=peft.LoraGAConfig())
    with pytest.raises(ValueError, match=r"codes have none\. Nothing was changed; call preprocess"):
        loraga.preprocess_loraga(model, config, lambda: None)
    assert [p.requires_grad for p in model.parameters()] == asked
