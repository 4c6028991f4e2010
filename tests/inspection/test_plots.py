"""Pictures: that they show the numbers they should, into whatever Axes they are given."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
from matplotlib.figure import Figure

from quantization import (
    explain,
    pack_matrix,
    plot_errors,
    plot_frontier,
    plot_layers,
    plot_roofline,
    plot_weights,
)
from quantization.console.table import table_of
from quantization.inspection.plots import group_errors
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

WEIGHT = np.random.default_rng(0).normal(size=(6, 50)).astype("float32")
ROW = {
    "section": "linear", "shape": "8x4", "dtype": "float32", "threads": 1, "tokens": 1,
    "candidate": "ours", "kind": "ours", "median": 1e-6, "limit": 5e-7, "flops": 64, "traffic": 32,
}  # fmt: skip


def axes() -> Any:
    return Figure().subplots()


@pytest.mark.parametrize(
    "scheme", ["w4g16a", "w3g16af", "w2", "nf4", "kmeans2r", "ternary", "mxfp4", "w4g8a+order+cols"]
)
def test_bars_are_the_shares_of_codes_at_their_levels(scheme: str) -> None:
    packed = pack_matrix(WEIGHT, scheme)
    given = axes()
    assert plot_weights(packed, WEIGHT, ax=given) is given
    bars = [bar for bar in given.patches if hasattr(bar, "get_width")]
    assert sum(bar.get_height() for bar in bars) == pytest.approx(1)
    told = explain(packed, 0, 3)
    (bar,) = [b for b in bars if abs(b.get_x() + b.get_width() / 2 - told.level) < 1e-6][:1]
    assert bar.get_height() == pytest.approx((packed.codes == told.code).mean())
    given.figure.canvas.draw()


def test_errors_are_those_of_each_group() -> None:
    packed = pack_matrix(WEIGHT, "w3g16a")
    found = group_errors(packed, WEIGHT)
    assert found.shape == (6, 4)
    off = packed.dequantize()[2, 48:] - WEIGHT[2, 48:]
    wanted = np.sqrt(np.square(off).sum() / np.square(WEIGHT[2, 48:]).sum())
    assert found[2, 3] == pytest.approx(wanted, rel=1e-5)
    given = plot_errors(packed, WEIGHT, ax=axes())
    assert given.images[0].get_array().shape == (6, 4)


def test_a_bar_for_each_layer_of_any_table() -> None:
    table = table_of(("layer", "bits", "what"), [("a", 4, "x"), ("b", float("nan"), "y")])
    given = plot_layers(table, "bits")
    assert [text.get_text() for text in given.get_yticklabels()] == ["a", "b"]
    assert given.patches[0].get_width() == 4 and np.isnan(given.patches[1].get_width())
    with pytest.raises(TypeError, match="holds no numbers"):
        plot_layers(table, "what")
    with pytest.raises(KeyError, match="no column 'bit'"):
        plot_layers(table, "bit")


def test_a_roofline_of_a_file(tmp_path: Path) -> None:
    rows = [ROW, ROW | {"tokens": 4, "flops": 256, "traffic": 40}]
    rows.append({k: v for k, v in ROW.items() if k not in ("limit", "flops", "traffic")})
    rows[-1] |= {"candidate": "nn.Linear", "kind": "float"}
    (tmp_path / "numbers.json").write_text(json.dumps({"rows": rows}))
    given = plot_roofline(tmp_path / "numbers.json", ax=axes())
    labels = [line.get_label() for line in given.lines]
    assert "ours" in labels and "nn.Linear" in labels
    assert given.lines[0].get_xdata().tolist() == [2.0, 6.4]
    with pytest.raises(ValueError, match="no panel 'x'; there are '8x4, float32, 1 thread'"):
        plot_roofline(rows, "x")
    with pytest.raises(ValueError, match="no linear row with a limit"):
        plot_roofline([])


def test_a_plan_and_what_is_none() -> None:
    torch = pytest.importorskip("torch")
    from quantization import plan_bits

    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
    plan = plan_bits(model, target_bits=6, choices=("w4", "w8"), batches=[torch.randn(4, 16)])
    given = plot_frontier(plan, ax=axes())
    assert given.lines[0].get_xdata().tolist() == [size / 1e6 for size, _ in plan.frontier]
    with pytest.raises(TypeError, match="dict has no frontier"):
        plot_frontier({})


def test_without_matplotlib_the_extra_is_named() -> None:
    code = """
import sys
sys.modules["matplotlib"] = sys.modules["matplotlib.pyplot"] = None
import numpy as np
from quantization import pack_matrix, plot_weights
try:
    plot_weights(pack_matrix(np.ones((2, 8), "float32"), "w4"))
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 'pip install "qwqa[plot]"' in done.stdout
