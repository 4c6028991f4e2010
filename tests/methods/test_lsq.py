"""lsq: never worse than rounding to nearest on any group, exact on grids, sane on odd groups."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from quantization import PackedWeights, Scheme, Statistics, fit_matrix, pack_matrix
from quantization.methods.lsq import lsq
from tests.packed_oracle import numbers
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

SCHEMES = [
    *("w1g16a", "w2g16a", "w3g32a", "w4g32a", "w8g32a", "w4ta", "w3g7a+dq", "w4g64a+f16"),
    *("w2g32", "w3g64", "w4", "w8", "w4t", "w4g32+dq"),
    *("w2g16af", "w4g32af", "w3taf", "w4g32af+dq", "w2g32af+dq", "w4g32af+dqs"),
    *("nf4g32", "nf4g16+dq", "fp4g32", "mxfp4", "kmeans3", "kmeans2r", "kmeans3g16"),
    *("binaryg32", "ternaryg16"),
]


def weights(rng: np.random.Generator, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    rows = rng.standard_t(4, shape) * 10.0 ** rng.uniform(-2, 1, (shape[0], 1))
    return torch.from_numpy(rows).to(dtype)


def errors(packed: PackedWeights, weight: torch.Tensor, moments: np.ndarray) -> np.ndarray:
    """Weighted squared errors by group, in float64 from the stored bytes."""
    off = moments * np.square(numbers(packed) - weight.double().numpy())
    group = packed.scheme.group(weight.shape[1])
    if packed.scheme.granularity.__class__.__name__ == "_PerTensor" or "t" in str(packed.scheme):
        return off.sum(keepdims=True)
    cut = np.add.reduceat(off, np.arange(0, off.shape[1], group), axis=1)
    return cut


@pytest.mark.parametrize("name", SCHEMES)
def test_no_group_is_worse_than_rounded_to_nearest(name: str, rng: np.random.Generator) -> None:
    scheme = Scheme.parse(name)
    known = Statistics(torch.from_numpy(rng.exponential(size=100) ** 2))
    for dtype in (torch.float32, torch.float16):
        for statistics in (None, known):
            weight = weights(rng, (19, 100), dtype)
            moments = np.ones(100) if statistics is None else known.moments.numpy()
            made = lsq(weight, scheme, statistics)
            plain = fit_matrix(weight, scheme, "rtn", statistics)
            ours, theirs = errors(made, weight, moments), errors(plain, weight, moments)
            size = errors(plain, weight * 0, moments)
            assert (ours <= theirs * (1 + 1e-4) + 1e-6 * size).all()
            assert made.dtype == plain.dtype and made.nbytes == plain.nbytes


@pytest.mark.parametrize(
    ("name", "share"),
    [("w2g32a", 0.75), ("w3g32", 0.75), ("w4g32af+dq", 0.85), ("nf4g32", 0.9), ("w4g32a", 0.97)],
)
def test_gains_what_it_should(name: str, share: float, rng: np.random.Generator) -> None:
    weight = torch.from_numpy(rng.standard_normal((64, 256)))
    made, plain = (fit_matrix(weight, name, method) for method in ("lsq", "rtn"))
    ones = np.ones(256)
    assert errors(made, weight, ones).sum() < share * errors(plain, weight, ones).sum()


@pytest.mark.parametrize("name", ["w4g32a", "w3g32", "w4g32af", "w4g32af+dq", "nf4g32", "w2g32a"])
def test_weights_on_a_grid_come_back(name: str, rng: np.random.Generator) -> None:
    scheme = Scheme.parse(name)
    start = pack_matrix(torch.from_numpy(rng.standard_normal((8, 96))).float(), scheme)
    weight = start.dequantize()
    again = lsq(weight, scheme).dequantize()
    largest = weight.abs().max().item()
    # under double quantization the steps are rounded anew, to 8 bits of precision
    allowed = largest * (2.0**-8 if scheme.double_quant else 2.0**-22)
    assert (again - weight).abs().max().item() <= allowed


ODD: dict[str, Any] = {
    "constant": lambda x: x * 0 + 1.5,
    "zeros": lambda x: x * 0,
    "one outlier": lambda x: torch.where(torch.arange(x.shape[1]) == 3, 1e4, x * 1e-3),
    "denormal": lambda x: x * 1e-40,
    "huge": lambda x: x.clamp(-1, 1) * 3e38,
    "one sign": lambda x: x.abs() + 4,
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", ["w4g32a", "w3g32", "w4g32af", "w4g32af+dq", "nf4g32", "mxfp4"])
def test_odd_groups_stay_finite_and_no_worse(
    name: str, kind: str, rng: np.random.Generator
) -> None:
    weight = ODD[kind](torch.from_numpy(rng.standard_normal((5, 64))).float())
    if kind == "huge" and name == "mxfp4":
        pytest.skip("beyond E8M0 times 6")
    made, plain = lsq(weight, Scheme.parse(name)), pack_matrix(weight, name)
    given, rounded = made.dequantize(torch.float64), plain.dequantize(torch.float64)
    assert given.isfinite().all()
    ours, theirs = ((w - weight.double()).square().sum() for w in (given, rounded))
    assert ours <= theirs * (1 + 1e-4) + 1e-12 * weight.double().square().sum()


def test_float16_weights_near_the_largest(rng: np.random.Generator) -> None:
    weight = (torch.from_numpy(rng.uniform(-1, 1, (4, 64))) * 65504).half()
    for name in ("w4g32a", "w3g32", "w4g32af+dq", "nf4g32"):
        assert lsq(weight, Scheme.parse(name)).dequantize().isfinite().all()


def test_columns_that_count_more_lose_less(rng: np.random.Generator) -> None:
    weight = torch.from_numpy(rng.standard_normal((32, 64))).float()
    moments = torch.ones(64, dtype=torch.float64)
    moments[::8] = 100
    off = (lsq(weight, Scheme.parse("w3g32a"), Statistics(moments)).dequantize() - weight).square()
    even = (lsq(weight, Scheme.parse("w3g32a")).dequantize() - weight).square()
    assert off[:, ::8].mean() < 0.5 * even[:, ::8].mean()


def test_numpy_in_numpy_out(rng: np.random.Generator) -> None:
    weight = rng.standard_normal((4, 64)).astype("float32")
    made = lsq(weight, Scheme.parse("w4g32a"))
    again = lsq(torch.from_numpy(weight), Scheme.parse("w4g32a"))
    assert isinstance(made.scales, np.ndarray)
    assert np.array_equal(made.dequantize(), again.dequantize().numpy())
