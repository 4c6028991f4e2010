"""The benchmarks: what they compute from times, and that every section still runs."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the benchmarks stay in the source tree", allow_module_level=True)

from benchmarks import __main__ as command_line, summary, tables
from benchmarks.bench_packed import INT8, MAIN, WIDTHS
from benchmarks.bench_packed_model import SCHEMES
from benchmarks.formulas import (
    Limit,
    LinearProblem,
    Stream,
    cache_level,
    limit_of,
    stream_limit,
)
from benchmarks.harness import Candidate, Failure, Pace, Timing, take_turns
from benchmarks.limits import Limits, arithmetic, compiler, vector_set
from benchmarks.peers import PEERS, Peer, Problem, attempt, installed, quiet
from benchmarks.peers_4bit import FOUR_BIT_PEERS
from benchmarks.race import relative
from benchmarks.records import Results, Row, add_ratios
from benchmarks.summary import summarize
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

ARITHMETIC = ("dpbf16", "avx512", "avx2", "generic")

# ---- the harness -----------------------------------------------------------------------------


def test_quantiles_of_a_timing() -> None:
    timing = Timing([float(value) for value in range(11)])
    assert (timing.median, timing.p10, timing.p90) == (5.0, 1.0, 9.0)
    assert Timing([2.0]).p10 == Timing([2.0]).p90 == 2.0


def test_candidates_take_turns_and_enter_before_each() -> None:
    log: list[str] = []
    candidates = [
        Candidate(name, "ours", lambda name=name: log.append(name), lambda: log.append("enter"))
        for name in ("a", "b")
    ]
    results = take_turns(candidates, Pace(rounds=4, seconds=60, sample=0))
    assert {name: len(result.samples) for name, result in results.items()} == {"a": 4, "b": 4}
    turns = [name for name, before in zip(log[1:], log, strict=False) if before == "enter"]
    assert turns == ["a", "b"] + ["a", "b", "b", "a"] * 2


def test_short_calls_are_repeated_and_slow_ones_are_not() -> None:
    quick = Candidate("quick", "ours", lambda: None)
    slow = Candidate("slow", "ours", lambda: time.sleep(0.02))
    results = take_turns([quick, slow], Pace(rounds=5, seconds=60, sample=1e-4, slow=0.01))
    assert results["quick"].calls > 10 and len(results["quick"].samples) == 5
    assert results["slow"].calls == 1 and len(results["slow"].samples) == 2
    assert results["slow"].median >= 0.02 > results["quick"].p90


def test_a_long_call_gets_fewer_samples_spread_over_the_rounds() -> None:
    log: list[str] = []
    short = Candidate("short", "ours", lambda: log.append("s"))
    long = Candidate("long", "ours", lambda: (log.append("L"), time.sleep(0.005)))
    results = take_turns([short, long], Pace(rounds=12, seconds=0.08, sample=0))
    counts = {name: len(result.samples) for name, result in results.items()}
    assert counts["short"] == 12 and 3 <= counts["long"] <= 4
    text = "".join(log)[4:]
    assert text.startswith("ss") and "LL" in text[len(text) // 2 :]


def test_a_candidate_that_raises_is_reported_and_the_others_go_on() -> None:
    def broken() -> None:
        raise ValueError("no such luck\nand more")

    candidates = [Candidate("broken", "W8A16", broken), Candidate("good", "ours", lambda: None)]
    results = take_turns(candidates, Pace(rounds=3, seconds=1, sample=0))
    assert results["broken"] == Failure("ValueError: no such luck")
    assert len(results["good"].samples) == 3


# ---- the formulas ----------------------------------------------------------------------------


def test_traffic_of_a_linear_map() -> None:
    problem = LinearProblem(10, 7, 3, value_bytes=2, scale_bytes=4)
    assert problem.weight_bytes == 10 * (7 + 4)
    assert problem.traffic == 110 + 3 * 7 * 2 + 2 * 3 * 10 * 2
    assert problem.backward_traffic == 110 + 3 * 10 * 2 + 2 * 3 * 7 * 2
    assert problem.flops == 2 * 3 * 10 * 7
    assert LinearProblem(10, 7, 3, 2, 4, bits=4).weight_bytes == 10 * (4 + 4)
    assert LinearProblem(10, 11, 3, 2, 4, bits=Fraction(8, 5)).weight_bytes == 10 * (3 + 4)


def test_the_limit_is_the_longer_of_two_times() -> None:
    memory_bound = limit_of(traffic=100, flops=100, bandwidth=10, peak=100)
    assert (memory_bound.seconds, memory_bound.bound) == (10, "memory")
    assert Limit(memory=1, compute=2).seconds == 2
    assert Limit(memory=1, compute=2).bound == "compute"


def test_traffic_of_a_stream() -> None:
    one, two = Stream(4, 1), Stream(4, 1, passes=2)
    assert one.traffic(100, write_allocate=False) == 500
    assert one.traffic(100, write_allocate=True) == 600
    assert two.traffic(100, write_allocate=False) == 900
    assert stream_limit(1, 5.0, 7.0) == 7.0
    assert stream_limit(2, 5.0, 7.0) == 12.0


def test_cache_levels() -> None:
    caches = {"L1": 32 << 10, "L2": 1 << 20, "L3": 32 << 20}
    assert cache_level(1 << 20, 1, caches) == "L2"
    assert cache_level(2 << 20, 1, caches) == "L3"
    assert cache_level(2 << 20, 2, caches) == "L2"
    assert cache_level(64 << 20, 2, caches) == "DRAM"
    assert cache_level(1, 1, {}) == "DRAM"


def test_each_isa_is_held_to_its_own_arithmetic() -> None:
    assert arithmetic("avx512bf16", "bfloat16", ARITHMETIC) == "dpbf16"
    assert arithmetic("avx512bf16", "float32", ARITHMETIC) == "avx512"
    assert arithmetic("avx512", "bfloat16", ARITHMETIC) == "avx512"
    assert arithmetic("avx512bf16", "bfloat16", ARITHMETIC[1:]) == "avx512"
    assert vector_set("avx2", ARITHMETIC) == "avx2"
    assert vector_set("reference", ARITHMETIC) == "generic"
    assert vector_set("neon", ("neon", "generic")) == "neon"


@pytest.mark.skipif(compiler() is None, reason="no C compiler is installed")
def test_limits_are_measured_and_only_sharpen() -> None:
    limits = Limits(milliseconds=0.2)
    assert limits.names[-1] == "generic"
    first = limits.read(1 << 20, 1)
    assert 1e8 < first <= limits.read(1 << 20, 1) < 1e13
    assert all(1e8 < limits.flops(name, 2) < 1e15 for name in limits.names)
    slowly = limits.mix_seconds(4 << 20, 1 << 20, 1)
    assert 0 < limits.mix_seconds(4 << 20, 1 << 20, 1) <= slowly
    assert limits.touch_seconds(1 << 20, 2) > 0
    assert all(value > 0 for value in limits.best().values())


# ---- peers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_each_peer_applies_the_weight(peer: Peer, dtype: str) -> None:
    assert error_of(peer, (48, 64), dtype) < 0.04


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("peer", FOUR_BIT_PEERS[1:], ids=lambda peer: peer.name)
def test_each_4_bit_peer_applies_the_weight(peer: Peer, dtype: str) -> None:
    assert 0.06 < error_of(peer, (64, 256), dtype) < 0.16


def error_of(peer: Peer, shape: tuple[int, int], dtype: str) -> float:
    """How far a peer's map of noise is from float64 arithmetic on the float weight."""
    if peer.version is None:
        pytest.skip(f"{peer.package} is not installed")
    problem = Problem(torch.randn(shape, generator=torch.Generator().manual_seed(0)), dtype)
    if (reason := peer.why_not(problem)) is not None:
        pytest.skip(reason)
    noise = torch.randn(3, shape[1], generator=torch.Generator().manual_seed(1))
    x = noise.to(problem.torch_dtype)
    with quiet(), torch.no_grad():
        apply = attempt(peer, problem, 1)
        if isinstance(apply, Failure):
            pytest.skip(apply.reason)
        y = apply(x)
    truth = x.double() @ problem.weight.double().T
    assert y.dtype == problem.torch_dtype and y.shape == (3, shape[0])
    return relative(y.double(), truth)


