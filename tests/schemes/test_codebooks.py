"""Tables of levels against what was published, and fitted levels against an oracle."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from quantization.schemes import codebooks
from quantization.schemes.codebooks import E2M1, FP4, NF4, fit_codebook, fit_ternary
from tests import codebook_oracle as oracle
from tests.oracle import nearest, numbers
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

# ---- tables ------------------------------------------------------------------------------------


def test_nf4_is_made_of_normal_quantiles() -> None:
    """The construction of QLoRA: 8 and 9 quantiles of either side, zero once, the ends at 1."""
    statistics = pytest.importorskip("statistics")
    quantile = statistics.NormalDist().inv_cdf
    offset = (1 - 1 / (2 * 15) + 1 - 1 / (2 * 16)) / 2
    upper = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    lower = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    levels = np.sort([*upper, 0.0, *lower])
    assert np.allclose(NF4, levels / levels.max(), atol=2e-6)
    assert NF4[7] == 0 and NF4[0] == -1 and NF4[15] == 1 and list(NF4) == sorted(NF4)


def test_the_published_bytes_of_the_tables() -> None:
    """As float32; a change here would make every stored matrix mean something else."""
    assert np.array(NF4, "<f4").tobytes().hex() == (
        "000080bfb13932bf306b06bfa032cabe4da291be3f353dbe7178babd00000000"
        "fffaa23de3ca243edd047c3e3a03ad3eb8a4e13eab07103fb313393f0000803f"
    )
    assert FP4[:8] == pytest.approx([0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4])
    assert E2M1[:8] == (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    for table in (FP4, E2M1):
        assert table[8:] == tuple(-level for level in table[:8])
        assert np.signbit(table[8])


def test_e2m1_is_what_its_bits_say() -> None:
    for code, level in enumerate(E2M1):
        sign, exponent, mantissa = -1 if code & 8 else 1, code >> 1 & 3, code & 1
        value = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
        assert level == sign * value


def test_tables_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for name, table in (("nf4", NF4), ("fp4", FP4)):
        theirs = functional.get_4bit_type(name, device="cpu").numpy()
        assert np.array_equal(theirs, np.array(table, "float32")), name


def test_e2m1_is_the_table_of_gguf() -> None:
    quants = pytest.importorskip("gguf.quants")
    doubled = np.array(quants.MXFP4.kvalues)  # with scales of half the size
    assert np.array_equal(doubled, 2 * np.array(E2M1))


# ---- k-means -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_rows_are_fitted_exactly(bits: int, dtype: str, rng: np.random.Generator) -> None:
    values = rng.standard_normal((5, 9)).astype(dtype)
    weights = rng.exponential(size=9)
    for given in (None, weights, np.broadcast_to(weights, values.shape)):
        levels = fit_codebook(values, bits, given)
        assert levels.shape == (5, 2**bits) and levels.dtype == np.float64
        for x, row in zip(values.astype("float64"), levels, strict=True):
            w = np.ones(9) if given is None else weights
            best = oracle.least_error(x, 2**bits, w)
            assert oracle.squared_error(x, row, w) <= best + 1e-12


@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
def test_gathered_rows_are_nearly_as_good(
    weighted: bool, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that is too long, here one of 5000 numbers: within a millionth of the best error."""
    values = rng.standard_t(2, (2, 5000)).astype("float32")
    weights = rng.exponential(size=values.shape) if weighted else None
    exact = fit_codebook(values, 4, weights)
    monkeypatch.setattr(codebooks, "_EXACT", 100)
    monkeypatch.setattr(codebooks, "_AT_ONCE", 999)
    gathered = fit_codebook(values, 4, weights)
    for row, x in enumerate(values.astype("float64")):
        w = np.ones(5000) if weights is None else weights[row]
        best = oracle.squared_error(x, exact[row], w)
        assert oracle.squared_error(x, gathered[row], w) <= best * (1 + 1e-6)
    assert np.array_equal(fit_codebook(values, 4, np.zeros(5000)), fit_codebook(values, 4))


def test_gathered_cells_keep_weight_and_moment(rng: np.random.Generator) -> None:
    values, weights = rng.standard_normal(3000).astype("float32"), rng.exponential(size=3000)
    means, sums = codebooks._gathered(values, weights)
    assert means.shape == sums.shape and means.shape[0] == 1
    assert sums.sum() == pytest.approx(weights.sum())
    assert (means * sums).sum() == pytest.approx((weights * values).sum())


def test_refusals() -> None:
    for bits in (0, 9):
        with pytest.raises(
            ValueError, match=rf"bits 1\.\.8 are needed, not shape \(1, 4\) and {bits}"
        ):
            fit_codebook(np.ones((1, 4)), bits)
    with pytest.raises(ValueError, match=r"values \[rows, count\] .* not shape \(4,\) and 2"):
        fit_codebook(np.ones(4), 2)
    with pytest.raises(TypeError, match=r"bits must be an integer, not 2\.0"):
        fit_codebook(np.ones((1, 4)), 2.0)  # type: ignore[arg-type]


# ---- ternary -----------------------------------------------------------------------------------


def best_ternary_error(x: np.ndarray, weights: np.ndarray) -> float:
    """The least squared error over all ways to give each number -1, 0 or 1, and any scale."""
    best = (weights * x**2).sum()
    for signs in itertools.product((-1, 0, 1), repeat=x.size):
        code = np.array(signs)
        if (weights * code**2).sum() > 0:
            scale = (weights * code * x).sum() / (weights * code**2).sum()
            best = min(best, (weights * (x - scale * code) ** 2).sum())
    return float(best)


@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
def test_the_ternary_scale_is_the_best(weighted: bool, rng: np.random.Generator) -> None:
    for size in (1, 2, 5, 7):
        x = rng.standard_normal((4, size)) * rng.integers(0, 3, (4, size))
        weights = rng.exponential(size=size) if weighted else None
        scales = fit_ternary(np.abs(x), weights)
        for row, scale in zip(x, scales, strict=True):
            w = np.ones(size) if weights is None else weights
            code = np.sign(row) * (np.abs(row) > scale / 2)
            error = (w * (row - scale * code) ** 2).sum()
            assert error <= best_ternary_error(row, w) + 1e-12


def test_ternary_padding_and_zeros_do_no_harm(rng: np.random.Generator) -> None:
    size = np.abs(rng.standard_normal((3, 2, 10)))
    padded = np.pad(size, ((0, 0), (0, 0), (0, 6)))
    assert fit_ternary(size).shape == (3, 2)
    assert np.array_equal(fit_ternary(padded), fit_ternary(size))
    weights = np.pad(rng.exponential(size=10), (0, 6))
    assert np.allclose(fit_ternary(padded, weights), fit_ternary(size, weights[:10]), rtol=1e-14)
    assert np.array_equal(fit_ternary(np.zeros((2, 4))), [0, 0])
    weights[:5] = 0  # the largest may count nothing
    assert np.allclose(fit_ternary(size, weights[:10]), fit_ternary(size[..., 5:], weights[5:10]))


def test_levels_survive_narrow_types() -> None:
    """Rounded to float16 or bfloat16, a table still has sixteen (fifteen) levels, in order."""
    for name in ("float16", "bfloat16"):
        for table in (NF4, FP4, E2M1):
            rounded = numbers(nearest(np.array(table), name), name)
            assert np.unique(rounded).size == np.unique(table).size
