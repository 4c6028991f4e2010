"""Tables of levels of one's own: names, numbers, methods, folders that load without the code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn

from quantization import (
    PackedLinearLayer,
    Scheme,
    fit_matrix,
    pack_matrix,
    quantize_model,
    register_grid,
    save_quantized,
)
from quantization.schemes import codebooks
from tests.packed_calls import check_decoding
from tests.packed_oracle import numbers
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

LEVELS = (0.5, -1.0, 0.1, -0.2)  # in no order


@pytest.fixture(autouse=True)
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codebooks, "_OWN", {})
    register_grid("odd", LEVELS)
    register_grid("cubic", lambda bits: np.linspace(-1, 1, 2**bits) ** 3)


@pytest.mark.parametrize(
    "name", ["oddg16", "odd", "oddt", "cubic3g16+dq", "cubic8g7+f16", "cubic1", "oddg16+order+cols"]
)
def test_codes_are_the_nearest_levels(name: str, rng: np.random.Generator) -> None:
    scheme = Scheme.parse(name)
    assert Scheme.parse(str(scheme)) == scheme == Scheme.from_dict(
        json.loads(json.dumps(scheme.to_dict()))
    )  # fmt: skip
    weight = torch.from_numpy(rng.standard_normal((12, 40))).float()
    packed = pack_matrix(weight, name)
    assert packed.scheme == scheme
    check_decoding(packed)
    levels = np.array(scheme.levels)
    scales = packed.scales.double() * (
        1 if packed.scale_steps is None else packed.scale_steps[:, None]
    )
    wide = np.repeat(scales.numpy(), scheme.group(40), axis=1)[:, :40]
    nearest = np.abs(levels * wide[..., None] - weight.numpy()[..., None]).min(-1)
    assert np.allclose(np.abs(numbers(packed) - weight.numpy()), nearest, atol=1e-5)
    layer = PackedLinearLayer.from_packed(packed)
    x = torch.randn(3, 40)
    torch.testing.assert_close(layer(x), x @ layer.weight.T, rtol=1e-4, atol=1e-4)


def test_methods_fit_their_scales() -> None:
    weight = torch.randn(32, 64)
    for method in ("lsq", "sinq"):
        made = fit_matrix(weight, "cubic4g32+cols", method)
        check_decoding(made)
    off = [
        (fit_matrix(weight, "cubic3g32", m).dequantize() - weight).norm() for m in ("lsq", "rtn")
    ]
    assert off[0] < off[1]


def test_folders_load_without_the_code_that_made_them(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.Embedding(4, 16))
    quantize_model(model, {nn.Embedding: "odd", "0": "cubic4g32:lsq"})
    save_quantized(model, tmp_path / "saved")
    torch.save(model[0].weight, tmp_path / "weight.pt")
    code = f"""
import torch
from torch import nn
from quantization import load_quantized
fresh = nn.Sequential(nn.Linear(64, 8), nn.Embedding(4, 16))
model = load_quantized({str(tmp_path / "saved")!r}, fresh, verify=True)
assert torch.equal(model[0].weight, torch.load({str(tmp_path / "weight.pt")!r}))
assert str(model[1].scheme) == "table(0.5,-1,0.1,-0.2)", model[1].scheme
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: register_grid("odd", [0, 1]), ValueError, "a grid 'odd' of other levels already"),
        (lambda: register_grid("nf", [0, 1]), ValueError, "not that of another"),
        (lambda: register_grid("a4", [0, 1]), ValueError, "letters and underscores"),
        (lambda: register_grid("b", [0, 1, 2]), ValueError, "there are 3 levels"),
        (lambda: register_grid(3, [0, 1]), TypeError, "the name of a grid is a string"),
        (lambda: Scheme.parse("cubicg32"), ValueError, "several widths: write one, such as cubic4"),
        (lambda: Scheme.parse("odd3"), ValueError, "there are 4 levels, and codes of 3 bits"),
        (lambda: Scheme.parse("odda"), ValueError, "'odda' names no scheme"),
        (lambda: Scheme.parse("oddx"), ValueError, "'oddx' names no scheme"),
        (lambda: Scheme.parse("table(1,x)"), ValueError, "lists levels that are no numbers"),
        (lambda: Scheme(4, grid="table"), ValueError, "grid 'table' needs levels, one a code"),
        (lambda: Scheme(4, levels=(0, 1)), ValueError, "'integer' has no levels to give"),
        (
            lambda: Scheme(2, grid="table", levels=(0, 1)),
            ValueError,
            "codes of 2 bits have 4 levels, not 2",
        ),
        (lambda: Scheme(1, grid="table", levels=(0, "a")), TypeError, "levels are numbers"),
        (lambda: Scheme(1, grid="table", levels=(0, 0)), ValueError, "finite and not all 0"),
        (
            lambda: Scheme(1, grid="table", levels=(0, float("nan"))),
            ValueError,
            "finite and not all 0",
        ),
    ],
)
def test_what_is_wrong_is_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