def test_peers_that_are_not_installed_are_listed() -> None:
    nobody = Peer("nobody", "W4A16", "no-such-distribution", lambda problem, threads: None)
    present, absent = installed((*PEERS[:1], nobody))
    assert present == [PEERS[0]]
    assert absent == {"nobody": "no-such-distribution is not installed"}


def test_what_would_crash_is_refused() -> None:
    int8pack = next(peer for peer in PEERS if peer.name == "torch int8pack")
    quanto = next(peer for peer in PEERS if peer.name == "quanto")
    for width, crashes in ((64, False), (100, True), (99, True)):
        problem = Problem(torch.zeros(2, width), "bfloat16")
        assert ("crashes" in (int8pack.why_not(problem) or "")) is crashes
    assert quanto.why_not(Problem(torch.zeros(2, 100), "bfloat16"))
    assert not quanto.why_not(Problem(torch.zeros(2, 99), "bfloat16"))
    assert not int8pack.why_not(Problem(torch.zeros(2, 100), "float32"))


# ---- tables and the summary ------------------------------------------------------------------


def linear_cell(ours: float, linear: float, peer: float | None, **case: object) -> list[Row]:
    case = {"shape": "8x8", "dtype": "float32", "threads": 1, "tokens": 1} | case
    rows = [
        Row.of("linear", case, "nn.Linear", "float", Timing([linear])),
        Row.of("linear", case, "ours fast", "ours", Timing([ours])),
        Row.of("linear", case, "peer", "W8A16", Timing([peer]) if peer else Failure("broken")),
    ]
    rows[1].values |= {"fraction": 0.5 / ours, "level": "DRAM"}
    add_ratios(rows, "nn.Linear")
    return rows


