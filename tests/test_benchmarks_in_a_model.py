"""Layers in a row, cold: two builds by turns, and what is made of their times."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the benchmarks stay in the source tree", allow_module_level=True)

from benchmarks import __main__ as command_line, bench_in_a_model, builds, session
from benchmarks.bench_in_a_model import SCHEMES, count_of
from benchmarks.harness import Timing
from benchmarks.limits import LimitsError
from benchmarks.records import Results, Row
from benchmarks.summary import summarize
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


def test_a_row_has_the_weights_of_a_model_and_more_than_caches_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert count_of(1, (64, 96)) == 4
    for cache, least in ((1 << 20, session.COLD_WEIGHTS), (1 << 30, 4 << 30)):
        monkeypatch.setattr(bench_in_a_model.machine, "caches", lambda size=cache: {"L3": size})
        count = count_of(session.COLD_WEIGHTS, (576, 576))
        assert least <= count * 576 * 576 < least + 576 * 576


def test_figures_of_a_row_speak_of_float32_on_one_thread() -> None:
    case = {"shape": "576x576", "dtype": "float32", "threads": 1, "layers": 405}
    int8 = Row.of("in_a_model", case, "ours w8a16", "ours", Timing([1.0]))
    int8.values |= {"fraction": 0.9, "of_earlier": 1.5, "of_int8": 1.0}
    four = Row.of("in_a_model", case, "ours w4g32", "ours", Timing([0.5]))
    four.values |= {"fraction": 0.1, "of_earlier": 2.5, "of_int8": 2.0}
    other = Row.of(
        "in_a_model",
        case | {"threads": 2},
        "ours w8a16",
        "ours",
        Timing([1.0]),
    )
    other.values |= {"fraction": 0.1}
    found = {v.title: v.missed for v in summarize(Results({}, "", [int8, four, other]), "fast")}
    assert len(found) == 4
    (missed,) = filter(None, found.values())
    assert missed == [
        "ours w8a16, shape 576x576, dtype float32, threads 1, layers 405: 1.50 (asked 2)"
    ]


def without_limits(milliseconds: float) -> None:
    raise LimitsError("not here")


def test_two_builds_take_turns(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The other build is a package of its own that knows w8a16 alone, and says so by its rows."""
    package = tmp_path / "other" / "quantization"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "def set_isa(name): pass\n"
        "def quantize_model(model, scheme):\n"
        "    if scheme != 'w8a16': raise ValueError('this build has w8a16 alone')\n"
    )
    monkeypatch.setattr(builds, "build", lambda commit: tmp_path / "other")
    monkeypatch.setattr(session, "Limits", without_limits)
    arguments = ["--smoke", "--only", "in_a_model", "--dtype", "float32", "--threads", "1"]
    written = tmp_path / "out.json"
    assert command_line.main([*arguments, "--against", "abc", "--json", str(written)]) == 0
    rows = {row["candidate"]: row for row in json.loads(written.read_text())["rows"]}
    both = [f"ours {scheme}{suffix}" for scheme in SCHEMES for suffix in ("", " at abc")]
    assert list(rows) == ["nn.Linear", *both]
    assert rows["ours w4g32 at abc"]["reason"] == "this build has w8a16 alone"
    earlier, ours = rows["ours w8a16 at abc"], rows["ours w8a16"]
    assert ours["of_earlier"] == pytest.approx(earlier["median"] / ours["median"])
    assert earlier["kind"] == "earlier" and "of_earlier" not in rows["ours w4g32"]
    assert all(row["samples"] == 3 for row in rows.values() if "median" in row)
    assert capsys.readouterr().out.count("== in_a_model") == 1


def test_a_commit_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("there is no git, or no history here")
    with pytest.raises(builds.BuildError, match="git archive"):
        builds.build("no-such-commit")


def test_a_build_that_ends_is_told(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit(1)\n")
    with (
        bench_in_a_model.Worker(tmp_path) as worker,
        pytest.raises(bench_in_a_model.WorkerError, match="no answer from the build"),
    ):
        worker.ask(forget=True)
