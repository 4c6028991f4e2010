"""The embedded model: what ships, and that it knows its book."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from quantization.demo import char_model
from quantization.demo.char_model import CharModel, bits_per_character, continue_text, load, save
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


@pytest.fixture(scope="module")
def model() -> CharModel:
    return load()


@pytest.fixture(scope="module")
def text() -> str:
    return char_model.HELD_OUT_TEXT.read_text(encoding="utf-8")


def test_files_are_small_and_plain() -> None:
    assert char_model.WEIGHTS.stat().st_size <= 3_000_000
    assert char_model.HELD_OUT_TEXT.stat().st_size == 200_000
    with np.load(char_model.WEIGHTS, allow_pickle=False) as archive:
        types = {archive[name].dtype for name in archive.files if "." in name}
    assert types == {np.dtype(np.float16)}


def test_it_has_learned_something(model: CharModel, text: str) -> None:
    bits = bits_per_character(model, text[:20_000])
    assert 1 < bits < 1.8 < math.log2(len(model.vocabulary))


def test_it_does_not_see_the_future(model: CharModel, text: str) -> None:
    ids = model.encode(text[:64])[None]
    changed = ids.clone()
    changed[0, 40:] = 5
    with torch.inference_mode():
        before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :40], after[:, :40])
    assert not torch.allclose(before[:, 40:], after[:, 40:])


def test_bits_are_those_of_the_definition(model: CharModel, text: str) -> None:
    part = text[: 2 * model.context + 1]
    ids = model.encode(part)
    total = 0.0
    with torch.inference_mode():
        for start in (0, model.context):
            logits = model(ids[None, start : start + model.context])[0].double()
            expected = ids[start + 1 : start + model.context + 1]
            total -= logits.log_softmax(-1)[torch.arange(len(expected)), expected].sum().item()
    assert bits_per_character(model, part) == pytest.approx(
        total / (2 * model.context) / math.log(2), rel=1e-5
    )


def test_continuation_is_reproducible(model: CharModel) -> None:
    first = continue_text(model, "And God said", 40)
    assert first == continue_text(model, "And God said", 40) and len(first) == 40
    assert first != continue_text(model, "And God said", 40, seed=1)
    assert continue_text(model, "And", 0) == ""


def test_text_goes_there_and_back(model: CharModel) -> None:
    assert model.decode(model.encode("In the beginning")) == "In the beginning"
    assert model.decode(model.encode("caf\u00e9")) == "caf "


def test_save_and_load(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = CharModel("ab ", width=8, layers=1, heads=2, context=16)
    save(small, tmp_path / "small.npz")
    again = load(tmp_path / "small.npz")
    assert (again.vocabulary, again.width, again.context) == ("ab ", 8, 16)
    for name, value in small.state_dict().items():
        assert torch.equal(again.state_dict()[name], value.half().float())


def test_text_that_is_too_short(model: CharModel) -> None:
    with pytest.raises(ValueError, match="the text has 5 characters; give at least 193"):
        bits_per_character(model, "short")