def test_the_summary_names_each_missed_cell() -> None:
    rows = linear_cell(0.55, 3.0, 0.6) + linear_cell(1.0, 0.9, None, threads=2)
    results = Results({}, "", rows)
    verdicts = {v.title.split(":")[0]: v for v in summarize(results, "fast")}
    limit = verdicts["M=1"]
    assert (limit.reached, limit.cells) == (1, 2)
    assert limit.missed == ["shape 8x8, dtype float32, threads 2, tokens 1: 0.50 (asked 0.8)"]
    assert verdicts["faster than nn.Linear of the same dtype"].reached == 1
    assert (verdicts["faster than every W8A16 peer"].reached) == 1
    assert verdicts["faster than every W8A16 peer"].cells == 1
    assert verdicts["M=1, beyond L3"].reached == 1


def test_a_peer_too_slow_to_run_still_counts() -> None:
    rows = linear_cell(2.0, 3.0, None)
    rows[2].values["expected"] = 10.0
    verdict = next(
        v for v in summarize(Results({}, "", rows), "fast") if v.title.endswith("W8A16 peer")
    )
    assert (verdict.cells, verdict.missed) == (1, [])


def test_a_missed_stream_says_how_much_the_first_touch_takes() -> None:
    case = {"way": "dequantize", "dtype": "float32", "granularity": "row"}
    row = Row.of("quantize", case, "ours fast", "ours", Timing([1.0]))
    row.values |= {"fraction": 0.4, "fraction_fresh": 0.9}
    (verdict,) = summarize(Results({}, "", [row]), "fast")
    assert verdict.missed == [
        "ours fast, way dequantize, dtype float32, granularity row: 0.40 (asked 0.7; 0.90 "
        "with the first touch of new pages)"
    ]


def test_figures_have_titles_of_their_own_and_need_cells() -> None:
    titles = [figure.title for figure in summary._figures("ours fast")]
    assert len(titles) == len(set(titles))
    assert summarize(Results({}, ""), "fast") == []


def test_texts_of_numbers() -> None:
    assert tables.seconds_text(1.5) == "1.50 s"
    assert tables.seconds_text(0.0999) == "99.9 ms"
    assert tables.seconds_text(0.9999e-3) == "1.00 ms"
    assert tables.seconds_text(3e-9) == "3.00 ns"
    assert tables.markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |"


# ---- the whole, in smoke mode ----------------------------------------------------------------


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip


