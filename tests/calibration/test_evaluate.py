"""Perplexity and divergence against plain definitions, with errors over sequences."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from torch import nn
from torch.nn import functional

from quantization.calibration import calibrate, divergence, evaluate, perplexity
from quantization.models.quantizer import quantize_model
from tests.tiny_models import random_model
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


def ids(rows: int, length: int = 12) -> torch.Tensor:
    return torch.randint(264, (rows, length), generator=torch.Generator().manual_seed(1))


def rough(kind: str) -> nn.Module:
    model = random_model(kind)
    quantize_model(model, "w2g32a")
    return model


def error_of(sums: list[float], counts: list[int]) -> float:
    """Of a ratio, as the textbook has it."""
    mean, m = sum(sums) / sum(counts), len(sums)
    size = sum(counts) / m
    variance = sum((s - mean * n) ** 2 for s, n in zip(sums, counts, strict=True)) / (m - 1)
    return math.sqrt(variance / m) / size


@pytest.mark.parametrize("pieces", [1 << 22, 1000], ids=["at once", "in pieces"])
def test_a_causal_model_against_the_definition(monkeypatch, pieces: int) -> None:
    monkeypatch.setattr(evaluate, "_NUMBERS", pieces)
    model, reference, given = rough("llama"), random_model("llama"), ids(4)
    mask = torch.ones_like(given)
    mask[0, 7:] = 0
    batches = [{"input_ids": given, "attention_mask": mask}]
    kl, same, loss, counts = [], [], [], []
    with torch.no_grad():
        ours, theirs = (m(**batches[0]).logits.double() for m in (model, reference))
    for row, length in enumerate((7, 12, 12, 12)):
        q, p = ours[row, : length - 1], theirs[row, : length - 1]
        kl.append(
            functional.kl_div(
                q.log_softmax(-1), p.log_softmax(-1), reduction="sum", log_target=True
            ).item()
        )
        same.append((q.argmax(-1) == p.argmax(-1)).sum().item())
        loss.append(functional.cross_entropy(q, given[row, 1:length], reduction="sum").item())
        counts.append(length - 1)
    found = divergence(model, reference, batches)
    total = sum(counts)
    assert (found.tokens, found.blocks) == (total, 4)
    assert found.kl == pytest.approx(sum(kl) / total)
    assert found.kl_error == pytest.approx(error_of(kl, counts))
    assert found.top1 == sum(same) / total
    assert found.perplexity == pytest.approx(math.exp(sum(loss) / total))
    assert found.drift is None and found.drift_error is None
    alone = perplexity(model, batches)
    assert alone.loss == pytest.approx(sum(loss) / total)
    assert alone.error == pytest.approx(error_of(loss, counts))
    assert alone.tokens == total
    assert perplexity(reference, batches).perplexity == pytest.approx(found.reference_perplexity)


def test_forms_of_a_text_are_the_same_text() -> None:
    model, given = random_model("llama"), ids(3)
    row_by_row = perplexity(model, given)
    assert row_by_row.blocks == 3
    for other in (given.reshape(-1), [given], ((part,) for part in given.split(1))):
        assert perplexity(model, other, window=12).loss == pytest.approx(row_by_row.loss)
    assert perplexity(model, given.reshape(-1)[:25], window=12).tokens == 22  # one token is left


def test_an_encoder_drifts() -> None:
    model, reference = (m.bert for m in (rough("bert"), random_model("bert")))
    given = ids(3)
    mask = torch.ones_like(given)
    mask[1, 4:] = 0
    batch = {"input_ids": given, "attention_mask": mask}
    with torch.no_grad():
        hidden = [m(**batch).last_hidden_state for m in (model, reference)]
    drifts = []
    for row, length in enumerate((12, 4, 12)):
        one, other = (each[row, :length].double().mean(0) for each in hidden)
        drifts.append(1 - functional.cosine_similarity(one, other, dim=0).item())
    found = divergence(model, reference, batch)
    assert found.drift == pytest.approx(sum(drifts) / 3, rel=1e-9)
    assert found.drift_error == pytest.approx(error_of(drifts, [1, 1, 1]), rel=1e-9)
    assert found.kl is None and found.perplexity is None
    assert (found.tokens, found.blocks) == (28, 3)


def test_sentence_embeddings_and_dicts_of_features() -> None:
    class Sentences(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 4)

        def forward(self, features: dict) -> dict:
            return {"sentence_embedding": self.inner(features["x"]).mean(1)}

    torch.manual_seed(0)
    one, other = Sentences(), Sentences()
    features = {"x": torch.randn(3, 2, 6), "attention_mask": torch.tensor([[1, 1], [1, 0], [1, 1]])}
    found = divergence(one, other, [(features,)])
    pairs = [model(features)["sentence_embedding"].double() for model in (one, other)]
    assert found.drift == pytest.approx(1 - functional.cosine_similarity(*pairs).mean().item())
    assert found.blocks == 3 and found.kl is None
    assert calibrate(one, [(features,)])["inner"].count == 5


def test_a_masked_model_and_a_classifier_have_a_divergence_and_no_perplexity() -> None:
    found = divergence(rough("bert"), random_model("bert"), ids(2))
    assert found.kl > 0 and found.perplexity is None and found.tokens == 24
    torch.manual_seed(0)
    classifier, inputs = nn.Linear(6, 3), torch.randn(5, 6)
    other = nn.Linear(6, 3)
    found = divergence(classifier, other, [inputs[:2], inputs[2:]])
    p, q = other(inputs).log_softmax(-1), classifier(inputs).log_softmax(-1)
    assert found.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-5)
    assert found.blocks == found.tokens == 5
    seq2seq = {"input_ids": ids(2, 6), "decoder_input_ids": ids(2, 4)}
    found = divergence(rough("t5"), random_model("t5"), [seq2seq])
    assert found.kl > 0 and found.perplexity is None and found.tokens == 8


def test_a_model_is_no_distance_from_itself_and_left_as_it_was() -> None:
    model = random_model("llama").train()
    told = []
    found = divergence(model, model, ids(2), progress=lambda *pair: told.append(pair))
    assert found.kl == 0 and found.top1 == 1 and found.kl_error == 0
    assert found.perplexity == found.reference_perplexity
    assert model.training and torch.is_grad_enabled() and told == [(1, 2), (2, 2)]
    assert math.isnan(divergence(model, model, ids(1)).kl_error)


def test_chances_of_zero_are_no_nan() -> None:
    class Says(nn.Module):
        def __init__(self, *logits: float) -> None:
            super().__init__()
            self.logits = torch.tensor([logits])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.logits

    one, none = Says(0, 0, -math.inf), Says(0, -math.inf, 0)
    assert divergence(one, one, [torch.ones(1)]).kl == 0
    assert divergence(one, none, [torch.ones(1)]).kl == math.inf


def test_a_recorded_reference_can_stand_for_the_model() -> None:
    model, reference, given = rough("llama"), random_model("llama"), ids(2)
    with torch.no_grad():
        recorded = iter([reference(row[None]) for row in given])
    replayed = divergence(model, lambda **batch: next(recorded), given)
    assert replayed.kl == divergence(model, reference, given).kl
    assert replayed.perplexity is not None


def test_what_cannot_be_is_refused() -> None:
    bert, llama, given = random_model("bert"), random_model("llama"), ids(1)
    with pytest.raises(ValueError, match=r"BertForMaskedLM gives \(1, 12, 264\).* no causal"):
        perplexity(bert, given)
    with pytest.raises(ValueError, match="no token to foresee"):
        perplexity(llama, given[:, :1])
    with pytest.raises(ValueError, match="nothing to compare"):
        divergence(llama, llama, [])
    with pytest.raises(ValueError, match=r"model gives \(1, 3\) and the reference \(1, 2\)"):
        divergence(nn.Linear(2, 3), nn.Linear(2, 2), [torch.ones(1, 2)])
    with pytest.raises(ValueError, match="window is 1; expected 2 tokens or more"):
        perplexity(llama, given, window=1)
    with pytest.raises(TypeError, match="no logits, no last_hidden_state and is no tensor"):
        divergence(Nothing(), Nothing(), [torch.ones(1, 2)])
    with pytest.raises(TypeError, match="expected an iterable of what the model is called with"):
        perplexity(llama, "a text")


class Nothing(nn.Module):
    def forward(self, x: torch.Tensor) -> None:
        return None
