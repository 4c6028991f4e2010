"""Which layer of a model is shared how: no process is needed to say so."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn

from quantization import quantize_model, unfuse_experts
from quantization.distributed import (
    ColwiseQuantized,
    RowwiseQuantized,
    plan_of,
    tensor_parallel,
)
from quantization.distributed.plan import _matches
from quantization.distributed.styles import SumsGradients
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="needs torch.distributed"
)


class Block(nn.Module):
    """An attention and an MLP by name, as plans see them."""

    def __init__(self, heads: int = 8, kv_heads: int = 4, hidden: int = 256) -> None:
        super().__init__()
        attention = nn.Module()
        attention.head_dim = 16
        attention.q_proj = nn.Linear(128, 16 * heads)
        attention.k_proj = nn.Linear(128, 16 * kv_heads)
        attention.o_proj = nn.Linear(16 * heads, 128)
        attention.q_norm = nn.LayerNorm(16)
        mlp = nn.Module()
        mlp.up, mlp.down = nn.Linear(128, hidden), nn.Linear(hidden, 128)
        self.attn, self.mlp = attention, mlp


class Model(nn.Module):
    tp_plan = {  # noqa: RUF012
        "layers.*.attn.q_proj": "colwise",
        "layers.*.attn.k_proj": "colwise",
        "layers.*.attn.o_proj": "rowwise",
        "layers.*.attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.mlp.up": "colwise",
        "layers.*.mlp.down": "rowwise",
        "embed": "embedding_rowwise",
        "head": "colwise_gather_output",
    }

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 128), nn.Linear(128, 50)
        self.layers = nn.ModuleList([Block(**options), Block(**options)])


def planned(recipe: Any, count: int, **options: Any) -> dict[str, str]:
    model = Model(**options)
    quantize_model(model, recipe)
    return {name: repr(style) for name, style in plan_of(model, count).items()}


RECIPE = {nn.Embedding: "w8", "head": "w8", "*": "w4g32"}
COL, ROW = repr(ColwiseQuantized()), repr(RowwiseQuantized())
JOIN = repr(ColwiseQuantized(gather_output=True))


@pytest.mark.parametrize("count", [2, 4])
def test_even_blocks_are_shared_by_heads_and_groups(count: int) -> None:
    plan = planned(RECIPE, count)
    for i in range(2):
        attention = f"layers.{i}.attn."
        assert plan[attention + "q_proj"] == plan[attention + "k_proj"] == COL
        assert plan[attention + "o_proj"] == plan[f"layers.{i}.mlp.down"] == ROW
        assert plan[f"layers.{i}.mlp.up"] == COL
        assert "SumsGradients" in plan[attention + "q_norm"]
    assert plan["embed"] == ROW and plan["head"] == JOIN
    assert len(plan) == 14


@pytest.mark.parametrize(
    ("options", "count", "scheme"),
    [
        ({"kv_heads": 2}, 4, "w4g32"),  # fewer heads than processes
        ({"heads": 6, "kv_heads": 3}, 2, "w4g16"),  # a head too many
        ({"heads": 8, "kv_heads": 4}, 4, "w4g64"),  # o_proj has two groups
    ],
)
def test_attention_that_cannot_be_shared_is_joined(
    options: dict[str, int], count: int, scheme: str
) -> None:
    plan = planned({"*": scheme}, count, **options)
    attention = "layers.1.attn."
    names = ("q_proj", "k_proj", "o_proj")
    assert [plan[attention + name] for name in names] == [JOIN, JOIN, JOIN]
    assert attention + "q_norm" not in plan
    assert plan["layers.1.mlp.down"].startswith("RowwiseQuantized")


def test_an_uneven_mlp_is_shared_by_whole_groups() -> None:
    plan = planned({"*": "w4g32"}, 2, hidden=224)  # 7 groups
    assert plan["layers.0.mlp.up"] == repr(ColwiseQuantized(unit=32))
    assert plan["layers.0.mlp.down"] == repr(RowwiseQuantized(unit=32))
    plan = planned({"*": "w4g128"}, 4, hidden=256)  # two groups for four
    assert plan["layers.0.mlp.up"] == plan["layers.0.mlp.down"] == JOIN


def test_layers_whose_groups_are_scattered_are_joined_and_not_summed() -> None:
    recipe = {nn.Embedding: "w8", "re:down": "w4g32+order", "*": "w4g32"}
    plan = planned(recipe, 2)
    assert plan["layers.0.mlp.up"] == plan["layers.0.mlp.down"] == JOIN
    assert plan["layers.0.attn.o_proj"] == ROW
    plan = planned({nn.Embedding: "w8", "re:down": "w4g32", "*": "w4g32+order"}, 2)
    assert plan["layers.0.mlp.up"] == COL and plan["layers.0.attn.o_proj"] == JOIN


def test_layers_left_in_float() -> None:
    plan = planned({"q_proj": None, "up": None, "head": None, "*": "w4g32"}, 2)
    assert plan["layers.0.attn.q_proj"] == plan["layers.0.mlp.up"] == COL
    assert "head" not in plan and "embed" not in plan
    plan = planned({"q_proj": None, "*": "w4g16"}, 2, heads=6, kv_heads=3)
    assert "layers.0.attn.q_proj" not in plan and plan["layers.0.attn.k_proj"] == JOIN


def test_models_without_a_plan_or_with_another() -> None:
    with pytest.raises(ValueError, match="Linear says nothing of how it can be shared"):
        plan_of(nn.Linear(2, 2), 2)
    model = Model()
    model.tp_plan = {"layers.*.mlp": "mla_kv_a_proj"}
    with pytest.raises(
        ValueError, match=r"style 'mla_kv_a_proj' for layers\.0\.mlp, and quantized"
    ):
        plan_of(model, 2)
    model.tp_plan = {"layers.*.attn.q_proj.weight": "colwise"}
    with pytest.raises(
        ValueError, match=r"Parameter layers\.0\.attn\.q_proj\.weight.*unfuse_experts"
    ):
        plan_of(model, 2)
    model.tp_plan = {"elsewhere": "colwise"}
    with pytest.raises(ValueError, match="no layer of Model is both quantized and in"):
        plan_of(model, 2)


def test_experts_are_joined_once_they_are_layers() -> None:
    pytest.importorskip("transformers")
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 50, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
    with pytest.raises(ValueError, match="unfuse_experts"):
        plan_of(model, 2)
    unfuse_experts(model)
    quantize_model(model, "w4g32")
    plan = plan_of(model, 2)
    experts = [repr(style) for name, style in plan.items() if "experts.1." in name]
    assert experts and set(experts) == {JOIN}


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("layers.0.mlp.up", "layers.*.mlp.up", True),
        ("layers.0.mlp.up", "layers.*.up", False),
        ("layers.0.mlp.up", "*", False),
        ("up", "*", True),
        ("layers.10.up", "layers.1?.u*", True),
    ],
)
def test_patterns_are_matched_part_by_part(name: str, pattern: str, expected: bool) -> None:
    assert _matches(name, pattern) is expected


def test_one_process_alone_is_told_to_start_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="start several by torchrun, or give a mesh"):
        tensor_parallel(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="expected a model"):
        tensor_parallel([nn.Linear(2, 2)])


def test_styles_print_themselves() -> None:
    assert repr(ColwiseQuantized(unit=3)) == "ColwiseQuantized(unit=3, gather_output=False)"
    assert isinstance(SumsGradients(), torch.distributed.tensor.parallel.ParallelStyle)
