"""Two models side by side: what is measured, what is found, and that nothing is left behind."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn

from quantization import compare, divergence, quantize_model, unfuse_experts
from tests import tiny_models
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

DAMAGED = "model.layers.1.mlp.down_proj"


def chain(layers: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(32, 32) for _ in range(layers)))


def pair(recipe: Any = "w4g16", layers: int = 4) -> tuple[nn.Module, nn.Module]:
    reference = chain(layers)
    model = copy.deepcopy(reference)
    quantize_model(model, recipe)
    return model, reference


def llama(layers: int = 3) -> nn.Module:
    return tiny_models.random_model("llama", num_hidden_layers=layers, initializer_range=0.1)


def outputs(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    found = []
    for layer in model:
        x = layer(x)
        found.append(x.detach().double())
    return found


def decibels(signal: torch.Tensor, noise: torch.Tensor) -> float:
    return float(10 * (signal.square().sum() / noise.square().sum()).log10())


def test_figures_are_those_of_their_definition() -> None:
    model, reference = pair()
    batches = [torch.randn(5, 32), torch.randn(3, 32)]
    with compare(model, reference) as both:
        results = [both(batch) for batch in batches]
    x = torch.cat(batches)
    wanted, found = outputs(reference, x), outputs(model, x)
    assert torch.equal(torch.cat(results).double(), found[-1])
    for i, row in enumerate(both):
        own = model[i](x if i == 0 else wanted[i - 1].float()).double()
        assert row.name == str(i)
        assert row.sqnr == pytest.approx(decibels(wanted[i], found[i] - wanted[i]), rel=1e-3)
        assert row.own_sqnr == pytest.approx(decibels(wanted[i], own - wanted[i]), rel=1e-3)
        if i:
            assert row.inherited_sqnr == pytest.approx(
                decibels(wanted[i], found[i] - own), rel=1e-3
            )
        cosine = torch.cosine_similarity(wanted[i].reshape(-1), found[i].reshape(-1), dim=0)
        assert row.cosine == pytest.approx(float(cosine), abs=1e-5)
        assert row.outputs == x.numel()
    assert both.rows[0].inherited_sqnr == math.inf
    assert both.divergence.kl == pytest.approx(divergence(model, reference, batches).kl)


def test_a_damaged_layer_of_a_language_model_is_found_in_one_pass() -> None:
    reference = llama()
    model = copy.deepcopy(reference)
    quantize_model(model, "w8g32", exclude="lm_head")
    layer = model.get_submodule(DAMAGED)
    broken = layer.weight.clone()
    broken[:, :8] = 0
    layer.quantize(broken)
    with compare(model, reference) as both:
        both(input_ids=torch.randint(0, 64, (2, 12)))
    assert both.sort("own_sqnr")[0].name == DAMAGED
    first = both.first(sqnr=25)
    assert first is not None and first.name == DAMAGED
    kept = both.keep(max_divergence=both.divergence.kl / 20)
    assert kept.layers == (DAMAGED,) and kept.measured is not None
    again = copy.deepcopy(reference)
    quantize_model(again, kept.before("w8g32"), exclude="lm_head")
    assert type(again.get_submodule(DAMAGED)) is nn.Linear
    assert divergence(again, reference, both.batches).kl == pytest.approx(kept.measured.kl)
    assert type(model.get_submodule(DAMAGED)) is type(layer)


def hooks_of(*models: nn.Module) -> int:
    return sum(len(each._forward_hooks) for model in models for each in model.modules())


class Interrupts(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt


@pytest.mark.parametrize("side", ["model", "reference"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_on_either_side_leaves_both_models_as_they_were(
    side: str, error: type[BaseException]
) -> None:
    model, reference = pair()
    model.train()

    def fail(*_: Any) -> None:
        raise error("no")

    broken = model if side == "model" else reference
    hook = broken[2].register_forward_pre_hook(fail)
    with pytest.raises(error), compare(model, reference) as both:
        both(torch.ones(1, 32))
    hook.remove()
    assert hooks_of(model, reference) == 0 and model.training and model[0].training
    assert len(both) == 0 and both.batches == []
    with both:
        both(torch.ones(1, 32))
    assert len(both) == 4


def test_padding_does_not_count() -> None:
    class Embeds(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    model, reference = (Embeds(each) for each in pair())
    x, mask = torch.randn(2, 5, 32), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    with compare(model, reference) as both:
        both({"x": x, "attention_mask": mask})
    with compare(model, reference) as other:
        other({"x": torch.cat([x[0], x[1, :2]])[None], "attention_mask": torch.ones(1, 7)})
    assert [row.outputs for row in both] == [7 * 32] * 4
    for one, two in zip(both, other, strict=True):
        assert one.sqnr == pytest.approx(two.sqnr, rel=1e-4)


def test_layers_that_are_shared_or_called_in_another_order_are_compared() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.turned = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            one, other = (self.b, self.a) if self.turned else (self.a, self.b)
            return one(x) + other(x) + self.a(x)

    reference = Twice()
    model = copy.deepcopy(reference)
    quantize_model(model, "w8")
    model.turned = True
    with compare(model, reference) as both:
        both(torch.randn(3, 8))
    assert {row.name: row.outputs for row in both} == {"a": 48, "b": 24}
    assert all(row.sqnr > 30 for row in both)


def test_what_the_reference_lacks_is_compared_where_both_have_it() -> None:
    reference = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = copy.deepcopy(reference)
    quantize_model(model, "w8g16")
    with compare(model, reference) as both:
        both(torch.randn(2, 5, 16))
    assert {row.name for row in both} == {"self_attn", "linear1", "linear2"}
    assert all(row.sqnr > 20 for row in both)
    assert both.keep(max_divergence=1e-9).layers


def test_experts_that_other_tokens_reach_are_no_error() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    reference = transformers.MixtralForCausalLM(config).eval()
    model = copy.deepcopy(reference)
    unfuse_experts(model)
    quantize_model(model, "w2g16", exclude="lm_head")
    for judge in (reference, copy.deepcopy(reference)):
        if judge is not reference:
            unfuse_experts(judge)
        with compare(model, judge) as both:
            both(torch.randint(0, 32, (2, 9)))
        assert len(both) and "compare: kl" in str(both)


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        (lambda m, r: compare(m, 3), TypeError, "reference is 3"),
        (lambda m, r: compare(r, r), ValueError, "quantize a copy"),
        (lambda m, r: compare(m, r)(torch.ones(1, 32)), RuntimeError, "inside its block"),
        (lambda m, r: compare(m, r).keep(1.0), ValueError, "nothing was compared yet"),
        (lambda m, r: compare(m, r).divergence, ValueError, "nothing was compared yet"),
    ],
)
def test_mistakes_are_told(wrong: Callable[..., Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        wrong(*pair())


def test_layers_are_ranked_by_what_each_alone_loses_if_that_is_wanted() -> None:
    class Minds(nn.Module):
        """Its second layer's damage is the largest, and counts for nothing."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) + 1e-6 * self.b(x)

    torch.manual_seed(0)
    reference = Minds()
    model = copy.deepcopy(reference)
    quantize_model(model, {"a": "w3", "b": "w2"})
    with compare(model, reference) as both:
        both(torch.randn(8, 16))
    assert both.sort("own_sqnr")[0].name == "b"
    wanted = both.divergence.kl / 100
    for kept in (both.keep(wanted), both.keep(wanted, measured=True)):
        assert kept.layers == ("a",)
    assert both.keep(wanted, measured=True).trials <= 6


