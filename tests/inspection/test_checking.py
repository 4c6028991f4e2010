"""What is broken on purpose is found and named; what is whole passes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from torch import nn

from quantization import (
    PackedLinearLayer,
    active_isa,
    isas,
    load_quantized,
    quantize_model,
    save_quantized,
    self_test,
    verify,
)
from quantization.inspection.checking import self_test as self_test_module
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

SCHEMES = ["w8a16", "w2a", "w3g5", "w4g64a", "w5", "w6g7af", "w7a", "w8", "w4g16af+dq", "nf4",
           "mxfp4", "fp4g8", "kmeans3", "kmeans4r", "binaryg8", "ternary", "w4g8+cols", "int8",
           "w4g16+f16", "w3g8a+dq"]  # fmt: skip


def net(scheme: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(37, 24, dtype=dtype), nn.Linear(24, 7, bias=False, dtype=dtype))
    model.append(nn.Embedding(9, 37, dtype=dtype))
    reference = copy.deepcopy(model)
    is_of_linear = scheme in ("w8a16",) or "cols" in scheme
    quantize_model(model, {nn.Embedding: "w4" if is_of_linear else scheme, "*": scheme})
    return model, reference


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(("scheme", "dtype"), [(s, DTYPES[i % 3]) for i, s in enumerate(SCHEMES)])
def test_what_is_whole_passes(scheme: str, dtype: torch.dtype) -> None:
    model, reference = net(scheme, dtype)
    for found in (verify(model), verify(model, reference)):
        assert found.ok and len(found) == 3, str(found)
    isa = active_isa()
    found = self_test(model)
    assert found.ok and found["0"].checks == isas() and active_isa() == isa, str(found)
    assert 0 < found["0"].worst <= 1


@pytest.mark.parametrize("method", ["lsq", "hqq", "awq", "descent"])
def test_methods_are_not_taken_for_damage(method: str) -> None:
    from quantization import calibrate

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48))
    reference = copy.deepcopy(model)
    kind = "hessian" if method == "descent" else "moments"
    known = calibrate(model, [torch.randn(99, 64)], statistics=kind)
    scheme = {"awq": "w4g16a+cols"}.get(method, "w3g16af")
    quantize_model(model, f"{scheme}:{method}", statistics=known)
    assert verify(model, reference).ok and self_test(model).ok


def codes(layer: PackedLinearLayer) -> None:
    layer.packed_weights[3, 2] ^= 0x08


def padding(layer: PackedLinearLayer) -> None:
    layer.packed_weights[4, -1] |= 0x80


def scales(layer: PackedLinearLayer) -> None:
    layer.scales[1, 1] = float("inf")


def bias(layer: PackedLinearLayer) -> None:
    layer.bias.data[2] = float("nan")


def shape(layer: PackedLinearLayer) -> None:
    layer._buffers["scales"] = layer.scales[:5]


def swapped(layer: PackedLinearLayer) -> None:
    layer.packed_weights.copy_(layer.packed_weights.flip(0))


@pytest.mark.parametrize(
    ("damage", "scheme", "said"),
    [
        (codes, "w4g16", "weight [3, 4]: another level is nearer than that of its code"),
        (padding, "w4g16", "packed_weights: row 4 has bits that belong to no code"),
        (padding, "ternary", "packed_weights: row 4 has bits that belong to no code"),
        (scales, "w4g16", "scales: 1 of 72 are not finite, the first at [1, 1]"),
        (bias, "w4g16", "bias: 1 of 24 are not finite, the first at [2]"),
        (shape, "w4g16", "scales"),
        (swapped, "w4g16", "the noise is more than the signal"),
    ],
)
def test_damage_is_named(damage: Callable, scheme: str, said: str) -> None:
    model, reference = net(scheme)
    damage(model[0])
    found = verify(model, reference)
    assert [row.layer for row in found.failed] == ["0"] and said in found["0"].what, str(found)
    assert "1 with problems" in str(found) and not found.ok


def test_marked_groups_and_orders() -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(64, 8))
    with torch.no_grad():
        model[0].weight[3, 40] = float("nan")
    quantize_model(model, {"0": "mxfp4", "*": "w4"}, nonfinite="mark")
    assert verify(model)["0"].what == "scales: 1 of 16 stand for NaN" and verify(model)["1"].ok
    assert self_test(model).ok


def test_folders_and_wrong_things(tmp_path: Path) -> None:
    model, reference = net("w4g16a")
    save_quantized(model, tmp_path / "saved")
    assert verify(tmp_path / "saved", reference).ok and self_test(tmp_path / "saved").ok
    assert verify(load_quantized(tmp_path / "saved", reference)).ok
    for call in (verify, self_test):
        with pytest.raises(TypeError, match="expected a model"):
            call(3)
    assert verify(model.to("meta")).ok and self_test(model).ok


def test_a_kernel_that_errs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = net("w4g16")
    isa = isas()[0]
    plain = PackedLinearLayer.forward

    def wrong(self: PackedLinearLayer, x: torch.Tensor) -> torch.Tensor:
        return plain(self, x) + (1e-3 if active_isa() == isa else 0)

    monkeypatch.setattr(PackedLinearLayer, "forward", wrong)
    found = self_test(model)
    assert {row.layer for row in found.failed} == {"0", "1"}
    assert found["0"].what.startswith(f"{isa}: an answer is") and self_test_module
