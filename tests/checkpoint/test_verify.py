"""Verifying a folder: every file that was written is under a hash, and what is not is named."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn

from quantization import load_quantized, quantize_checkpoint, quantize_model, save_quantized
from quantization.checkpoint import CheckpointError, read_checkpoint, verify_checkpoint
from quantization.checkpoint.format import sealed
from tests.checkpoint_models import float_folder, quantized_net
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

OLD = Path(__file__).parents[1] / "golden/folder_of_first_version"
TOKENIZER = "tokenizer.json"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Of two files of tensors, with an index and an asset; a warning is an error."""
    source = float_folder(tmp_path / "float", shards=2)
    (source / TOKENIZER).write_text('{"words": ["a", "b"]}')
    quantize_checkpoint(source, tmp_path / "small", "w4g32a", max_shard_bytes=20_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert verify_checkpoint(tmp_path / "small") > 10_000
        yield tmp_path / "small"


def document_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "quantization.json").read_text())


def test_every_file_that_is_written_is_recorded(folder: Path) -> None:
    document = document_of(folder)
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors.index.json", TOKENIZER} == set(document["other_files"])
    assert names == {*document["files"], *document["other_files"], "quantization.json"}
    assert document == sealed(document)


def test_any_byte_of_any_file_that_changes_is_found(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        for place in (0, len(good) // 2, len(good) - 2):
            bad = bytearray(good)
            bad[place] ^= 1
            path.write_bytes(bad)
            with pytest.raises(CheckpointError, match=path.name.replace(".", r"\.")):
                verify_checkpoint(folder)
            with pytest.raises(CheckpointError):
                read_checkpoint(folder, verify=True)
        path.write_bytes(good)
    verify_checkpoint(folder)


def test_a_file_that_is_gone_is_named(folder: Path) -> None:
    (folder / TOKENIZER).unlink()
    with pytest.raises(CheckpointError, match=r"lacks tokenizer\.json, which was written with it"):
        verify_checkpoint(folder)


@pytest.mark.parametrize("name", ["../float/tokenizer.json", "a/../../x", "/etc/passwd", ""])
def test_records_of_other_places_are_not_followed(name: str, folder: Path) -> None:
    document = document_of(folder)
    document["other_files"][name] = document["other_files"][TOKENIZER]
    (folder / "quantization.json").write_text(json.dumps(sealed(document)))
    with pytest.raises(CheckpointError, match="names of other places are not followed"):
        verify_checkpoint(folder)


def test_a_file_that_came_later_is_named_and_the_folder_is_good(folder: Path) -> None:
    (folder / "README.md").write_text("a model")
    (folder / ".git").mkdir()
    (folder / ".git/config").write_text("hidden folders are no part of a model")
    with pytest.warns(UserWarning, match=r"has no hash to check of: README\.md\. Where"):
        assert verify_checkpoint(folder) > 10_000


def test_an_edited_layer_is_found_when_the_folder_is_loaded(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(6, 32, padding_idx=1))
    quantize_model(model, {"0": "w4g16a"})
    save_quantized(model, tmp_path / "saved")
    path = tmp_path / "saved/quantization.json"
    path.write_text(path.read_text().replace('"padding_idx": 1', '"padding_idx": 2'))
    for read in (verify_checkpoint, read_checkpoint, lambda place: load_quantized(place, model)):
        with pytest.raises(CheckpointError, match="was changed after it was written"):
            read(tmp_path / "saved")


def test_another_layout_of_the_same_document_is_good(tmp_path: Path) -> None:
    """The hash is of what is said, not of blanks and the order of keys."""
    save_quantized(quantized_net("w4g32a"), tmp_path / "saved")
    document = document_of(tmp_path / "saved")
    text = json.dumps(dict(reversed(document.items())), indent=4, ensure_ascii=False)
    (tmp_path / "saved/quantization.json").write_text(text)
    verify_checkpoint(tmp_path / "saved")


# ---- folders of before -----------------------------------------------------------------------


def test_a_folder_of_the_first_version_is_read_and_its_gaps_are_named(tmp_path: Path) -> None:
    shutil.copytree(OLD, tmp_path / "old")
    (tmp_path / "old/tokenizer.json").write_text("{}")
    model = nn.Sequential(nn.Embedding(6, 32, padding_idx=1), nn.Linear(32, 8))
    load_quantized(tmp_path / "old", model)
    assert model[0].padding_idx == 1 and model[1].weight.isfinite().all()
    match = r"no hash to check of: quantization\.json, tokenizer\.json\."
    with pytest.warns(UserWarning, match=match):
        assert verify_checkpoint(tmp_path / "old") > 300
    path = tmp_path / "old/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="has other bytes than were written"):
        verify_checkpoint(tmp_path / "old")


def test_a_folder_of_before_becomes_one_of_now_by_saving_it(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(6, 32, padding_idx=1), nn.Linear(32, 8))
    save_quantized(load_quantized(OLD, model), tmp_path / "new")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        verify_checkpoint(tmp_path / "new")
    assert document_of(tmp_path / "new")["tensors"] == document_of(OLD)["tensors"]


# ---- transformers ----------------------------------------------------------------------------


def test_a_config_that_transformers_wrote_anew_is_named_and_still_loads(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=16,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    quantize_model(model, "w4g16a")
    save_quantized(model, tmp_path / "saved")
    names = {"config.json", "generation_config.json"}
    assert names == set(document_of(tmp_path / "saved")["other_files"])
    assert verify_checkpoint(tmp_path / "saved") > 300
    again = transformers.AutoConfig.from_pretrained(tmp_path / "saved")
    again.bos_token_id = 7
    again.save_pretrained(tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"config\.json has other bytes than were written"):
        verify_checkpoint(tmp_path / "saved")
    tokens = torch.tensor([[1, 2, 3]])
    wanted = model(tokens).logits
    torch.testing.assert_close(load_quantized(tmp_path / "saved")(tokens).logits, wanted)