def test_outputs_that_cannot_be_compared_are_told_and_layers_still_compared() -> None:
    class Boxes(nn.Sequential):
        def forward(self, x: torch.Tensor) -> Any:
            return {"boxes": super().forward(x)}

    model, reference = (Boxes(*each) for each in pair())
    with compare(model, reference) as both:
        both(torch.ones(2, 32))
    assert len(both) == 4 and "compare: the model returns a dict, which has no logits" in str(both)
    with pytest.raises(ValueError, match="which has no logits"):
        both.keep(0.1)


def test_autocast_of_the_caller_is_that_of_both() -> None:
    model, reference = pair()
    with compare(model, reference) as both, torch.autocast("cpu", torch.bfloat16):
        both(torch.randn(8, 32))
    with torch.autocast("cpu", torch.bfloat16):
        loss = divergence(model, reference, both.batches).kl
    assert both.divergence.kl == pytest.approx(loss)


def test_keep_says_when_nothing_does() -> None:
    model, reference = pair()
    with compare(model, reference) as both:
        both(torch.randn(4, 32))
        with pytest.raises(ValueError, match="with all 4 layers in float the model still loses 0"):
            both.keep(max_divergence=-1.0)
        assert both.keep(max_divergence=100.0) == {}
    assert "compare: kl" in both._repr_html_()


@pytest.mark.deep
def test_a_damaged_layer_of_smollm2_is_found_in_one_pass() -> None:
    from quantization.demo.model_sources import ModelError, load_model

    pytest.importorskip("transformers")
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        loaded = load_model("smollm2")
    except ModelError as error:
        pytest.skip(str(error))
    model = copy.deepcopy(loaded.model)
    quantize_model(model, "w4g32a", exclude=loaded.exclude)
    name = "model.layers.11.mlp.up_proj"
    broken = model.get_submodule(name).weight.clone()
    broken[:, ::4] = 0  # of 4 bits alone, the worst layer has 14 dB
    model.get_submodule(name).quantize(broken)
    with compare(model, loaded.model) as both:
        for row in torch.randint(0, 49152, (2, 64)):
            both(input_ids=row[None])
    assert both.sort("own_sqnr")[0].name == name
