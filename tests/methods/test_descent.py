"""gptq and descent: losses in the full Hessian, against brute force, on every kind of scheme."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from quantization import (
    PackedWeights,
    Scheme,
    Statistics,
    active_isa,
    isas,
    pack_matrix,
    set_isa,
    set_num_threads,
)
from quantization.methods.gptq import descent, gptq
from quantization.methods.lsq import lsq
from tests.packed_oracle import numbers, read
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

SCHEMES = [
    *("w1g16a", "w2g16a", "w4g32a", "w8g32a", "w4ta", "w3g7a+dq", "w4g64a+f16"),
    *("w3g64", "w4", "w8", "w4t", "w4g32+dq"),
    *("w2g16af", "w3taf", "w4g32af+dq", "w4g32af+dqs"),
    *("nf4g32", "fp4g16+dq", "mxfp4", "kmeans3", "kmeans2r"),
    *("binaryg32", "ternaryg16"),
]


def coupled(rng: np.random.Generator, cols: int, rows: int = 400) -> torch.Tensor:
    """Inputs whose columns go together, some far larger than others."""
    mix = rng.standard_normal((cols, cols)) * 0.3 + rng.standard_normal(
        (cols, 2)
    ) @ rng.standard_normal((2, cols))
    return torch.from_numpy(
        rng.standard_normal((rows, cols)) @ mix * np.exp(rng.standard_normal(cols))
    )


def losses(
    packed: PackedWeights, weight: torch.Tensor, known: Statistics, damping: float
) -> np.ndarray:
    """``d H d^T`` of each row, in float64 from the stored bytes."""
    hessian: Any = known.hessian
    hessian = hessian / hessian.diagonal().mean() + damping * torch.eye(len(hessian))
    off = numbers(packed) - weight.double().numpy()
    return np.einsum("ri,ij,rj->r", off, hessian.numpy(), off)


@pytest.mark.parametrize("name", SCHEMES)
def test_each_step_loses_less(name: str, rng: np.random.Generator) -> None:
    scheme, damping = Scheme.parse(name), 0.05
    known = Statistics.of(coupled(rng, 64), hessian=True)
    for dtype in (torch.float32, torch.float16):
        weight = torch.from_numpy(rng.standard_normal((9, 64))).to(dtype)
        fitted = losses(lsq(weight, scheme, known), weight, known, damping)
        greedy = losses(gptq(weight, scheme, known, damping=damping), weight, known, damping)
        one, four = (
            losses(
                descent(weight, scheme, known, damping=damping, sweeps=n), weight, known, damping
            )
            for n in (1, 4)
        )
        assert greedy.sum() < fitted.sum()
        assert (one <= greedy * 1.001 + 1e-6).all() and (four <= one * 1.001 + 1e-6).all()
        made = descent(weight, scheme, known)
        assert made.nbytes == pack_matrix(weight, scheme).nbytes and made.dtype == str(dtype)[6:]


@pytest.mark.parametrize("name", ["w2", "w2a", "kmeans2r", "binary"])
def test_against_brute_force_on_six_weights(name: str, rng: np.random.Generator) -> None:
    """Under the scales it ends with no code alone can be bettered, and it is near the best."""
    scheme, ratios = Scheme.parse(name), []
    for _ in range(12):
        known = Statistics.of(coupled(rng, 6), hessian=True)
        weight = torch.from_numpy(rng.standard_normal((1, 6))).float()
        made = descent(weight, scheme, known, damping=0.01, sweeps=20)
        hessian: Any = known.hessian
        hessian = (hessian / hessian.diagonal().mean() + 0.01 * torch.eye(6)).numpy()
        parts = read(made)
        levels = (
            np.unique(parts.level) if made.codebook is None else made.codebook[0].double().numpy()
        )
        if made.codebook is None:
            levels = np.arange(-2, 2) if scheme.mode.value == "symmetric" else np.arange(4)
        every = np.array(list(itertools.product(levels, repeat=6)))
        off = (every - parts.zero) * parts.scale - weight.double().numpy()
        loss = np.einsum("ri,ij,rj->r", off, hessian, off)
        off = numbers(made) - weight.double().numpy()
        found = float(np.einsum("ri,ij,rj->r", off, hessian, off)[0])
        single = (every != parts.level).sum(axis=1) <= 1
        assert found <= loss[single].min() * (1 + 1e-4) + 1e-9
        ratios.append(found / loss.min())
    assert np.median(ratios) < 1.2


def test_weights_on_a_grid_stay(rng: np.random.Generator) -> None:
    known = Statistics.of(coupled(rng, 64), hessian=True)
    for name in ("w4g32a", "w3g32", "nf4g32"):
        weight = pack_matrix(
            torch.from_numpy(rng.standard_normal((4, 64))).float(), name
        ).dequantize()
        for method in (gptq, descent):
            made = method(weight, Scheme.parse(name), known).dequantize()
            assert (made - weight).abs().max() <= 1e-5 * weight.abs().max()


@pytest.mark.parametrize("name", ["w4g32a", "w3g32", "w4g32af+dq", "nf4g32"])
def test_odd_groups_and_dead_columns(name: str, rng: np.random.Generator) -> None:
    inputs = coupled(rng, 64)
    inputs[:, 5] = 0
    known = Statistics.of(inputs, hessian=True)
    base = torch.from_numpy(rng.standard_normal((5, 64))).float()
    outlier = base * 1e-3
    outlier[:, 3] = 1e4
    for weight in (base * 0, base * 0 + 1.5, outlier, base * 1e-30, base.abs() + 4):
        for method in (gptq, descent):
            given = method(weight, Scheme.parse(name), known).dequantize(torch.float64)
            assert given.isfinite().all()
            assert (given - weight).abs().max() <= 2 * weight.abs().max()
    half = (base.clamp(-1, 1) * 65504).half()
    assert descent(half, Scheme.parse(name), known).dequantize().isfinite().all()


def test_a_hessian_that_is_not_positive_definite_is_damped_and_said_so() -> None:
    hessian = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    known = Statistics(torch.ones(2, dtype=torch.float64), hessian)
    with pytest.warns(UserWarning, match="not positive definite under a damping of 0.01"):
        made = gptq(torch.tensor([[0.3, 1.0]]), Scheme.parse("w4"), known)
    assert made.dequantize().isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zero = Statistics(torch.zeros(2).double(), torch.zeros(2, 2).double())
        assert descent(torch.ones(1, 2), Scheme.parse("w4"), zero).dequantize().isfinite().all()


@pytest.mark.parametrize("method", [gptq, descent])
def test_without_a_hessian_it_is_refused(method: Any) -> None:
    for known in (None, Statistics(torch.ones(8).double())):
        with pytest.raises(ValueError, match="needs the Hessian of the layer's inputs: calibrate"):
            method(torch.ones(2, 8), Scheme.parse("w4"), known)
    known = Statistics.of(torch.ones(2, 8), hessian=True)
    with pytest.raises(ValueError, match="damping must be above 0, not 0"):
        method(torch.ones(2, 8), Scheme.parse("w4"), known, damping=0)


def test_every_instruction_set_and_thread_count_gives_the_same_codes(
    rng: np.random.Generator,
) -> None:
    known = Statistics.of(coupled(rng, 70), hessian=True)
    weight = torch.from_numpy(rng.standard_normal((33, 70))).float()
    active, made = active_isa(), []
    try:
        for isa, threads in itertools.product(isas(), (1, 2)):
            set_isa(isa)
            set_num_threads(threads)
            made.append(descent(weight, Scheme.parse("w3g32af+dq"), known))
    finally:
        set_isa(active)
        set_num_threads(None)
    for other in made[1:]:
        assert torch.equal(made[0].packed_weights, other.packed_weights)
        assert torch.equal(made[0].scales, other.scales)
