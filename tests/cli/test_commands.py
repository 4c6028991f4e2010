"""The command line: every command, its exit codes, its JSON, and what it prints."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from torch import nn

from quantization import load_quantized, quantize_checkpoint, quantize_model, save_quantized
from quantization.cli import COMMANDS, main
from tests.checkpoint_models import files_of, float_folder, quantized_net
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


def result(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    assert main([*map(str, arguments), "--json"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1, "one object and nothing else"
    return json.loads(printed)


def failed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([*map(str, arguments)]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and "Traceback" not in printed.err
    return printed.err


def test_quantize_plan_and_inspect(tmp_path: Path, capsys) -> None:
    source = float_folder(tmp_path / "float")
    rules = ["--rule", "re:embed=w8", "--rule", "up_proj=none", "--scheme", "w4g32a"]
    plan = result(capsys, "plan", source, *rules)
    dry = result(capsys, "quantize", source, tmp_path / "new", *rules, "--dry-run")
    assert (
        plan == dry
        and dry.pop("parameters")
        and plan.pop("parameters")
        and not (tmp_path / "new").exists()
    )
    done = result(capsys, "quantize", source, tmp_path / "new", *rules)
    assert {key: done[key] for key in plan if key != "dropped"} == {
        key: plan[key] for key in plan if key != "dropped"
    }
    statuses = {layer["name"]: (layer["status"], layer["scheme"]) for layer in done["layers"]}
    assert statuses["model.embed_tokens"] == ("replaced", "w8")
    assert statuses["model.layers.0.q_proj"] == ("replaced", "w4g32a")
    assert statuses["model.layers.0.up_proj"] == ("excluded", "")
    quantize_checkpoint(
        source, tmp_path / "direct", {"re:embed": "w8", "up_proj": None, "*": "w4g32a"}
    )
    assert files_of(tmp_path / "new") == files_of(tmp_path / "direct")
    seen = result(capsys, "inspect", tmp_path / "new")
    assert seen["layers"]["model.layers.1.q_proj"]["scheme"] == "w4g32a"
    assert len(seen["layers"]) == 5 and "model.layers.0.up_proj.weight" in seen["tensors"]
    layer = result(capsys, "inspect", tmp_path / "new", "--layer", "model.layers.1.q_proj")
    assert layer["tensors"]["packed_weights"] == {"dtype": "uint8", "shape": [96, 48]}
    assert result(capsys, "inspect", source)["tensors"].keys() == {
        key for i in range(4) for key in (
            f"model.layers.{i}.q_proj.weight", f"model.layers.{i}.q_proj.bias",
            f"model.layers.{i}.up_proj.weight", f"model.layers.{i}.norm.weight",
        )
    } | {"model.embed_tokens.weight"}  # fmt: skip


def test_tables_for_readers(tmp_path: Path, capsys) -> None:
    source = float_folder(tmp_path / "float")
    assert main(["quantize", str(source), str(tmp_path / "new"), "--scheme", "nf4"]) == 0
    text = capsys.readouterr().out
    assert "8 of 8 layers replaced" in text and "nf4g64" in text and "written: " in text
    assert main(["inspect", str(tmp_path / "new")]) == 0
    text = capsys.readouterr().out
    assert "8 quantized layers of" in text and "model.layers.3.up_proj" in text
    assert main(["inspect", str(tmp_path / "new"), "--layer", "model.layers.3.up_proj"]) == 0
    assert "first numbers of row 0: " in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "new")]) == 0
    assert "all as they were written" in capsys.readouterr().out
    assert main(["inspect", str(source)]) == 0
    assert "17 tensors of" in capsys.readouterr().out


def test_export_and_import(tmp_path: Path, capsys) -> None:
    source = float_folder(tmp_path / "float")
    quantize_checkpoint(source, tmp_path / "small", {"up_proj": "w4g32", "*": None})
    there = ["export", tmp_path / "small", tmp_path / "foreign", "--format", "compressed-tensors"]
    assert result(capsys, *there, "--dry-run") == {"layers": 4, "tensors": 13}
    assert not (tmp_path / "foreign").exists()
    assert result(capsys, *there) == {"layers": 4, "tensors": 13}
    back = ["import", tmp_path / "foreign", tmp_path / "again", "--format", "compressed-tensors"]
    assert result(capsys, *back) == {"layers": 4, "tensors": 13}
    again = result(capsys, "inspect", tmp_path / "again")["layers"]
    assert {layer["scheme"] for layer in again.values()} == {"w4g32"}
    assert "is there" in failed(capsys, *there)
    assert "none of the formats that can be written" in failed(capsys, *there[:-1], "gptq")
    assert "has no option --plain" in failed(capsys, *there, "--plain")


def test_gguf_brings_its_tokenizer(tmp_path: Path, capsys) -> None:
    transformers = pytest.importorskip("transformers")
    from tests.tiny_models import save_gguf

    save_gguf(tmp_path / "tiny.gguf")
    call = ["import", tmp_path / "tiny.gguf", tmp_path / "tiny", "--format", "gguf"]
    assert result(capsys, *call)["tensors"] > 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tiny")
    assert tokenizer.convert_ids_to_tokens([3, 5]) == ["a", "ab"]
    model = load_quantized(tmp_path / "tiny")
    assert model(torch.tensor([[3, 5]])).logits.shape == (1, 2, 300)


def test_bench(tmp_path: Path, capsys) -> None:
    save_quantized(quantized_net("w4g32a"), tmp_path / "saved")
    threads = torch.get_num_threads()
    rows = result(capsys, "bench", tmp_path / "saved", "--tokens", "1,4", "--threads", "1")["rows"]
    assert [(row["tokens"], row["shape"], row["layers"]) for row in rows] == [
        (1, [96, 96], 3), (4, [96, 96], 3),
    ]  # fmt: skip
    assert all(row["ms"] > 0 and row["linear_ms"] > 0 and row["kernel"] for row in rows)
    assert torch.get_num_threads() == threads


def test_what_cannot_be_done_exits_with_1(tmp_path: Path, capsys) -> None:
    source = float_folder(tmp_path / "float")
    new = tmp_path / "new"
    assert "say what to make" in failed(capsys, "plan", source)
    assert "a rule is PATTERN=NAME, not 'x'" in failed(capsys, "plan", source, "--rule", "x")
    assert "names no scheme" in failed(capsys, "quantize", source, new, "--scheme", "four")
    assert "matches no module" in failed(capsys, "plan", source, "--scheme", "w4", "--exclude", "z")
    assert "neither a folder" in failed(capsys, "plan", tmp_path / "none", "--scheme", "w4")
    assert "without quantization.json" in failed(capsys, "verify", source)
    save_quantized(nn.Linear(4, 4), tmp_path / "saved")
    assert "no layer 'x'" in failed(capsys, "inspect", tmp_path / "saved", "--layer", "x")
    raw = bytearray((tmp_path / "saved/model.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "saved/model.safetensors").write_bytes(raw)
    assert "has other bytes than were written" in failed(capsys, "verify", tmp_path / "saved")
    assert "new" not in {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    "arguments",
    [["quantise"], ["quantize"], ["plan", "x", "--workers", "2"], ["bench", "x", "--tokens", "0"]],
)
def test_wrong_calls_exit_with_2(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: " in capsys.readouterr().err


def test_help_names_every_command(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)


def test_the_suite_has_its_own_help(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["suite", "--help"])
    assert caught.value.code == 0 and "--quick" in capsys.readouterr().out


def test_as_a_process(tmp_path: Path) -> None:
    source = float_folder(tmp_path / "float")
    command = [sys.executable, "-m", "quantization", "quantize", str(source), str(tmp_path / "new")]
    run = subprocess.run(
        [*command, "--scheme", "w4", "--json"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0 and json.loads(run.stdout)["coverage"] > 0.9, run.stderr
    load_quantized(tmp_path / "new", _skeleton(source))
    run = subprocess.run([*command, "--scheme", "w4"], capture_output=True, text=True, check=False)
    assert run.returncode == 1 and "; --overwrite replaces it" in run.stderr


def _skeleton(source: Path) -> nn.Module:
    from quantization.checkpoint.disk.safetensors_files import TensorFolder
    from quantization.checkpoint.source.skeleton import skeleton_of_names

    files = TensorFolder(source)
    return skeleton_of_names(
        {k: (files.entry(k).dtype, files.entry(k).shape) for k in files.file_of}
    )


def test_on_a_terminal_there_are_tables_and_a_bar(tmp_path: Path) -> None:
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    pytest.importorskip("tqdm")
    source = float_folder(tmp_path / "float")
    leader, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    command = [sys.executable, "-m", "quantization", "quantize", str(source), str(tmp_path / "new")]
    run = subprocess.Popen([*command, "--scheme", "w4"], stdout=follower, stderr=follower)
    os.close(follower)
    text = b""
    while True:
        try:
            block = os.read(leader, 4096)
        except OSError:
            break
        if not block:
            break
        text += block
    assert run.wait() == 0
    assert b"quantize: 100%" in text and b"up_proj" in text


def test_json_has_no_nan(tmp_path: Path, capsys) -> None:
    model = nn.Sequential(nn.Linear(8, 0, bias=False))
    quantize_model(model, "w4")
    save_quantized(model, tmp_path / "new")
    assert main(["inspect", str(tmp_path / "new"), "--json"]) == 0
    text = capsys.readouterr().out
    seen = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert seen["layers"]["0"]["bits_per_weight"] is None


def test_one_pattern_has_one_scheme(tmp_path: Path, capsys) -> None:
    source = float_folder(tmp_path / "float")
    for rules in (["--rule", "*=w8", "--scheme", "w4"], ["--rule", "a=w8", "--rule", "a=w4"]):
        assert "two schemes are given for the pattern" in failed(capsys, "plan", source, *rules)
    assert "--layer is of a quantized folder" in failed(
        capsys, "inspect", source, "--layer", "model.layers.0.q_proj"
    )


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    save_quantized(quantized_net("w4"), tmp_path / "new")
    script = (
        "import os, sys; read, write = os.pipe(); os.close(read); os.dup2(write, 1)\n"
        "from quantization.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, "inspect", str(tmp_path / "new")]
    run = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert (run.returncode, run.stderr) == (141, "")


def test_a_worker_that_dies_is_an_error_in_words(capsys, monkeypatch) -> None:
    def die(*arguments: object) -> int:
        raise RuntimeError("a worker died")

    monkeypatch.setattr("quantization.cli.commands.run", die)
    assert failed(capsys, "verify", "x") == "error: a worker died\n"
