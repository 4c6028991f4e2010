"""Grids that are not evenly spaced, and scales that are not plain: by an oracle, and by peers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from quantization import Granularity, Mode, Scheme, pack_matrix
from quantization.schemes.codebooks import E2M1, FP4, NF4
from tests.codebook_oracle import least_error_of_many, squared_error
from tests.oracle import Spec, nearest, numbers as decoded, scale_and_zero
from tests.packed_calls import ALL, DTYPES, check_decoding, matrix, same
from tests.packed_oracle import array_of, numbers, read
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

torch = pytest.importorskip("torch")
hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

SHAPES = [(1, 1), (3, 7), (2, 129), (4, 100)]
OTHERS = [name for name in ALL if name not in ("w8", "w4g64a", "w3g7", "w5t", "w2ta")]
LEVELS = [name for name in OTHERS if Scheme.parse(name).has_codebook]


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Float64 numbers rounded to a type, subnormals kept above 0."""
    return decoded(nearest(values, dtype), dtype)


def blocks(x: np.ndarray, scheme: Scheme) -> list[tuple[tuple[int, int], np.ndarray]]:
    """Places of the scales and the weights that share each, per tensor those of all rows."""
    if scheme.granularity is Granularity.PerTensor:
        return [((row, 0), x.reshape(-1)) for row in range(x.shape[0])]
    group = scheme.group(x.shape[1])
    places = np.ndindex(x.shape[0], scheme.groups(x.shape[1]))
    return [((n, g), x[n, g * group : (g + 1) * group]) for n, g in places]


# ---- every scheme ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OTHERS)
def test_the_bytes_say_what_dequantize_gives(name: str, rng: np.random.Generator) -> None:
    for shape in SHAPES:
        for dtype in DTYPES:
            packed = pack_matrix(matrix(rng, shape, dtype), name)
            assert packed.shape == shape and packed.dtype == dtype
            check_decoding(packed)


@pytest.mark.parametrize("name", LEVELS)
def test_every_weight_has_the_nearest_level(name: str, rng: np.random.Generator) -> None:
    """Exactly: products of float32 numbers have no rounding error in float64."""
    for shape in SHAPES:
        for dtype in DTYPES:
            weight = matrix(rng, shape, dtype)
            packed = pack_matrix(weight, name)
            x, found = weight.float().double().numpy(), read(packed)
            books = np.broadcast_to(array_of(packed.codebook), (shape[0], 2**packed.scheme.bits))
            products = (
                books[:, None, :] * found.scale.astype("float32").astype("float64")[..., None]
            )
            apart = np.abs(x[..., None] - products)
            chosen = np.take_along_axis(apart, found.codes[..., None], axis=-1)[..., 0]
            assert (chosen == apart.min(axis=-1)).all()
            if packed.scheme.grid != "binary":  # there 0 has the code of +1, as int1 codes do
                assert np.array_equal(found.codes, apart.argmin(axis=-1))


@pytest.mark.parametrize("name", ALL)
def test_a_group_of_zeros_stays_zero(name: str) -> None:
    weight = torch.zeros(3, 40)
    assert torch.equal(pack_matrix(weight, name).dequantize(), weight)
    weight[1] = torch.linspace(-1, 2, 40)
    back = pack_matrix(weight, name).dequantize()
    if Scheme.parse(name).granularity is not Granularity.PerTensor:
        assert torch.equal(back[0], weight[0])


@pytest.mark.parametrize("name", [name for name in ALL if "af" not in name])
def test_sizes_of_weights_do_not_matter(name: str, rng: np.random.Generator) -> None:
    """Scaling by a power of two scales the result, in the middle of the range and near its ends."""
    weight = (
        matrix(rng, (3, 50)).abs().clamp(1e-2, 1e2)
        * torch.from_numpy(rng.choice([-1.0, 1.0], (3, 50))).float()
    )
    packed = pack_matrix(weight, name)
    for exponent in (-100, 60, 110):
        scaled = pack_matrix(weight * 2.0**exponent, name)
        expected = packed.dequantize(torch.float64) * 2.0**exponent
        assert torch.allclose(scaled.dequantize(torch.float64), expected, rtol=1e-6, atol=0)


