"""What comes along with a checkpoint that is quantized: all that is not weights, or it is named."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import save_file

from quantization import quantize_checkpoint
from quantization.checkpoint import read_checkpoint, verify_checkpoint, write_checkpoint
from quantization.checkpoint.source.companions import inner_files
from tests.checkpoint_models import float_folder
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder as sentence-transformers writes it."""
    folder = float_folder(tmp_path / "float")
    modules = [{"idx": i, "path": path} for i, path in enumerate(("", "1_Pooling", "2_Dense"))]
    put(folder / "modules.json", json.dumps(modules))
    put(folder / "config_sentence_transformers.json")
    put(folder / "1_Pooling/config.json", '{"word_embedding_dimension": 64}')
    put(folder / "2_Dense/config.json")
    save_file({"linear.weight": torch.eye(4)}, folder / "2_Dense/model.safetensors")
    put(folder / "2_Dense/deep/er/words.txt")
    (folder / "3_Normalize").mkdir()
    return folder


@pytest.fixture(autouse=True)
def warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def put(path: Path, text: str = "{}") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def tree(folder: Path) -> dict[str, bytes]:
    """The bytes of every file, by its name below the folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_sub_folders_come_along_with_their_weights(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "small", "w4g32")
    wanted, got = tree(source), tree(tmp_path / "small")
    assert wanted.keys() == got.keys() - {"quantization.json"}
    assert all(got[name] == wanted[name] for name in wanted if name != "model.safetensors")
    assert verify_checkpoint(tmp_path / "small") > 1000
    again = tmp_path / "again"
    write_checkpoint(read_checkpoint(tmp_path / "small"), again)
    assert tree(again) == got


def test_a_sub_folder_that_changes_is_found_when_verifying(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "small", "w4g32")
    put(tmp_path / "small/1_Pooling/config.json", "{ }")
    with pytest.raises(ValueError, match=r"1_Pooling/config\.json has other bytes"):
        verify_checkpoint(tmp_path / "small")
    (tmp_path / "small/1_Pooling/config.json").unlink()
    assert "1_Pooling/config.json" not in read_checkpoint(tmp_path / "small").inner
    with pytest.raises(ValueError, match=r"lacks 1_Pooling/config\.json"):
        verify_checkpoint(tmp_path / "small")


def test_models_of_their_own_are_left_and_named(source: Path, tmp_path: Path) -> None:
    put(source / "checkpoint-500/optimizer.pt")
    put(source / "checkpoint-500/config.json")
    put(source / "onnx/model.onnx")
    put(source / "earlier/quantization.json")
    put(source / ".cache/huggingface/x.lock")
    with pytest.warns(UserWarning, match="checkpoint-500/, earlier/, onnx/") as caught:
        quantize_checkpoint(source, tmp_path / "small", "w4g32")
    assert "3 files or folders in sub-folders of the source are left out" in str(caught[0].message)
    names = {name.partition("/")[0] for name in tree(tmp_path / "small")}
    assert names.isdisjoint({"checkpoint-500", "onnx", "earlier", ".cache"})


@pytest.mark.parametrize("modules", ["{", "3", '[{"path": "."}, {"path": 3}, {}, 1]', "[[]]"])
def test_modules_that_are_none_bring_no_weights(modules: str, source: Path) -> None:
    put(source / "modules.json", modules)
    kept, left = inner_files(source)
    assert list(kept) == ["1_Pooling/config.json"] and left == ("2_Dense/",)


def test_links_that_lead_out_are_left_and_named(source: Path, tmp_path: Path) -> None:
    put(tmp_path / "elsewhere/secret.txt", "secret")
    (source / "1_Pooling/out.txt").symlink_to(tmp_path / "elsewhere/secret.txt")
    (source / "1_Pooling/gone.txt").symlink_to(tmp_path / "nowhere")
    (source / "1_Pooling/in.json").symlink_to(source / "modules.json")
    (source / "away").symlink_to(tmp_path / "elsewhere")
    (source / "circle").symlink_to(source)
    with pytest.warns(UserWarning) as caught:
        quantize_checkpoint(source, tmp_path / "small", "w4g32")
    said = str(caught[0].message)
    assert said.endswith(": away/, circle/, 1_Pooling/gone.txt, 1_Pooling/out.txt")
    assert "secret" not in "".join(str(text) for text in tree(tmp_path / "small").values())
    copied = tmp_path / "small/1_Pooling/in.json"
    assert not copied.is_symlink() and copied.read_bytes() == (source / "modules.json").read_bytes()


def test_links_of_a_hub_cache_are_followed(source: Path, tmp_path: Path) -> None:
    put(tmp_path / "hub/blobs/abc", '{"pooling": true}')
    snapshot = tmp_path / "hub/snapshots/1"
    snapshot.parent.mkdir(parents=True)
    source.rename(snapshot)
    (snapshot / "1_Pooling/config.json").unlink()
    (snapshot / "1_Pooling/config.json").symlink_to("../../../blobs/abc")
    quantize_checkpoint(snapshot, tmp_path / "small", "w4g32")
    assert (tmp_path / "small/1_Pooling/config.json").read_text() == '{"pooling": true}'


def test_a_destination_in_the_source_is_not_copied_into_itself(source: Path) -> None:
    names = []
    for _ in range(2):
        quantize_checkpoint(source, source / "2_Dense/small", "w4g32", overwrite=True)
        names.append(set(tree(source / "2_Dense/small")))
        put(source / "2_Dense/small/notes.txt", "of the destination that is replaced")
    assert names[0] == names[1] and not any("small" in name for name in names[0])
    (source / "out/a").mkdir(parents=True)
    put(source / "out/a/any.txt")
    with pytest.warns(UserWarning, match=r"left out.*: 2_Dense/small/$"):
        quantize_checkpoint(source, source / "out", "w4g32", overwrite=True)
    assert not any(name.startswith("out") for name in tree(source / "out"))
