"""The harness of accuracy: models that keep their function, rows, tables, peers where they are."""

from __future__ import annotations

import argparse
import importlib
from copy import deepcopy

import pytest

torch = pytest.importorskip("torch")

from torch import nn

import quantization
from benchmarks import accuracy, accuracy_nets, accuracy_report
from benchmarks.__main__ import main
from benchmarks.accuracy_cells import CELLS, Cell
from benchmarks.accuracy_nets import Net, rescaled
from benchmarks.accuracy_peers import GGML, PEERS, AbsentError
from tests.tiny_models import random_model
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Net:
    monkeypatch.setenv("QUANTIZATION_CACHE", str(tmp_path))
    model = random_model("llama").requires_grad_(False)
    batches = [{"input_ids": torch.randint(264, (1, 16))} for _ in range(3)]
    return Net("smollm2", "causal", model, None, ["lm_head"], batches, "tiny")


def test_cells_have_names_of_their_own_and_recipes_that_exist() -> None:
    assert len({cell.label for cell in CELLS}) == len(CELLS)
    for cell in CELLS:
        if cell.peer:
            assert cell.peer in PEERS
        else:
            quantization.quantize_model(nn.Sequential(nn.Linear(64, 4)), cell.recipe)


def test_rescaling_changes_the_weights_and_not_the_function(net: Net) -> None:
    changed = deepcopy(net.model)
    rescaled(changed, 0.25, seed=3)
    one, other = (model(**net.batches[0]).logits for model in (net.model, changed))
    assert (one - other).abs().max() < 1e-5 * one.abs().max()
    for name, layer in changed.model.named_modules():
        if isinstance(layer, nn.Linear):
            ratio = (layer.weight / net.model.model.get_submodule(name).weight).log().abs()
            assert 0.05 < ratio.max() < 0.51, name


def test_a_row_tells_what_was_lost_and_what_it_takes(net: Net) -> None:
    rows = [accuracy.measure(net, Cell(name, name)) for name in ("w8+f16", "w4g32a+f16")]
    assert rows[0]["kl"] < rows[1]["kl"] < 0.1
    assert rows[0]["kl_error"] > 0 and rows[0]["blocks"] == 3 and rows[0]["tokens"] == 45
    shapes = [tuple(layer.weight.shape) for _, layer in net.layers()]
    groups = [(out, cols // 32) for out, cols in shapes]
    codes = sum(out * cols // 2 for out, cols in shapes)
    side = sum(out * (2 * count + (count + 1) // 2) for out, count in groups)
    assert rows[1]["bytes"] == codes + side
    assert rows[1]["bits"] == 8 * (codes + side) / sum(out * cols for out, cols in shapes)
    assert not any(isinstance(m, quantization.PackedLinearLayer) for m in net.model.modules())


def test_what_quantize_model_does_not_take_is_absent_and_told(net: Net) -> None:
    results = {"rows": [], "absent": {}, "settings": {}}
    accuracy._measure_into(results, net, Cell("new", "w4g32a", "no such method"))
    accuracy._measure_into(results, net, Cell("odd", "w4g32a", None, "nowhere"))
    accuracy._measure_into(results, net, Cell("good", "w4g32a"))
    assert [row["label"] for row in results["rows"]] == ["good"]
    assert set(results["absent"]) == {"smollm2: new", "smollm2: odd"}
    assert accuracy._known(results, "smollm2", Cell("good", "w4g32a"))
    assert not accuracy._known(results, "smollm2", Cell("good", "w4g64a"))


def test_statistics_are_collected_once(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        quantization, "calibrate", lambda model, *a, **k: quantization.ModelStatistics({}, source=a)
    )
    assert net.statistics("random") is net.statistics("random")
    assert net.statistics("hessian:self").source == ("self",)
    monkeypatch.setattr(accuracy_nets, "lines", lambda kind, use: ["a text"])
    assert net.known.keys() == {"random", "hessian:self"}


def test_pages(net: Net, tmp_path) -> None:
    row = accuracy.measure(net, Cell("w4", "w4"))
    peer = row | {"label": "other", "peer": "hqq", "bits": 4.0, "calibration": "random"}
    drifting = row | {"model": "minilm", "kl": None, "drift": 0.03, "drift_error": 0.001}
    results = {
        "rows": [row, peer, drifting],
        "absent": {"smollm2: w3": "none"},
        "command": "python -m benchmarks accuracy",
        "machine": {"processor": "a processor"},
    }
    text = accuracy_report.markdown(results)
    assert "| w4 |  | " in text and "| *other* | random | 4.000 |" in text
    assert "30.00 ± 1.00" in text and "- smollm2: w3: none" in text and "a processor" in text
    page = tmp_path / "page.md"
    begin, end = accuracy_report.MARKS
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    accuracy_report.put_into(page, text)
    accuracy_report.put_into(page, "new")
    assert page.read_text() == f"before\n{begin}\n\nnew\n\n{end}\nafter\n"
    page.write_text("no marks")
    options = argparse.Namespace(markdown=page, plot=None)
    accuracy_report.finish(results, options)
    assert page.read_text() == "no marks"


@pytest.mark.deep
def test_pictures_are_the_same_each_time(net: Net, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    row = accuracy.measure(net, Cell("w4", "w4"))
    results = {"rows": [row, row | {"label": "other", "peer": "hqq", "bits": 3.0}]}
    accuracy_report.plot(results, tmp_path / "one.svg")
    accuracy_report.plot(results, tmp_path / "two.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_the_command_line(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["accuracy", "--list"])
    assert "w4g64a: w4g64a+f16" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["accuracy", "--models", "gpt5"])
    assert "'gpt5' is none of minilm, smollm2" in capsys.readouterr().err
    failing = quantization.demo.model_download.ModelError("no network")

    def load(*_):
        raise failing

    monkeypatch.setattr(accuracy, "load", load)
    assert main(["accuracy", "--models", "minilm"]) == 0
    assert "- minilm: no network" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("peer", "recipe", "module"),
    [
        ("hqq", "4g64", "hqq.core.quantize"),
        ("sinq", "4g64", "sinq.dual_shift"),
        ("opt-rtn", "4g64", "auto_round.data_type.int"),
        ("neuqi", "3g64", "auto_round.data_type.neuqi"),
        *(("llama.cpp", name, "xllamacpp") for name in GGML),
    ],
)
def test_peers_give_numbers_near_the_weight(peer: str, recipe: str, module: str) -> None:
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever such a package fails by
        pytest.skip(f"{module}: {error}")
    weight = torch.randn(32, 192)
    values, nbytes = PEERS[peer](weight.clone(), recipe, torch.rand(192) + 0.5)
    bits = 8 * nbytes / weight.numel()
    assert values.shape == weight.shape and int(recipe.strip("qi")[0]) < bits < 6.5
    assert (values - weight).std() < (0.5 if "2" in recipe else 0.3)


def test_a_peer_that_is_missing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(importlib.import_module("sys").modules, "hqq.core.quantize", None)
    importlib.import_module("benchmarks.accuracy_peers")._need.cache_clear()
    with pytest.raises(AbsentError, match=r"hqq\.core\.quantize cannot be imported"):
        PEERS["hqq"](torch.ones(2, 64), "4g64", None)
