"""The report of a replacement: figures, names, and what it keeps alive."""

from __future__ import annotations

import gc
import weakref

import pytest

torch = pytest.importorskip("torch")
from torch import nn

from quantization.console.columns import size
from quantization.linear_layer import (
    replace_linear_layers_with_w8a16,
)
from tests.swap.small_models import TARGET, mlp
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

# ---- the report ------------------------------------------------------------------------------


def test_figures_of_the_report() -> None:
    model = mlp()
    bytes_before = sum(p.nbytes for p in model.parameters())
    report = replace_linear_layers_with_w8a16(model, TARGET, ["head"])
    assert report.bytes_before == 4 * (512 + 32 + 512)
    assert report.bytes_after == 512 + 4 * 32 + 4 * 32 + 512 + 4 * 16
    assert report.model_bytes_before == bytes_before
    tensors = [*model.parameters(), *model.buffers()]
    assert report.model_bytes_after == sum(tensor.nbytes for tensor in tensors)
    assert report.coverage == pytest.approx(1024 / (1024 + 32 + 64 + 4))
    assert [t.name for t in report.float_tensors] == ["head.weight", "block.up.bias", "head.bias"]
    assert report["block.up"].shape == (32, 16) and report["block.up"].kind == "Linear"


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999_949, "999.9 kB"), (999_950, "1.0 MB"), (2.5e9, "2.5 GB"), (3e12, "3.0 TB")],
)
def test_bytes_for_reading(nbytes: int, text: str) -> None:
    assert size(int(nbytes)) == text


def test_further_names_of_a_layer_are_told() -> None:
    shared = nn.Linear(4, 4)
    text = repr(replace_linear_layers_with_w8a16(nn.Sequential(shared, shared), TARGET))
    assert "0 (also 1) " in text
    text = repr(replace_linear_layers_with_w8a16(nn.Sequential(*[nn.Linear(4, 4)] * 9), TARGET))
    assert "0 (also 1, 2, ...) " in text


def test_replaced_layers_take_about_a_quarter() -> None:
    model = nn.Sequential(nn.Linear(576, 1536, bias=False), nn.Linear(1536, 576, bias=False))
    report = replace_linear_layers_with_w8a16(model, TARGET)
    assert 0.25 < report.bytes_after / report.bytes_before < 0.27


def test_the_report_is_a_sequence() -> None:
    report = replace_linear_layers_with_w8a16(mlp(), TARGET, ["head"])
    assert len(report) == 3 and report[0] is next(iter(report)) and report[-1].name == "head"
    assert report[:2] == tuple(report)[:2]
    with pytest.raises(KeyError, match="'tail' is no linear layer"):
        report["tail"]
    with pytest.raises(IndexError):
        report[3]


def test_bare_parameters_are_named_among_the_floats() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up = nn.Parameter(torch.zeros(4, 16, 16))
            self.router = nn.Linear(16, 4)

    report = replace_linear_layers_with_w8a16(nn.Sequential(Experts()), TARGET)
    assert report.float_tensors[0].name == "0.gate_up"
    assert "0.gate_up [4, 16, 16] float32 4.1 kB" in repr(report)
    assert report.coverage < 0.1


def test_a_long_report_joins_the_layers_of_a_family() -> None:
    model = nn.ModuleDict(
        {
            "layers": nn.ModuleList(
                nn.ModuleDict({"up1": nn.Linear(8, 16), "down": nn.Linear(16, 8)})
                for _ in range(30)
            ),
            "head": nn.Linear(8, 4),
        }
    )
    report = replace_linear_layers_with_w8a16(model, TARGET, ["layers.3", "head"])
    lines = report.to_text().splitlines()
    text = "\n".join(lines)
    assert "layers.*.up1 (29 layers)" in text and "layers.3.down" in text
    assert "excluded: by 'layers.3'" in text
    assert len(lines) < 12
    row = next(line for line in lines if "layers.*.up1" in line)
    assert row.index("16 x 8") + len("16 x 8") == lines[1].index("out x in") + len("out x in")


def test_the_report_keeps_no_float_weight_alive() -> None:
    model = mlp()
    alive = weakref.ref(model["head"].weight)
    report = replace_linear_layers_with_w8a16(model, TARGET)
    gc.collect()
    assert alive() is None and report.replaced
