"""Fused experts: found, reported with their share, and made linear layers where that is known."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn

from quantization import UnfusedExperts, quantize_model, unfuse_experts
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


def statuses(report: Any) -> dict[str, str]:
    return {candidate.name: candidate.status for candidate in report}


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    got, wanted = got.detach().double(), wanted.detach().double()
    assert got.shape == wanted.shape
    return float((got - wanted).norm() / wanted.norm())


class FusedExperts(nn.Module):
    """Experts as nobody's but their author's model has them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 16, 32))
        self.positions = nn.Parameter(torch.randn(1, 16, 32))
        self.router = nn.Linear(16, 4)


def test_bare_experts_are_reported_with_their_share() -> None:
    model = nn.Sequential(FusedExperts(), nn.Conv1d(4, 4, 4))
    report = quantize_model(model, "w4")
    assert statuses(report) == {"0.up": "left", "0.router": "replaced"}
    assert report["0.up"].shape == (4, 16, 32) and report["0.up"].weights == 2048
    share = 2048 / (2048 + 512 + 68 + 68)
    assert report["0.up"].reason == (
        f"a bare Parameter of 4 experts, {share:.1%} of the model's parameters: the forward of "
        "FusedExperts is not known to unfuse_experts"
    )
    assert "4 x 16 x 32" in repr(report)
    with pytest.raises(ValueError, match=r"0\.up: a bare Parameter of 4 experts"):
        quantize_model(model, "w4", strict=True)
    for options in ({"exclude": FusedExperts}, {"exclude": "0"}):
        assert quantize_model(model, "w4", strict=True, **options)["0.up"].status == "excluded"
    rules = {FusedExperts: None, "*": "w4"}
    assert quantize_model(model, rules)["0.up"].reason == "by the rule FusedExperts"


def moe(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    config = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    experts = {
        "Mixtral": {"num_local_experts": 4},
        "Qwen2Moe": {"num_experts": 4, "moe_intermediate_size": 24},
        "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8},
        "GptOss": {"num_local_experts": 4, "head_dim": 8},
        "Olmoe": {"num_experts": 4},
    }[kind]
    made = getattr(transformers, f"{kind}Config")(**config, **experts)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(made).eval()
    for parameter in model.parameters():  # biases and experts of some are not initialised
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen2Moe", "Qwen3Moe", "GptOss", "Olmoe"])
def test_fused_experts_become_linear_layers(kind: str) -> None:
    model = moe(kind)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])
    names = [n for n, p in model.named_parameters() if p.ndim == 3]
    storages = {p.untyped_storage().data_ptr() for p in model.parameters() if p.ndim == 3}
    with torch.no_grad():
        wanted = model(ids).logits
        left = quantize_model(copy.deepcopy(model), "w8").left
        assert {c.name for c in left} == set(names) and len(names) == 4
        assert all(
            c.reason.endswith("unfuse_experts(model) makes linear layers of them") for c in left
        )
        report = unfuse_experts(model)
        assert len(report.replaced) == 2 and not report.left
        assert relative(model(ids).logits, wanted) < 1e-5
        assert storages >= {
            expert.weight.untyped_storage().data_ptr()
            for name, expert in model.named_modules()
            if "experts." in name and hasattr(expert, "weight")
        }
        report = quantize_model(model, "w8", strict=True)
        assert sum("experts" in c.name and c.replaced for c in report) >= 2 * 4 * 2
        assert relative(model(ids).logits, wanted) < 0.2
        assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] <= 10
        assert isinstance(model.model.layers[0].mlp.experts, UnfusedExperts)
        copied = copy.deepcopy(model)
        assert torch.equal(copied(ids).logits, model(ids).logits)


