"""hqq, sinq, awq: as they are published, exact where they can be, sane on odd groups."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file
from torch import nn

from quantization import (
    Scheme,
    Statistics,
    calibrate,
    fit_matrix,
    load_quantized,
    pack_matrix,
    quantize_checkpoint,
    quantize_model,
    save_quantized,
)
from quantization.checkpoint.source import float_source
from quantization.methods.columns import divided, sinq
from quantization.methods.hqq import half_quadratic
from quantization.methods.lsq import lsq
from tests.packed_calls import check_decoding, same
from tests.packed_oracle import numbers
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

COLUMNS = ["sinq", "sinq_lsq", "awq"]


def uneven(rows: int = 48, cols: int = 96, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Weights with rows and columns of several sizes."""
    sizes = torch.rand(rows, 1) + 0.1, torch.rand(cols) + 0.1
    return (torch.randn(rows, cols) * sizes[0] * sizes[1] * 0.1).to(dtype)


def known(cols: int = 96) -> Statistics:
    return Statistics(torch.from_numpy(np.random.default_rng(3).exponential(size=cols) ** 2))


# ---- as published ----------------------------------------------------------------------------


def test_hqq_is_that_of_its_package() -> None:
    quantizer = pytest.importorskip("hqq.core.quantize").Quantizer
    weight = uneven(cols=128)
    for bits, group in ((4, 64), (3, 64), (2, 32)):
        _, meta = quantizer.quantize(
            weight, nbits=bits, group_size=group, axis=1, bitpack=False, device="cpu",
            round_zero=bits == 4,
        )  # fmt: skip
        blocks = weight.numpy().reshape(48, -1, group)
        scales, zeros = half_quadratic(blocks, np.ones(blocks.shape[1:], bool), bits, False)
        assert np.allclose(scales.reshape(-1, 1), meta["scale"], rtol=1e-5)
        assert np.allclose(zeros.reshape(-1, 1), meta["zero"], atol=1e-4)


def test_sinq_is_that_of_its_package() -> None:
    quantize = pytest.importorskip("sinq.dual_shift").tiled_quant_rectangle
    weight = uneven(cols=128)
    for bits, group in ((4, 64), (3, 32)):
        codes, scales, columns, zeros = quantize(weight, [0, 2**bits - 1], group, method="sinq")
        theirs = ((codes - zeros) * scales).reshape(weight.shape) * columns
        ours = sinq(weight, Scheme.parse(f"w{bits}g{group}a+cols"))
        ratio = ours.input_scale / columns.reshape(-1)
        assert torch.allclose(ratio, ratio[0].expand(128), rtol=1e-5)
        assert (ours.dequantize() - theirs).norm() < 1e-3 * weight.norm()


def test_sinq_evens_columns_out() -> None:
    """Its definition, without the package: factors undo sizes of columns that were put there."""
    weight = torch.randn(256, 64) * 0.05
    sizes = torch.linspace(0.5, 2, 64)[torch.randperm(64)]
    factors = sinq(weight * sizes, Scheme.parse("w4+cols")).input_scale
    ratio = factors / sizes
    assert ratio.std() / ratio.mean() < 0.15
    ratio = sinq(weight * sizes * 2.0**-30, Scheme.parse("w4+cols")).input_scale / sizes
    assert ratio.std() / ratio.mean() < 0.15


def test_hqq_takes_few_large_errors() -> None:
    weight = uneven(64, 128)
    made, plain = fit_matrix(weight, "w4g64af", "hqq"), pack_matrix(weight, "w4g64af")
    off = [(packed.dequantize() - weight).abs().view(64, 2, 64) for packed in (made, plain)]
    assert (off[0].mean(-1) <= off[1].mean(-1) * (1 + 1e-5)).all()
    assert off[0].mean() < 0.97 * off[1].mean()


def test_awq_is_no_worse_than_rounded_to_nearest() -> None:
    for moments in (known(), Statistics(torch.zeros(96).double())):
        weight = uneven()
        losses = [
            ((fit_matrix(weight, "w3g32a+cols", method, moments).dequantize() - weight).square()
            @ moments.moments.float()).sum()
            for method in ("awq", "rtn")
        ]  # fmt: skip
        assert losses[0] <= losses[1] * (1 + 1e-6)
    moments = Statistics(torch.cat([torch.full((4,), 400.0), torch.ones(92)]).double())
    losses = [
        ((fit_matrix(weight, "w3g32a+cols", method, moments).dequantize() - weight).square()
        @ moments.moments.float()).sum()
        for method in ("awq", "rtn")
    ]  # fmt: skip
    assert losses[0] < 0.8 * losses[1]


# ---- what all of them keep -------------------------------------------------------------------


