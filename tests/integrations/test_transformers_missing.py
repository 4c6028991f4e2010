"""Layers whose weight a checkpoint lacks stay in float, are drawn as ever, and are reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.22")
pytest.importorskip("accelerate")

from safetensors.torch import load_file, save_file
from torch import nn

from quantization import PackedLinearLayer, quantize_model
from quantization.integrations.transformers import QuantizationConfig
from quantization.integrations.transformers_missing import REASON
from tests import tiny_models
from tests.integrations.saved_models import assert_same, load, quantized
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

HEADS = [
    ("llama", "AutoModelForSequenceClassification", ["score"]),
    ("bert", "AutoModelForQuestionAnswering", ["qa_outputs"]),
    ("llama", "AutoModelForTokenClassification", ["score"]),
    ("bert", "AutoModelForSequenceClassification", ["classifier", "bert.pooler.dense"]),
    ("bert", "AutoModelForMultipleChoice", ["classifier", "bert.pooler.dense"]),
    ("gpt2", "AutoModelForSequenceClassification", ["score"]),
]


def load_seeded(cls: Any, folder: Path, **options: Any) -> Any:
    torch.manual_seed(1)
    return cls.from_pretrained(folder, **options)


def change(folder: Path, to: Path, **tensors: Any) -> Path:
    """A copy of a model without some tensors, or with others in their place; ``__`` is a dot."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(to)
    state = load_file(to / "model.safetensors")
    for name, tensor in tensors.items():
        key = name.replace("__", ".")
        state.pop(key, None)
        if tensor is not None:
            state[key] = tensor
    save_file(state, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.mark.parametrize(("kind", "task", "heads"), HEADS)
def test_a_head_of_a_new_task(
    kind: str, task: str, heads: list[str], floats: dict[str, Path], tmp_path: Path
) -> None:
    cls = getattr(transformers, task)
    wanted = load_seeded(cls, floats[kind])
    config = QuantizationConfig("w4g32a")
    model = load_seeded(cls, floats[kind], quantization_config=config)
    quantize_model(wanted, "w4g32a", exclude=heads)
    assert_same(model, wanted)
    report = model.hf_quantizer.report
    for head in heads:
        assert type(model.get_submodule(head)) is nn.Linear
        assert model.get_submodule(head).weight.requires_grad
        assert (report[head].status, report[head].reason) == ("left", REASON)
    assert REASON in repr(report) and set(quantized(model)).isdisjoint(heads)

    model.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path)
    assert_same(again, model)


def test_the_figures_of_the_report_are_those_of_the_model(floats: dict[str, Path]) -> None:
    cls = transformers.AutoModelForSequenceClassification
    config = QuantizationConfig("w4g32a")
    got = load_seeded(cls, floats["llama"], quantization_config=config).hf_quantizer.report
    wanted = quantize_model(load_seeded(cls, floats["llama"]), "w4g32a", exclude="score")
    for name in ("bytes_before", "bytes_after", "model_bytes_after", "bits_per_weight"):
        assert getattr(got, name) == getattr(wanted, name), name
    assert got.coverage == pytest.approx(wanted.coverage)
    assert {t.name for t in got.float_tensors} == {t.name for t in wanted.float_tensors}


def test_strict_refuses_a_head_that_is_not_excluded(floats: dict[str, Path]) -> None:
    cls = transformers.AutoModelForSequenceClassification
    with pytest.raises(ValueError, match=f"(?s)1 layers would be left.*score: {REASON}"):
        cls.from_pretrained(
            floats["llama"], quantization_config=QuantizationConfig("w4g32a", strict=True)
        )
    config = QuantizationConfig("w4g32a", "score", strict=True)
    model = cls.from_pretrained(floats["llama"], quantization_config=config)
    assert model.hf_quantizer.report["score"].status == "excluded"


def test_a_head_of_another_size(floats: dict[str, Path], tmp_path: Path) -> None:
    cls = transformers.AutoModelForSequenceClassification
    cls.from_pretrained(floats["llama"], num_labels=5).save_pretrained(tmp_path)
    config = QuantizationConfig("w4g32a")
    same = cls.from_pretrained(tmp_path, quantization_config=config)
    assert type(same.score) is PackedLinearLayer
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        cls.from_pretrained(tmp_path, num_labels=3, quantization_config=config)
    options = {"num_labels": 3, "ignore_mismatched_sizes": True}
    model = load_seeded(cls, tmp_path, quantization_config=config, **options)
    wanted = load_seeded(cls, tmp_path, **options)
    quantize_model(wanted, "w4g32a", exclude="score")
    assert_same(model, wanted)
    assert model.hf_quantizer.report["score"].reason == REASON


def test_an_inner_layer_that_is_missing(floats: dict[str, Path], tmp_path: Path) -> None:
    folder = change(floats["llama"], tmp_path, model__layers__1__mlp__up_proj__weight=None)
    model = load("llama", folder, quantization_config=QuantizationConfig("w4g32a"))
    assert type(model.model.layers[1].mlp.up_proj) is nn.Linear
    assert model.hf_quantizer.report["model.layers.1.mlp.up_proj"].reason == REASON
    assert len(quantized(model)) == 13


def test_tied_weights_that_are_both_missing_stay_tied(
    floats: dict[str, Path], tmp_path: Path
) -> None:
    folder = change(floats["tied"], tmp_path, model__embed_tokens__weight=None)
    rules = {"embed_tokens": "w4g32a", "*": "w4g32a"}
    model = load("tied", folder, quantization_config=QuantizationConfig(rules, exclude=()))
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.hf_quantizer.report["lm_head"].reason == REASON
    model.tie_weights()
    model(**tiny_models.inputs_for("tied"))


def test_a_tied_table_of_another_size(floats: dict[str, Path], tmp_path: Path) -> None:
    table = torch.randn(100, 64)
    folder = change(floats["tied"], tmp_path, model__embed_tokens__weight=table)
    rules = {"embed_tokens": "w4g32a", "*": "w4g32a"}
    config = QuantizationConfig(rules, exclude=())
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load("tied", folder, quantization_config=config)
    model = load("tied", folder, quantization_config=config, ignore_mismatched_sizes=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.shape == (264, 64)
    assert len(quantized(model)) == 14
