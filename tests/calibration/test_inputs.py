"""Inputs that are made up: who writes, who is fed with random ids, and the same draw each time."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn

from quantization.calibration import calibrate
from quantization.calibration.inputs import is_causal, made_up, vocabulary_of
from tests.tiny_models import random_model
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


class Mixing(nn.Module):
    """Gives logits of each token that depend on all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 4), nn.Linear(4, 10)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return self.head(x + x.mean(1, keepdim=True))


def steps() -> nn.Module:
    """Says for each token the next one with a great certainty."""
    embed, head = nn.Embedding(10, 10), nn.Linear(10, 10, bias=False)
    embed.weight.data = torch.eye(10)
    head.weight.data = 100 * torch.eye(10).roll(1, 0)
    return nn.Sequential(embed, head)


@pytest.mark.parametrize(
    ("kind", "hessian", "source"),
    [
        ("llama", False, "random token ids, 32 x 128"),
        ("llama", True, "text of its own, 2 x 5"),
        ("gpt2", True, "text of its own"),
        ("mixtral", True, "text of its own"),
        ("bert", True, "random token ids, 512 x 24"),
        ("t5", True, "random token ids, 512 x 24"),
    ],
)
def test_who_is_fed_with_what(kind: str, hessian: bool, source: str) -> None:
    model = random_model(kind)
    tokens = (2, 5) if source.startswith("text") else None
    made = made_up(model, None, tokens, 0, hessian)
    assert made.source.startswith(source)
    assert made.ids.min() >= 0 and made.ids.max() < 264
    assert torch.equal(made.ids, made_up(model, None, tokens, 0, hessian).ids)
    assert not torch.equal(made.ids, made_up(model, None, tokens, 1, hessian).ids)


def test_a_plain_model_writes_what_it_says() -> None:
    model = steps()
    made = made_up(model, None, (3, 6), 0, True)
    assert made.source == "text of its own, 3 x 6, seed 0"
    assert torch.equal(made.ids[:, 1:], (made.ids[:, :-1] + 1) % 10)
    known = calibrate(model, "self", tokens=(3, 6))
    assert known["1"].count == 18 and known.source == made.source


def test_writing_samples_and_leaves_the_generator_of_torch_alone() -> None:
    model, state = random_model("llama"), torch.get_rng_state()
    made = made_up(model, "self", (4, 30), 0, False)
    assert made.ids.shape == (4, 30) and len(made.ids.unique()) > 40
    assert torch.equal(state, torch.get_rng_state())


def test_causality_is_tried() -> None:
    assert is_causal(random_model("llama"), 264) and is_causal(steps(), 10)
    assert not is_causal(random_model("bert"), 264) and not is_causal(Mixing().eval(), 10)
    assert is_causal(random_model("llama").model, 264)  # hidden states tell it too
    assert made_up(random_model("llama").model, None, (1, 2), 0, True).source.startswith("random")
    with pytest.raises(ValueError, match="Mixing is no causal language model"):
        calibrate(Mixing(), "self")


def test_vocabularies() -> None:
    assert vocabulary_of(random_model("t5")) == 264
    assert vocabulary_of(Mixing()) == 10
    assert vocabulary_of(nn.Linear(2, 2)) is None
    model = nn.Linear(2, 2)
    model.main_input_name = "pixel_values"
    with pytest.raises(ValueError, match="pass batches="):
        calibrate(model)


def test_a_model_that_takes_something_else_says_so() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Embedding(4, 3))
    with pytest.raises(RuntimeError) as caught:
        calibrate(model)
    assert "fed with ids below 4 that were made up" in caught.value.__notes__[0]


def test_a_classifier_without_a_pad_token_is_fed_one_by_one() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(vocab_size=30, num_attention_heads=2, **sizes)
    model = transformers.LlamaForSequenceClassification(config).eval()
    assert calibrate(model, tokens=(3, 8))["score"].count == 24