@pytest.mark.parametrize("method", [*COLUMNS, "hqq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_made_matrices_decode_as_they_say(method: str, dtype: torch.dtype) -> None:
    for name in ("w4g32a", "w3g20af+dq", "w2taf"):
        name += "" if method == "hqq" else "+cols"
        weight = uneven(dtype=dtype)
        made = fit_matrix(weight, name, method, known())
        assert (str(made.scheme), made.dtype) == (name, str(dtype).removeprefix("torch."))
        check_decoding(made)
        weights = known().moments.numpy() if method == "awq" else np.ones(96)
        off, plain = (
            (np.square(numbers(packed) - weight.double().numpy()) @ weights).sum()
            for packed in (made, pack_matrix(weight, name))
        )
        assert off < 4 * plain
    if method != "hqq":
        for name in ("nf4g32+cols", "w4g32+cols", "kmeans3+cols"):
            check_decoding(fit_matrix(weight, name, method, known()))


def test_numpy_in_numpy_out() -> None:
    weight = uneven()
    for name, method in (("w4g32a+cols", "sinq"), ("w4g32a+cols", "awq"), ("w4g32af", "hqq")):
        made = fit_matrix(weight.numpy(), name, method, known())
        assert isinstance(made.packed_weights, np.ndarray)
        assert np.array_equal(
            made.dequantize(), fit_matrix(weight, name, method, known()).dequantize()
        )


@pytest.mark.parametrize("method", ["sinq_lsq", "hqq"])
def test_weights_on_a_grid_come_back(method: str) -> None:
    name = "w4g32af" if method == "hqq" else "w4g32af+cols"
    codes = torch.randint(0, 16, (8, 96)).float()
    codes[:, ::32], codes[:, 1::32] = 0, 15
    weight = (codes - 7) * (torch.rand(8, 3) + 0.5).repeat_interleave(32, 1)
    if method == "hqq":
        made = fit_matrix(weight, name, method)
    else:
        made = divided(weight * 2.0, Scheme.parse(name), np.full(96, 2.0), lsq)
        weight = weight * 2.0
    torch.testing.assert_close(made.dequantize(), weight, rtol=1e-5, atol=1e-5)


ODD: dict[str, Any] = {
    "constant": lambda x: x * 0 + 1.5,
    "nearly constant": lambda x: x * 1e-7 + 1.5,
    "zeros": lambda x: x * 0,
    "one outlier": lambda x: torch.where(torch.arange(x.shape[1]) == 3, 1e4, x * 1e-3),
    "denormal": lambda x: x * 1e-40,
    "huge": lambda x: x.clamp(-1, 1) * 3e38,
    "one sign": lambda x: x.abs() + 4,
    "one row": lambda x: x[:1],
    "a dead column": lambda x: x * (torch.arange(x.shape[1]) != 5),
    "float16": lambda x: (x.clamp(-1, 1) * 65504).half(),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("method", [*COLUMNS, "hqq"])
@pytest.mark.filterwarnings("error")
def test_odd_groups_stay_finite(kind: str, method: str) -> None:
    weight = ODD[kind](torch.randn(6, 64))
    for name in ("w4g32a", "w4g32af", "w3g32af+dq"):
        name += "" if method == "hqq" else "+cols"
        made = fit_matrix(weight, name, method, known(64))
        given = made.dequantize(torch.float64)
        plain = pack_matrix(weight, name).dequantize(torch.float64)
        assert given.isfinite().all()
        if made.input_scale is not None:
            assert (made.input_scale > 0).all() and made.input_scale.isfinite().all()
        off, allowed = ((each - weight.double()).abs().sum() for each in (given, plain))
        assert off <= 4 * allowed + 1e-6 * weight.double().abs().sum()


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        ("w4g32a", "sinq", r"scheme w4g32a has no place for multipliers .* use 'w4g32a\+cols'"),
        ("w4g32a", "sinq_lsq", r"use 'w4g32a\+cols'"),
        ("w4g32a", "awq", r"use 'w4g32a\+cols'"),
        ("w4g32", "hqq", r"looks for zero points, and scheme w4g32 has none"),
    ],
)
def test_schemes_that_cannot_hold_it_are_refused(name: str, method: str, message: str) -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 4))
    before = list(model)
    with pytest.raises(ValueError, match=message):
        quantize_model(model, f"{name}:{method}", statistics=calibrate(model, [torch.randn(9, 64)]))
    assert list(model) == before
    with pytest.raises(ValueError, match="awq needs moments"):
        fit_matrix(torch.ones(2, 8), "w4+cols", "awq")


@pytest.mark.parametrize("method", [*COLUMNS, "hqq"])
def test_saved_models_are_the_same(method: str, tmp_path: Any) -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)).to(torch.bfloat16)
    statistics = calibrate(model, [torch.randn(9, 64).bfloat16()])
    recipe = f"w4g32af+dq:{method}" if method == "hqq" else f"w4g32af+dq+cols:{method}"
    quantize_model(model, recipe, statistics=statistics)
    save_quantized(model, tmp_path / "saved")
    fresh = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    again = load_quantized(tmp_path / "saved", fresh, verify=True)
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(again(x), model(x))
    assert all(same(again[i].packed(), model[i].packed()) for i in (0, 2))


@pytest.mark.parametrize("recipe", ["w4g32a+cols:sinq", "w3g32af+dq+cols:sinq_lsq", "w4g32af:hqq"])
def test_streamed_layers_have_the_bits_of_those_in_memory(
    recipe: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(float_source, "_BLOCK_BYTES", 4096)  # blocks of a few rows
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    quantize_checkpoint(tmp_path / "model.safetensors", tmp_path / "small", recipe)
    again = load_quantized(tmp_path / "small", nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64)))
    quantize_model(model, recipe)
    assert all(same(one.packed(), other.packed()) for one, other in zip(again, model, strict=True))