# ---- scales ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["nf4", "nf4r", "nf4t", "fp4g7", "kmeans2g7", "kmeans4", "kmeans3r"]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_are_the_largest_magnitudes(name: str, dtype: str, rng: np.random.Generator) -> None:
    for shape in SHAPES:
        weight = matrix(rng, shape, dtype)
        packed = pack_matrix(weight, name)
        for place, block in blocks(weight.double().numpy(), packed.scheme):
            expected = rounded(np.abs(block).max(keepdims=True), dtype)
            assert array_of(packed.scales)[place] == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_binary_is_int1_of_quantize_linear(dtype: str, rng: np.random.Generator) -> None:
    from quantization import quantize_linear

    for name in ("binary", "binaryg7", "binaryt"):
        weight = matrix(rng, (4, 33), dtype)
        scheme = Scheme.parse(name)
        codes, params = quantize_linear(
            weight, "int1", scheme.granularity, scale_dtype=weight.dtype
        )
        packed = pack_matrix(weight, scheme)
        assert np.array_equal(read(packed).level, codes.numpy())
        expected = np.broadcast_to(params.scale.double().numpy(), packed.scales.shape)
        assert np.array_equal(array_of(packed.scales), expected)


@pytest.mark.parametrize("name", ["ternary", "ternaryg7", "ternaryt"])
@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
def test_ternary_has_the_least_error(name: str, weighted: bool, rng: np.random.Generator) -> None:
    """Against every threshold that parts the magnitudes, with its best scale."""
    weight = matrix(rng, (3, 24))
    importance = rng.exponential(size=24) if weighted else np.ones(24)
    packed = pack_matrix(
        weight, name, importance=torch.from_numpy(importance) if weighted else None
    )
    x, back = weight.double().numpy(), numbers(packed)
    weights = np.broadcast_to(importance, x.shape)
    groups = zip(
        blocks(x, packed.scheme),
        blocks(weights, packed.scheme),
        blocks(back, packed.scheme),
        strict=True,
    )
    for (_, block), (_, w), (_, given) in groups:
        best = (w * block**2).sum()
        for threshold in np.abs(block):
            code = np.sign(block) * (np.abs(block) >= threshold)
            if code.any():
                scale = (w * code * block).sum() / (w * code**2).sum()
                best = min(best, (w * (block - scale * code) ** 2).sum())
        assert (w * (block - given) ** 2).sum() <= best * (1 + 1e-6) + 1e-30


def test_mx_scales_are_powers_of_two(rng: np.random.Generator) -> None:
    weight = matrix(rng, (5, 70)) * torch.from_numpy(2.0 ** rng.integers(-20, 20, (5, 70)))
    packed = pack_matrix(weight, "mxfp4")
    assert packed.scales.dtype == torch.uint8 and packed.scales.shape == (5, 3)
    for place, block in blocks(weight.double().numpy(), packed.scheme):
        largest = np.abs(block).max()
        expected = math.floor(math.log2(largest)) - 2 + 127 if largest else 127
        assert packed.scales[place] == expected


def test_mx_scales_stay_within_their_byte() -> None:
    for size, expected in ((2.0**-149, 0), (2.0**-125, 0), (2.0**-124, 1), (2.0**127, 252)):
        packed = pack_matrix(torch.full((1, 1), size, dtype=torch.float64), "mxfp4")
        assert packed.scales.item() == expected
        assert packed.dequantize().item() <= size * 1.0001


