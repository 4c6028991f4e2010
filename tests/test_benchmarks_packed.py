"""The benchmarks of packed weights: their peers, their limits, and the figures they are held to."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the benchmarks stay in the source tree", allow_module_level=True)

from benchmarks import report, summary
from benchmarks.bench_packed import MAIN, WIDTHS, packed_isas
from benchmarks.bench_packed_model import SCHEMES
from benchmarks.gauge import problem_of
from benchmarks.harness import Timing
from benchmarks.machine import describe
from benchmarks.peers import Problem, attempt, quiet
from benchmarks.peers_4bit import BITSANDBYTES, FOUR_BIT_PEERS
from benchmarks.race import PIECE, Contender, Race, exact, relative
from benchmarks.records import Results, Row, add_ratios
from benchmarks.session import Session, full, quick, smoke
from benchmarks.summary import summarize
from quantization import PackedLinearLayer, QWQALinearLayer, Scheme
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

# ---- limits and peers ------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*MAIN, *WIDTHS, "nf4+dq", "w3g64af", "mxfp4"])
def test_bytes_of_a_packed_weight_are_those_of_its_layer(name: str) -> None:
    layer = PackedLinearLayer(200, 7, False, name, torch.bfloat16, device="meta")
    problem = problem_of(layer, "bfloat16", 3)
    table = 0 if layer.codebook is None else layer.codebook.nbytes
    assert problem.weight_bytes == layer.nbytes - table
    assert problem.traffic - problem.weight_bytes == 3 * (200 + 2 * 7) * 2


def test_bytes_of_an_int8_weight_are_those_of_its_layer() -> None:
    layer = QWQALinearLayer(200, 7, bias=False, dtype=torch.bfloat16, device="meta")
    assert problem_of(layer, "bfloat16", 1).weight_bytes == layer.nbytes


def test_a_peer_that_rounds_its_input_says_so() -> None:
    peer = next(peer for peer in FOUR_BIT_PEERS if peer.name == BITSANDBYTES)
    if peer.version is None:
        pytest.skip(f"{peer.package} is not installed")
    problem = Problem(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)), "float32")
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    with quiet(), torch.no_grad():
        apply = attempt(peer, problem, 1)
        is_rounded = torch.equal(apply(x), apply(x.bfloat16().float()))
    assert is_rounded is (peer.note(problem) == "rounds its input to bfloat16")


def test_4_bit_peers_refuse_what_they_cannot_group() -> None:
    for shape, takers in (((64, 256), 4), ((64, 96), 2), ((48, 64), 2), ((33, 65), 1)):
        problem = Problem(torch.zeros(shape), "float32")
        taking = [peer.name for peer in FOUR_BIT_PEERS[1:] if peer.why_not(problem) is None]
        assert len(taking) == takers, (shape, taking)


# ---- a race ----------------------------------------------------------------------------------


def test_the_truth_is_float64_piece_by_piece() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2 * PIECE + 3, 5, generator=generator)
    inputs = torch.randn(2, 5, generator=generator)
    assert torch.equal(exact(inputs, weight), inputs.double() @ weight.double().T)
    assert relative(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 4.0])) == 0.75


def test_a_contender_runs_in_its_cells_only() -> None:
    session = Session(smoke((1,)), "")
    session.limits = None
    race = Race.of("packed", (8, 16), "float32", 5)
    linear = race.problem.linear()
    contenders = [
        Contender("nn.Linear", "float", linear, note="knows it all"),
        Contender("narrow", "ours", linear, of_codes=race.truth, cells=(5,)),
    ]
    with torch.no_grad():
        rows = race.run(session, contenders, {"peer": ("W4A16", "broken")}, 1, (1, 5))
    named = [(row.case["tokens"], row.candidate) for row in rows]
    assert named == [
        (1, "nn.Linear"), (1, "peer"), (5, "nn.Linear"), (5, "narrow"), (5, "peer"),
    ]  # fmt: skip
    assert rows[0].reason == "knows it all" and rows[1].reason == "broken"
    assert rows[3].values["rounding"] == rows[3].values["error"] < 1e-6
    assert "rounding" not in rows[2].values and rows[2].values["ratio"] == 1


def test_packed_weights_run_on_the_best_isa_and_avx2() -> None:
    settings = smoke((1,))
    assert packed_isas(settings) == settings.isas
    for profile in (quick, full):
        chosen = packed_isas(profile((1,)))
        assert chosen[0] == profile((1,)).isas[0] and set(chosen[1:]) <= {"avx2"}
    schemes = [name.partition(":")[0] for name in SCHEMES]  # of which some name a method
    assert all(str(Scheme.parse(name)) == name for name in (*MAIN, *WIDTHS, *schemes))


# ---- figures and tables ----------------------------------------------------------------------


def packed_cell(dtype: str = "bfloat16", **case: object) -> list[Row]:
    case = {"shape": "8x8", "dtype": dtype, "threads": 2, "tokens": 1} | case
    seconds = {
        "nn.Linear": 8.0, "ours avx512 int8": 3.0, "ours avx512 w4g128": 2.0,
        "ours avx512 w3g64": 2.5, "ours avx2 w3g64": 8.0, BITSANDBYTES: 3.0, "torch int4pack": 2.8,
    }  # fmt: skip
    kinds = {"nn.Linear": "float", BITSANDBYTES: "W4A16", "torch int4pack": "W4A16"}
    rows = [
        Row.of("packed", case, name, kinds.get(name, "ours"), Timing([value]))
        for name, value in seconds.items()
    ]
    for row in rows:
        row.values["gweights"] = 120 / row.median
        if row.kind == "ours":
            row.values |= {"fraction": 1.5 / row.median, "level": "DRAM"}
    add_ratios(rows, "nn.Linear")
    return rows


def packed_verdicts(*cells: list[Row]) -> dict[str, summary.Verdict]:
    results = Results({}, "", [row for cell in cells for row in cell])
    return {verdict.title: verdict for verdict in summarize(results, "avx512")}


def test_figures_of_packed_weights_at_one_token() -> None:
    verdicts = packed_verdicts(packed_cell(), packed_cell(threads=1))
    limit, int8, peer, others, rate = verdicts.values()
    assert "0.70 of the limit" in limit.title and (limit.reached, limit.cells) == (1, 1)
    assert "int8 layer" in int8.title and (int8.reached, int8.cells) == (1, 1)
    assert "bitsandbytes" in peer.title and (peer.reached, peer.cells) == (2, 2)
    assert "other 4-bit peer" in others.title and (others.reached, others.cells) == (0, 2)
    assert others.missed[0] == (
        "ours avx512 w4g128, shape 8x8, dtype bfloat16, threads 2, tokens 1: 1.40 (asked 1.5)"
    )
    # 48 and 15 Gweights/s, asked for 50 and 16 of two cores, 25 and 8 of one
    assert "Gweights/s" in rate.title and (rate.reached, rate.cells) == (2, 4)


def test_a_rate_is_asked_up_to_the_limit() -> None:
    cell = packed_cell()
    for row in cell:
        if "fraction" in row.values:
            row.values["fraction"] = 1.0
    rate = next(v for title, v in packed_verdicts(cell).items() if "Gweights/s" in title)
    assert (rate.reached, rate.cells) == (2, 2)


def test_float32_is_not_raced_against_rounded_inputs() -> None:
    cells = [packed_cell("float32", tokens=tokens) for tokens in (1, 4, 16, 128)]
    verdicts = packed_verdicts(*cells)
    race = next(v for title, v in verdicts.items() if "than bitsandbytes" in title)
    assert race.cells == 2
    many = next(v for title, v in verdicts.items() if title.startswith("any width"))
    assert (many.reached, many.cells) == (2, 2)  # avx2 has no int8 row here


def test_short_tables_of_packed_weights() -> None:
    cells = [packed_cell(tokens=tokens) for tokens in (1, 128)]
    text = report.markdown(Results(describe(), "", [*cells[0], *cells[1]]), [], "avx512", False)
    assert "| bfloat16 | 2 | 8x8 | 4.00x (0.75) 1.40x int4pack | 4.00x (0.75) 1.40x int4p" in text
    assert "| w3g64 | 48.0 (0.60) |" in text and "| w3g64 | 15.0 (0.19) |" in text
    assert "## Packed, avx512, M>=96: times the int8 layer" in text and "| w3g64 | 1.20x |" in text
