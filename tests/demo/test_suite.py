"""The end-to-end suite: its checks, its exit code, what it says to a wrong call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import quantization
from quantization.demo import suite as suite
from quantization.demo.model_download import cached
from tests import tiny_models
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["--tokens", "800", "--length", "5"]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "quantization", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_bare_command_holds_to_its_end() -> None:
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("[1] machine", "is active", "bits a character: ", "W8A16", "| And God said"):
        assert words in done.stdout
    assert "FAILED" not in done.stdout
    assert "24,960 of 200,000 bytes are read" in done.stdout


@pytest.mark.parametrize(
    "isa", [pytest.param(isa, marks=pytest.mark.deep) for isa in quantization.isas()]
)
def test_every_instruction_set_passes(isa: str) -> None:
    done = run("--json", *SHORT, QUANTIZATION_ISA=isa)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["machine"]["active_isa"] == isa
    assert len(figures["checks"]) > 10 and all(check["passed"] for check in figures["checks"])
    assert figures["memory"]["w8a16"] <= 0.27 * figures["memory"]["float32"]


def test_module_main_is_the_same_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "quantization.main", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "--model" in done.stdout and "smollm2" in done.stdout


def test_embedded_model_needs_torch_and_numpy_alone() -> None:
    program = (
        "import sys\n"
        "for name in ('transformers', 'gguf', 'tokenizers', 'safetensors', 'tqdm'):\n"
        "    sys.modules[name] = None\n"
        "from quantization.main import main\n"
        f"sys.exit(main({SHORT}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_bfloat16_and_exclude(capsys: pytest.CaptureFixture) -> None:
    exclude = ["--exclude", "blocks.0.*", "--exclude", "down"]
    assert suite.main(["--json", "--dtype", "bfloat16", *exclude, *SHORT]) == 0
    figures = json.loads(capsys.readouterr().out)
    layers = 3 * 3  # blocks 1 to 3, without their down layer
    counted = next(c for c in figures["checks"] if c["name"].startswith("layers were replaced"))
    assert counted["passed"] and figures["replaced"] == layers


def test_failed_check_is_named_and_decides_the_exit_code(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "MEMORY_BOUND", 0.1)
    assert suite.main(SHORT) == 1
    assert "FAILED: memory of the replaced layers" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/no/such"], "there is no file or folder '/no/such'"),
        (["--text", "/no/such.txt"], "cannot read the text /no/such.txt"),
        (["--text", os.devnull], "the text gives 0 tokens; at least 193"),
        (["--text", sys.executable], "cannot read the text"),
        (["--tokens", "7"], "the text gives 7 tokens; at least 193"),
        ([*SHORT, "--exclude", "blokcs"], "blocks"),
    ],
)
def test_wrong_call_is_told(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert suite.main(arguments) == 2
    error = capsys.readouterr().err
    assert "error: " in error and message in error and "Traceback" not in error


@pytest.mark.parametrize(
    "arguments", [["--tokens", "0"], ["--threads", "-1"], ["--dtype", "int8"], ["--nonsense"]]
)
def test_wrong_argument_is_told(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        suite.main(arguments)
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_threads_are_set(capsys: pytest.CaptureFixture) -> None:
    before = torch.get_num_threads()
    try:
        assert suite.main(["--json", "--threads", "1", *SHORT]) == 0
        assert json.loads(capsys.readouterr().out)["machine"]["threads"] == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("save", [tiny_models.save_llama, tiny_models.save_bert])
def test_folder_of_transformers(save, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(tiny_models.WORDS) for _ in range(20)))
    folder = str(save(tmp_path / "model"))
    arguments = ["--model", folder, "--text", str(text), "--length", "4", "--prompt", "and the"]
    code = suite.main(["--json", *arguments])
    captured = capsys.readouterr()
    figures = json.loads(captured.out)
    failed = [check["name"] for check in figures["checks"] if not check["passed"]]
    assert failed == [] and code == 0, captured.err


@pytest.mark.parametrize("name", ["smollm2", "minilm"])
def test_real_models_where_they_are_at_hand(name: str, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("transformers")
    if not cached(name).is_dir() and not os.environ.get("QUANTIZATION_TEST_MODELS"):
        pytest.skip(f"{name} is not in the cache; QUANTIZATION_TEST_MODELS=1 downloads it")
    assert suite.main(["--json", "--model", name, "--quick"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["replaced"] == {"smollm2": 210, "minilm": 37}[name]