# ---- k-means -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kmeans2", "kmeans3r", "kmeans4r", "kmeans2g7", "kmeans3g16+dq"])
@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
def test_kmeans_has_the_least_error(name: str, weighted: bool, rng: np.random.Generator) -> None:
    """Levels times scales come as near to the weights as any levels under these scales."""
    weight = matrix(rng, (3, 40))
    importance = rng.exponential(size=40) if weighted else np.ones(40)
    packed = pack_matrix(
        weight, name, importance=torch.from_numpy(importance) if weighted else None
    )
    x, scale = weight.double().numpy(), read(packed).scale
    share = np.divide(x, scale, out=np.zeros_like(x), where=scale > 0)
    books = array_of(packed.codebook)
    rows = [slice(n, n + 1) for n in range(3)] if "r" in name else [slice(None)]
    for row, book in zip(rows, books, strict=True):
        w = (scale[row] ** 2 * importance).reshape(-1)
        best = least_error_of_many(share[row].reshape(-1), book.size, w)
        total = (w * share[row].reshape(-1) ** 2).sum()
        given = squared_error(share[row].reshape(-1), book, w)
        assert given <= best * (1 + 1e-5) + total * 1e-12


def test_importance_takes_error_away_from_what_matters(rng: np.random.Generator) -> None:
    weight = torch.from_numpy(rng.standard_normal((16, 64)))
    importance = torch.full((64,), 0.01)
    importance[:8] = 1
    for name in ("kmeans2", "kmeans2r", "kmeans2g16", "ternary", "binary", "ternaryg32"):
        plain = numbers(pack_matrix(weight, name)) - weight.numpy()
        weighed = numbers(pack_matrix(weight, name, importance=importance)) - weight.numpy()
        assert (weighed[:, :8] ** 2).sum() < (plain[:, :8] ** 2).sum()
        assert (weighed**2 * importance.numpy()).sum() < (plain**2 * importance.numpy()).sum()


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith(("k", "b", "t"))])
def test_importance_of_one_kind_changes_nothing(name: str, rng: np.random.Generator) -> None:
    weight = matrix(rng, (3, 50))
    plain = pack_matrix(weight, name).dequantize()
    for importance in (torch.ones(50), torch.zeros(50), np.full(50, 3.0)):
        weighed = pack_matrix(weight, name, importance=importance).dequantize()
        assert torch.allclose(weighed, plain, rtol=1e-6)