def test_unfusing_keeps_hooks_gradients_and_what_is_frozen() -> None:
    model = moe("Mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.down_proj.requires_grad_(False)
    calls: list[int] = []
    experts.register_forward_hook(lambda *args: calls.append(1))
    unfuse_experts(model)
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    first = model.model.layers[0].mlp.experts
    used = [e for e in range(4) if first.get_submodule(f"{e}.gate_up_proj").weight.grad is not None]
    assert calls and used and first.get_submodule("0.down_proj").weight.requires_grad is False


def test_what_cannot_be_unfused_is_left() -> None:
    pytest.importorskip("transformers")
    with pytest.warns(UserWarning, match="the forward of FusedExperts is not known"):
        report = unfuse_experts(nn.Sequential(FusedExperts()))
    assert report["0"].status == "left"
    model = moe("Mixtral")
    experts = model.model.layers[0].mlp.experts
    experts._is_expert_parallel = True
    model.model.layers[1].mlp.experts.extra = nn.Parameter(torch.zeros(2))
    with pytest.warns(UserWarning, match="no layer was replaced"):
        report = unfuse_experts(model)
    assert [c.reason for c in report.left] == [
        "the experts of MixtralExperts are spread over processes",
        "MixtralExperts has other Parameters than down_proj, gate_up_proj",
    ]


def test_the_report_of_unfusing_counts_the_same_bytes() -> None:
    model = moe("Mixtral")
    nbytes = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    report = unfuse_experts(model)
    assert report.model_bytes_before == report.model_bytes_after == nbytes
    assert report.bytes_before == report.bytes_after == 2 * 4 * (4 * 3 * 32 * 48)
    assert report[0].kind == "MixtralExperts" and report[0].name == "model.layers.0.mlp.experts"
    with pytest.warns(UserWarning, match="the model has no modules of fused experts"):
        unfuse_experts(model)
    alone = unfuse_experts(moe("Mixtral").model.layers[0].mlp.experts).model
    assert isinstance(alone, UnfusedExperts)


@pytest.mark.parametrize("thing", [None, "model"])
def test_an_object_that_is_not_a_model(thing: Any) -> None:
    with pytest.raises(TypeError, match="expected a model"):
        unfuse_experts(thing)


def test_tokens_beyond_the_last_expert_belong_to_none() -> None:
    model = moe("Mixtral")
    fused = model.model.layers[0].mlp.experts
    unfused = unfuse_experts(copy.deepcopy(fused)).model
    x, places = torch.randn(3, 32), torch.tensor([[0, 4], [3, 1], [4, 4]])
    weights = torch.rand(3, 2)
    fused.config._experts_implementation = "eager"
    with torch.no_grad():
        torch.testing.assert_close(unfused(x, places, weights), fused(x, places, weights))


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_every_form_that_transformers_knows(
    gate: bool, bias: bool, transposed: bool, norm: bool
) -> None:
    moe_forms = pytest.importorskip("transformers.integrations.moe")

    @moe_forms.use_experts_implementation(
        has_gate=gate, has_bias=bias, is_transposed=transposed, has_post_expert_norm=norm
    )
    class Experts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts, self.act_fn = 4, nn.SiLU()
            wide = 24 if gate else 12
            for name, rows, cols in (("up_proj", wide, 8), ("down_proj", 8, 12)):
                name = f"gate_{name}" if gate and name == "up_proj" else name
                shape = (4, cols, rows) if transposed else (4, rows, cols)
                setattr(self, name, nn.Parameter(torch.randn(shape)))
                if bias:
                    setattr(self, f"{name}_bias", nn.Parameter(torch.randn(4, rows)))
            if norm:
                self.post_expert_norm = nn.LayerNorm(8)

        def forward(self, hidden_states, top_k_index, top_k_weights):
            raise NotImplementedError

    fused = Experts(None)
    x, weights = torch.randn(5, 8), torch.rand(5, 2)
    places = torch.stack([torch.randperm(4)[:2] for _ in range(5)])
    wanted = moe_forms.batched_mm_experts_forward(fused, x, places, weights)
    unfused = unfuse_experts(nn.Sequential(fused)).model[0]
    assert isinstance(unfused, UnfusedExperts)
    torch.testing.assert_close(unfused(x, places, weights), wanted, rtol=1e-4, atol=1e-4)
