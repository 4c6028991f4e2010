"""lm-eval takes a quantized model as it is; everything offline."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.22")
pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from quantization import quantize_model
from tests import tiny_models
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

QUESTIONS = [("In the beginning", " God"), ("And the evening", " and the morning")]


@pytest.fixture(scope="module", params=["w8a16", "w4g64a"])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """The model of lm-eval, and the quantized one in it, whose head shares codes."""
    model = tiny_models.random_model("tied")
    rules = {"re:(embed_tokens|lm_head)$": "w8g32", "*": request.param}
    quantize_model(model, rules)
    tokenizer = tiny_models.byte_tokenizer(transformers)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu"), model


def instances(kind: str, arguments: list[Any]) -> list[Instance]:
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


def test_likelihoods_are_those_of_the_model(pair: tuple[Any, Any]) -> None:
    lm, model = pair
    answers = lm.loglikelihood(instances("loglikelihood", QUESTIONS))
    tokenizer = lm.tokenizer
    for (context, continuation), (score, _) in zip(QUESTIONS, answers, strict=True):
        ids = tokenizer(context + continuation, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            chances = model(ids).logits.log_softmax(-1)[0, :-1]
        rows = range(len(tokenizer(context)["input_ids"]) - 1, ids.shape[1] - 1)
        wanted = sum(float(chances[row, ids[0, row + 1]]) for row in rows)
        assert score == pytest.approx(wanted, rel=1e-4)


def test_text_is_generated(pair: tuple[Any, Any]) -> None:
    lm, _ = pair
    options = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}
    out = lm.generate_until(instances("generate_until", [("In the beginning", options)]))
    assert len(out) == 1 and isinstance(out[0], str)


def test_the_head_stays_shared(pair: tuple[Any, Any]) -> None:
    _, model = pair
    assert model.lm_head.packed_weights is model.model.embed_tokens.packed_weights