@pytest.mark.parametrize(
    ("importance", "error", "message"),
    [
        (torch.ones(4), ValueError, r"importance has shape \(4,\); one a column is \(5,\)"),
        (torch.ones(1, 5), ValueError, r"importance has shape \(1, 5\); one a column is \(5,\)"),
        (
            torch.tensor([1, 1, 1, 1, -1.0]),
            ValueError,
            "importance must be finite and not negative",
        ),
        (torch.tensor([1, 1, 1, 1, np.nan]), ValueError, "importance must be finite and not neg"),
        ([1, 1, 1, 1, 1], TypeError, r"importance must be a torch.Tensor or ndarray, not list"),
    ],
)
def test_importance_that_does_not_fit(importance: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        pack_matrix(torch.ones(3, 5), "ternary", importance=importance)
    with pytest.raises(ValueError, match="scheme nf4g64 makes no choice that importance could wei"):
        pack_matrix(torch.ones(3, 5), "nf4", importance=torch.ones(5))


# ---- double quantization and float zero points -------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ALL if "+dq" in name])
def test_double_quantized_scales(name: str, rng: np.random.Generator) -> None:
    weight = matrix(rng, (4, 100))
    packed = pack_matrix(weight, name)
    plain = pack_matrix(weight, name.partition("+")[0] + "+f32")
    exact, codes = array_of(plain.scales), packed.scales.numpy()
    zero = np.zeros(codes.shape, bool)
    for place, block in blocks(weight.numpy(), packed.scheme):
        zero[place] = not block.any()
    steps = np.where(zero, 0, exact).max(axis=1) / 255
    kept = getattr(torch, packed.scheme.steps_dtype)
    assert packed.scales.dtype == torch.uint8 and packed.scale_steps.dtype == kept
    found = array_of(packed.scale_steps)
    assert np.allclose(found, steps, rtol=1e-6 if kept == torch.float32 else 2.0**-8)
    steps = found
    assert (codes[zero] == 0).all() and (codes[~zero] >= 1).all()
    apart = np.abs(np.where(zero, 0, exact) - codes * steps[:, None])
    assert (apart <= np.maximum(0.5, codes == 1) * steps[:, None] * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_zero_points_in_fixed_point_are_the_nearest(bits: int, rng: np.random.Generator) -> None:
    weight = matrix(rng, (6, 64))
    packed = pack_matrix(weight, f"w{bits}g16af+dq")
    exact = read(pack_matrix(weight, f"w{bits}g16af+dqs")).zero
    assert packed.zero_points.dtype == torch.int8
    found, step = read(packed).zero, 2.0 ** (bits - 8)
    scaled = read(packed).scale > 0
    assert (found == np.rint(found / step) * step).all()
    # under a step of 8 bits of precision the scales, and so the exact zeros, are a little apart
    near = np.abs(found - exact.clip(0, 2**bits - step)) <= step / 2 + exact / 100
    assert near[scaled].all()


@pytest.mark.parametrize("name", ["w3g7af", "w4taf", "w8raf", "w1g9af", "w2g16af+f32"])
def test_float_zero_points_meet_the_ends_of_the_range(name: str, rng: np.random.Generator) -> None:
    for shape in SHAPES:
        for dtype in DTYPES:
            weight = matrix(rng, shape, dtype)
            packed = pack_matrix(weight, name)
            x, found = weight.double().numpy(), read(packed)
            top = 2**packed.scheme.bits - 1
            for place, block in blocks(x, packed.scheme):
                kept = packed.scheme.scale_dtype or dtype
                spec = Spec(dtype, "uint8", "asymmetric", 0, top, kept)
                scale = array_of(packed.scales)[place]
                assert scale == scale_and_zero(block, spec)[0]
                zero = rounded(np.array([-min(block.min(), 0) / scale]), dtype)[0]
                assert array_of(packed.zero_points)[place] == pytest.approx(zero, rel=2e-7)
            code = np.clip(np.rint(x / found.scale + found.zero), 0, top)
            assert np.abs(code - found.codes).max() <= 1
            assert np.mean(code != found.codes) < 0.01  # where float32 rounds across a half


def test_float_zero_points_have_less_error_than_integer_ones(rng: np.random.Generator) -> None:
    weight = torch.from_numpy(rng.standard_normal((32, 256)) + 0.3)
    float_error, integer_error = (
        ((numbers(pack_matrix(weight, name)) - weight.numpy()) ** 2).sum()
        for name in ("w3g32af", "w3g32a")
    )
    assert float_error < integer_error


# ---- refusals and marks ------------------------------------------------------------------------


def test_scales_beyond_their_type(rng: np.random.Generator) -> None:
    large = torch.full((2, 8), 1e6)
    for name in ("nf4", "binary", "ternary", "kmeans2"):
        message = r"a scale of 1e\+06 is beyond the largest number of its type, float16 \(65504\)"
        with pytest.raises(ValueError, match=message):
            pack_matrix(large, name + "+f16")
    huge = torch.full((2, 8), 1e300, dtype=torch.float64)
    for name in ALL:
        with pytest.raises(ValueError, match="a scale is beyond the largest number of"):
            pack_matrix(huge, name)


def test_tiny_weights_keep_a_scale() -> None:
    """A scale that float16 would round to 0 becomes its smallest number."""
    tiny = torch.full((1, 8), 1e-9)
    for name in ("nf4", "binary", "ternary", "kmeans2", "fp4"):
        assert pack_matrix(tiny, name + "+f16").scales.item() == 2.0**-24
        assert torch.equal(pack_matrix(tiny, name + "+f32").dequantize(), tiny)


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(
    st.integers(0, 2**32),
    st.tuples(st.integers(0, 9), st.integers(0, 140)),
    st.sampled_from(ALL),
    st.sampled_from(list(DTYPES)),
    st.integers(1, 150),
    st.booleans(),
)
def test_any_matrix(
    seed: int, shape: tuple[int, int], name: str, dtype: str, group: int, marked: bool
) -> None:
    """Sizes, numbers and the error bound hold for every scheme, group, shape and dtype."""
    rng = np.random.default_rng(seed)
    scheme = Scheme.parse(name)
    if scheme.is_grouped and scheme.grid != "mxfp4":
        scheme = Scheme.parse(name.replace(f"g{scheme.granularity.by}", f"g{group}"))
    weight = matrix(rng, shape, dtype) if 0 not in shape else torch.zeros(shape).to(DTYPES[dtype])
    packed = pack_matrix(weight, scheme, nonfinite="mark" if marked else "raise")
    assert same(packed, pack_matrix(weight, str(scheme)))
    if 0 in shape:
        assert packed.nbytes == scheme.nbytes(shape, dtype)
        return
    check_decoding(packed)
    x = weight.double().numpy()
    error = np.abs(numbers(packed) - x).max()
    step = 1 if scheme.mode is Mode.Asymmetric or scheme.grid == "integer" else 2
    assert error <= step * np.abs(x).max() * 1.01


# ---- peers -------------------------------------------------------------------------------------


def test_gguf_reads_our_mxfp4_the_same(rng: np.random.Generator) -> None:
    """Its block: an exponent, then codes k and k + 16 in the halves of byte k."""
    gguf = pytest.importorskip("gguf")
    weight = matrix(rng, (6, 96))
    packed = pack_matrix(weight, "mxfp4")
    codes = read(packed).codes.reshape(6, 3, 2, 16).astype(np.uint8)
    nibbles = codes[:, :, 0] | codes[:, :, 1] << 4
    raw = np.concatenate([packed.scales.numpy()[:, :, None], nibbles], axis=2).reshape(6, -1)
    theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.MXFP4)
    assert np.array_equal(theirs.reshape(6, 96), packed.dequantize().numpy())


@pytest.mark.parametrize(("grid", "table"), [("nf4", NF4), ("fp4", FP4)])
def test_bitsandbytes_has_the_same_codes(
    grid: str, table: tuple[float, ...], rng: np.random.Generator
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.from_numpy(rng.standard_normal((32, 256))).float()
    try:
        data, state = functional.quantize_4bit(weight, blocksize=64, quant_type=grid)
    except (NotImplementedError, RuntimeError) as error:
        pytest.skip(f"bitsandbytes does not quantize here: {error}")
    packed = pack_matrix(weight, f"{grid}g64")
    theirs = data.reshape(-1).numpy()
    theirs = np.stack([theirs >> 4, theirs & 15], axis=1).reshape(32, 256)
    levels = np.array(table, "float32").astype("float64")  # by level: it has two codes for 0
    ours = read(packed)
    assert np.array_equal(array_of(packed.scales).reshape(-1), state.absmax.double().numpy())
    assert np.mean(levels[theirs] == ours.level) > 0.9999
    apart = np.abs(weight.double().numpy() - levels[theirs] * ours.scale)
    assert (np.abs(weight.double().numpy() - numbers(packed)) <= apart + 1e-9).all()


def test_e2m1_ties_and_ends() -> None:
    """Halfway the lower code, and what is beyond 6 becomes 6."""
    weight = torch.tensor([[4.0, 0.25, 0.75, 5.0, -0.25, -5.0, 7.9, -7.9, 2.5, 3.5]])
    found = read(pack_matrix(weight, "mxfp4"))
    assert [E2M1[code] for code in found.codes[0]] == [4, 0, 0.5, 4, 0, -4, 6, -6, 2, 3]