# In full it is deep: it repeats, section by section, what one section shows here.
def test_one_section_runs_in_smoke_mode(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert command_line.main(["--smoke", "--only", "pack", "--json", str(tmp_path / "out")]) == 0
    rows = json.loads((tmp_path / "out").read_text())["rows"]
    assert {row["section"] for row in rows} == {"pack"}
    assert all("reason" in row or 0 < row["p10"] <= row["median"] <= row["p90"] for row in rows)
    assert "pack" in capsys.readouterr().out


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("bench")
    files = {kind: folder / f"out.{kind}" for kind in ("json", "md", "png")}
    done = run(
        "--smoke", "--json", str(files["json"]), "--markdown", str(files["md"]),
        "--plot", str(files["png"]),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    entry = json.loads(files["json"].read_text())
    return {"entry": entry, "files": files, "printed": done.stdout}


@pytest.mark.deep
def test_smoke_writes_every_section(smoke: dict) -> None:
    entry = smoke["entry"]
    expected = {"command", "machine", "settings", "limits", "absent", "summary", "rows"}
    assert set(entry) == expected
    sections = {row["section"] for row in entry["rows"]}
    assert sections == {
        "in_a_model", "linear", "packed", "backward", "quantize", "pack", "overhead", "files",
        "packed_model",
    }  # fmt: skip
    assert entry["machine"]["isas"] and "--smoke" in entry["command"]
    for row in entry["rows"]:
        assert "reason" in row or 0 < row["p10"] <= row["median"] <= row["p90"]
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, float)), row


@pytest.mark.deep
def test_smoke_times_each_isa_right(smoke: dict) -> None:
    ours = [row for row in smoke["entry"]["rows"] if row["kind"] == "ours"]
    for isa in smoke["entry"]["machine"]["isas"]:
        assert {r["section"] for r in ours if r["candidate"] == f"ours {isa}"} >= {
            "linear", "backward", "quantize", "pack",
        }  # fmt: skip
        of_isa = {r["candidate"] for r in ours if r["candidate"].startswith(f"ours {isa} ")}
        assert of_isa == {f"ours {isa} {scheme}" for scheme in (INT8, *MAIN, *WIDTHS)}
    mapped = [row for row in ours if row["section"] in ("linear", "packed")]
    assert all(row["rounding"] < 1e-2 for row in mapped)
    assert all(row["exact"] for row in ours if "exact" in row)
    if shutil.which("cc"):
        assert all(row["fraction"] > 0 for row in mapped)


@pytest.mark.deep
def test_smoke_judges_a_packed_model(smoke: dict) -> None:
    rows = [row for row in smoke["entry"]["rows"] if row["section"] == "packed_model"]
    for dtype in ("float32", "bfloat16"):
        found = {row["candidate"]: row for row in rows if row["dtype"] == dtype}
        assert tuple(found) == ("float", *SCHEMES)
        sizes = [found[f"w{bits}g64a"]["bytes"] for bits in (6, 5, 4, 3, 2)]
        assert sizes == sorted(sizes, reverse=True) and sizes[0] < found["float"]["bytes"]
        assert found["w8"]["perplexity"] < 1.05 * found["float"]["perplexity"]
        assert found["w8"]["perplexity"] < found["ternaryg64"]["perplexity"]
        assert all(row["tokens_per_second"] > 0 for row in found.values())


@pytest.mark.deep
def test_smoke_prints_and_writes_tables(smoke: dict) -> None:
    assert "linear: shape 64x96, dtype float32, threads 1, tokens 5" in smoke["printed"]
    text = smoke["files"]["md"].read_text()
    assert "## Linear, avx2: times nn.Linear" in text or "avx2" not in text
    assert "## The language model, by scheme" in text and smoke["entry"]["command"] in text
    if "plot" not in smoke["entry"]["absent"]:
        assert smoke["files"]["png"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.deep
def test_an_earlier_run_is_told_again(smoke: dict, capsys: pytest.CaptureFixture) -> None:
    results = Results.from_dict(smoke["entry"])
    assert [row.to_dict() for row in results.rows if not row.timing] == [
        row for row in smoke["entry"]["rows"] if "median" not in row
    ]
    medians = [row.median for row in results.rows if row.timing]
    assert medians == [row["median"] for row in smoke["entry"]["rows"] if "median" in row]
    assert command_line.main(["--read", str(smoke["files"]["json"])]) == 0
    told = capsys.readouterr().out
    assert "| dtype | threads | shape | tokens 1 | tokens 5 |" in told
    assert "## Every cell" not in told


@pytest.mark.parametrize(
    "arguments", [("--only", "nothing"), ("--isa", "z80"), ("--threads", "0"), ("--shape", "12")]
)
def test_wrong_arguments_are_told(
    arguments: tuple[str, str], capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["--smoke", *arguments])
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err
