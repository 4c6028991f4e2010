"""What may stand after --model, and what is said when it cannot be had."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from quantization.demo import model_sources
from quantization.demo.model_download import cached
from quantization.demo.model_sources import ModelError, load_model
from quantization.ops import extras
from tests import tiny_models
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory) -> Path:
    return tiny_models.save_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory) -> Path:
    return tiny_models.save_bert(tmp_path_factory.mktemp("tiny-bert"))


def test_nothing_gives_the_embedded_model() -> None:
    loaded = load_model()
    assert (loaded.kind, loaded.tokenizer, loaded.exclude) == ("characters", None, ["head"])
    assert not loaded.model.training
    assert next(load_model(dtype=torch.bfloat16).model.parameters()).dtype == torch.bfloat16


def test_folder_of_a_language_model(llama_folder: Path) -> None:
    loaded = load_model(str(llama_folder))
    assert (loaded.kind, loaded.exclude) == ("causal", ["lm_head"])
    assert loaded.model.dtype == torch.float32 and not loaded.model.training
    assert loaded.tokenizer("and the lord")["input_ids"]
    assert load_model(str(llama_folder), torch.bfloat16).model.dtype == torch.bfloat16


def test_folder_of_an_encoder(bert_folder: Path) -> None:
    loaded = load_model(str(bert_folder))
    assert (loaded.kind, loaded.exclude) == ("sentences", [])


def test_gguf_file(tmp_path: Path) -> None:
    for module in ("transformers", "accelerate"):
        pytest.importorskip(module)
    loaded = load_model(str(tiny_models.save_gguf(tmp_path / "tiny.gguf")))
    assert loaded.kind == "causal" and loaded.exclude == ["lm_head"]
    weight = loaded.model.get_submodule("model.layers.0.mlp.up_proj").weight
    assert weight.shape == (96, 64) and weight.abs().max() > 0


@pytest.mark.parametrize("name", ["./absent", "/absent", "absent.gguf", "not a name", "~/absent"])
def test_path_that_is_not_there(name: str) -> None:
    with pytest.raises(ModelError, match=r"there is no file or folder .*smollm2, minilm"):
        load_model(name)


def test_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def refuse(folder, *_):
        raise ModelError(f"transformers cannot load {folder}: offline")

    monkeypatch.setattr(model_sources, "_from_folder", refuse)
    with pytest.raises(ModelError, match="'smolm2' is no file or folder here, none of smollm2"):
        load_model("smolm2")


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json: it is not a transformers folder"):
        load_model(str(tmp_path))


def test_folder_with_a_broken_config(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text("{ not json")
    with pytest.raises(ModelError, match="transformers cannot load"):
        load_model(str(tmp_path))


def test_encoder_decoder_is_told(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"is_encoder_decoder": True}))
    with pytest.raises(ModelError, match="T5ForConditionalGeneration, an encoder-decoder"):
        load_model(str(tmp_path))


def test_file_that_is_not_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(ModelError, match=r"not a GGUF file \(it starts with b'PK"):
        load_model(str(path))


def test_gguf_that_is_cut_off(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "short.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(ModelError, match="cannot load"):
        load_model(str(path))


@pytest.mark.parametrize("name", ["smollm2", "minilm"])
def test_missing_extra_is_told_before_the_download(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(module: str):
        raise ImportError(f"No module named {module!r}")

    monkeypatch.setattr(extras, "import_module", refuse)
    monkeypatch.setattr(model_sources, "fetch", None)
    with pytest.raises(ModelError, match=r'needs transformers: pip install "qwqa\[demo\]"'):
        load_model(name)


@pytest.mark.parametrize("name", ["smollm2", "minilm"])
def test_real_models_where_they_are_at_hand(name: str) -> None:
    pytest.importorskip("transformers")
    if not cached(name).is_dir() and not os.environ.get("QUANTIZATION_TEST_MODELS"):
        pytest.skip(f"{name} is not in the cache; QUANTIZATION_TEST_MODELS=1 downloads it")
    loaded = load_model(name)
    assert loaded.kind == {"smollm2": "causal", "minilm": "sentences"}[name]
    linears = [m for m in loaded.model.modules() if type(m) is torch.nn.Linear]
    assert len(linears) == {"smollm2": 211, "minilm": 37}[name]
