"""Reports and checks on the command line; messages that help: flags, near names, no tracebacks."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from quantization import quantize_checkpoint
from quantization.cli import COMMANDS, main
from quantization.version import VERSION
from tests.checkpoint_models import float_folder
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("reports")
    source = float_folder(place / "float")
    quantize_checkpoint(source, place / "small", {"q_proj": "w4g32a:lsq", "*": "w8"})
    return source, place / "small"


def printed(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    assert main([*map(str, arguments)]) == code
    return capsys.readouterr().out


def test_a_report_in_every_form(folders: tuple[Path, Path], capsys) -> None:
    source, small = folders
    text = printed(capsys, "report", small, "--reference", source, "--sort", "sqnr")
    assert text.index("q_proj") < text.index("up_proj") and "lsq" in text and "SQNR dB" in text
    assert max(map(len, text.splitlines())) <= 80
    rows = json.loads(printed(capsys, "report", small, "--json"))["layers"]
    assert len(rows) == 8 and rows[0]["sqnr"] is None and sum(rows[0]["codes"]) > 0
    assert printed(capsys, "report", small, "--markdown").startswith("| layer | scheme |")
    html = printed(capsys, "report", small, "--html")
    HTMLParser().feed(html)
    assert "<svg" in html and "<table>" in html


def test_a_plan_tells_what_to_expect(folders: tuple[Path, Path], capsys) -> None:
    rows = json.loads(printed(capsys, "plan", folders[0], "--scheme", "w4g32", "--json"))
    found = {row["called"]: row for row in rows["parameters"]}
    row = found["model.layers.1.up_proj.weight"]
    assert (
        row["sqnr"] > 15 and row["kernel"] and row["nonfinite"] == 0 and row["what"] == "quantize"
    )
    assert "<svg" in printed(capsys, "plan", folders[0], "--scheme", "w4g32", "--html")


def test_verify_looks_into_codes_and_kernels(folders: tuple[Path, Path], capsys) -> None:
    source, small = folders
    text = printed(capsys, "verify", small, "--reference", source, "--self-test")
    assert "all as they were written" in text and "self test: 8 layers, all is well" in text
    other = float_folder(small.parent / "other")
    for file in other.glob("*.safetensors"):  # the same names, other numbers
        from safetensors.torch import load_file, save_file

        save_file({key: -value for key, value in load_file(file).items()}, file)
    found = json.loads(printed(capsys, "verify", small, "--reference", other, "--json", code=1))
    assert not found["ok"] and "more than the signal" in found["verify"][0]["what"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "FLOAT", "--scheme", "int4"], "did you mean 'w4'?"),
        (["plan", "FLOAT", "--scheme", "4bit"], "did you mean 'w4'?"),
        (["plan", "FLOAT", "--scheme", "q4_0"], "did you mean 'w4'?"),
        (["plan", "FLOAT", "--scheme", "uint8g64"], "did you mean 'w8g64a'?"),
        (["plan", "FLOAT", "--scheme", "nf5"], "did you mean 'nf4'?"),
        (["plan", "FLOAT", "--scheme", "w4:gptk"], "did you mean 'gptq'?"),
        (
            ["plan", "FLOAT", "--scheme", "w4", "--rule", "q_prj=w8"],
            "the nearest names are 'q_proj'",
        ),
        (["inspect", "SMALL", "--layer", "model.layers.0.q_prj"], "did you mean"),
        (["report", "SMALL", "--sort", "sqrn"], "did you mean 'sqnr'?"),
        (["report", "FLOAT"], "quantization.json"),
        (["quantize", "FLOAT", "SMALL", "--scheme", "w4"], "; --overwrite replaces it"),
        (["quantize", "GGUF", "NEW", "--scheme", "w4"], "quantization import"),
        (["plan", "GGUF", "--scheme", "w4"], "--format gguf"),
    ],
)
def test_mistakes_are_told_in_words(
    folders: tuple[Path, Path], tmp_path: Path, capsys, arguments: list[str], said: str
) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    places = {"FLOAT": folders[0], "SMALL": folders[1], "GGUF": tmp_path / "model.gguf"}
    places["NEW"] = tmp_path / "new"
    assert main([str(places.get(word, word)) for word in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and "Traceback" not in error
    assert "=True" not in error


def test_version_and_commands(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed(capsys, "--version") == f"quantization {VERSION}\n"
    with pytest.raises(SystemExit) as caught:
        main(["quantise"])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and "did you mean 'quantize'?" in error and "report" in COMMANDS

    def fail(*arguments: object) -> int:
        raise KeyError("shape")

    monkeypatch.setattr("quantization.cli.commands.run", fail)
    assert main(["verify", "x"]) == 1
    assert capsys.readouterr().err == "error: KeyError: 'shape'\n"
