"""Blocks of GGUF against the package gguf: bit for bit, and refused where they do not agree."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")

from quantization import PackedLinearLayer, pack_matrix
from quantization.formats import FormatError
from quantization.formats.gguf import packed
from quantization.formats.gguf.blocks import TYPES
from quantization.formats.gguf.packed import blocks_of, packed_of
from quantization.formats.gguf.types import type_for
from quantization.schemes.scheme import Scheme
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

# Where a block has its float16 numbers.
HALVES = {
    "Q8_0": [0],
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "TQ1_0": [52],
    "TQ2_0": [64],
    "MXFP4": [],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "IQ4_NL": [0],
    "IQ4_XS": [0],
}
WITH_MINIMA = {"Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"}
WRITTEN = [kind.name for kind in TYPES.values() if kind.encode]
ROWS, BLOCKS = 24, 8


def kind_of(name: str):
    return gguf.GGMLQuantizationType[name]


def random_rows(name: str, rng: np.random.Generator) -> np.ndarray:
    """Any bytes that a file may hold, scales of all sizes and signs among them, 0 too."""
    kind = TYPES[name]
    blocks = rng.integers(0, 256, (ROWS * BLOCKS, kind.nbytes), "uint8")
    for start in HALVES[name]:
        halves = rng.normal(size=len(blocks)) * 10.0 ** rng.integers(-8, 3, len(blocks))
        halves[::7] = 0
        blocks[:, start : start + 2] = halves.astype("<f2")[:, None].view("uint8")
    if name == "MXFP4":
        blocks[:, 0] = rng.integers(0, 250, len(blocks))
    if name == "TQ2_0":
        digits = rng.integers(0, 3, (len(blocks), 64, 4), "uint8") << np.array(
            [0, 2, 4, 6], "uint8"
        )
        blocks[:, :64] = np.bitwise_or.reduce(digits, axis=2)
    return blocks.reshape(ROWS, -1)


def random_weights(rng: np.random.Generator, cols: int = 512) -> np.ndarray:
    return (rng.normal(size=(ROWS, cols)) * 10.0 ** rng.integers(-3, 2, (ROWS, 1))).astype(
        "float32"
    )


def test_sizes_are_those_of_gguf() -> None:
    for kind in TYPES.values():
        assert gguf.GGML_QUANT_SIZES[kind_of(kind.name)] == (kind.length, kind.nbytes)


@pytest.mark.parametrize("name", [name for name in HALVES if name not in WITH_MINIMA])
def test_any_bytes_are_restored_as_gguf_does(name: str, rng: np.random.Generator) -> None:
    data = random_rows(name, rng)
    packed = packed_of(data, TYPES[name], "w")
    expected = gguf.dequantize(data, kind_of(name))
    assert packed.dtype == "float32" and packed.scheme == Scheme.parse(TYPES[name].scheme)
    assert np.array_equal(packed.dequantize().numpy(), expected)
    assert len(np.unique(expected)) > 100


@pytest.mark.parametrize("name", sorted(WITH_MINIMA))
def test_minima_are_within_their_bound(name: str, rng: np.random.Generator) -> None:
    data, kind = random_rows(name, rng), TYPES[name]
    expected = gguf.dequantize(data, kind_of(name))
    blocks = kind.decode(data.reshape(-1, kind.nbytes))
    group = kind.length // blocks.minima.shape[1]
    minima = np.repeat(blocks.minima, group, axis=1).reshape(expected.shape)
    given = packed_of(data, kind, "w").dequantize().numpy()
    bound = 2.0**-23 * (np.abs(minima) + 2 * np.abs(expected.astype("float64")))
    assert (np.abs(given - expected.astype("float64")) <= bound).all()
    constant = np.repeat(blocks.scales == 0, group, axis=1).reshape(expected.shape)
    assert constant.any() and np.array_equal(given[constant], expected[constant])


def test_blocks_of_8_bits_under_one_float32_scale(rng: np.random.Generator) -> None:
    blocks = rng.integers(0, 256, (ROWS, 292), "uint8")  # gguf has no dequantizer of Q8_K
    scales = rng.normal(size=ROWS).astype("<f4")
    blocks[:, :4] = scales[:, None].view("uint8")
    expected = scales[:, None] * blocks[:, 4:260].view("int8").astype("float32")
    assert np.array_equal(packed_of(blocks, TYPES["Q8_K"], "w").dequantize().numpy(), expected)


@pytest.mark.parametrize("name", WRITTEN)
def test_bytes_of_gguf_come_back(name: str, rng: np.random.Generator) -> None:
    data = gguf.quantize(random_weights(rng), kind_of(name))
    packed = packed_of(data, TYPES[name], "w")
    if name not in WITH_MINIMA:
        assert np.array_equal(packed.dequantize().numpy(), gguf.dequantize(data, kind_of(name)))
    again, moved = blocks_of(packed, TYPES[name], "w")
    assert moved == 0 and np.array_equal(again, data)


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        ("w8g32+f16", "Q8_0"),
        ("w8+f16", "Q8_0"),
        ("w7g64+f16", "Q8_0"),
        ("w6t+f16", "Q8_0"),
        ("w5g32+f16", "Q5_0"),
        ("w4g32+f16", "Q4_0"),
        ("w3g128+f16", "Q4_0"),
        ("w2+f16", "Q4_0"),
        ("w1g32a+f16", "Q4_0"),
        ("w3g32a+f16", "Q4_0"),
        ("w4g32a+f16", "Q5_0"),
        ("w4a+f16", "Q5_0"),
        ("w5g64a+f16", "Q8_0"),
        ("w7g32a+f16", "Q8_0"),
        ("ternaryg256+f16", "TQ1_0"),
        ("ternary+f16", "TQ1_0"),
        ("ternaryg32+f16", "Q4_0"),
        ("binary+f16", "TQ1_0"),
        ("binaryg32+f16", "Q4_0"),
        ("mxfp4", "MXFP4"),
    ],
)
def test_schemes_go_into_the_smallest_type(
    scheme: str, name: str, rng: np.random.Generator
) -> None:
    packed = pack_matrix(torch.from_numpy(random_weights(rng)), scheme)
    kind = type_for(packed.scheme, 512, "w")
    assert kind.name == name
    data, moved = blocks_of(packed, kind, "w")
    restored = gguf.dequantize(data, kind_of(name))
    assert moved == 0 and np.array_equal(restored, packed.dequantize().numpy())


def test_ternary_rows_that_are_no_blocks_of_256() -> None:
    assert type_for(Scheme.parse("ternary+f16"), 576, "w").name == "Q4_0"
    assert type_for(Scheme.parse("ternary+f16"), 512, "w", "TQ2_0").name == "TQ2_0"


@pytest.mark.parametrize(
    ("scheme", "cols", "wanted", "reason"),
    [
        ("nf4g64", 64, None, r"no block has the levels of the grid nf4"),
        ("kmeans4", 64, None, r"no block has the levels of the grid kmeans"),
        ("w4g16+f16", 64, None, r"groups of 16 weights are no whole number of blocks of 32"),
        ("w4g32+f16", 100, None, r"rows of 100 weights are no whole number of blocks of 32"),
        ("mxfp4", 48, None, r"rows of 48 weights are no whole number of blocks of 32"),
        ("w6g32af+f16", 64, None, r"codes of 0\.\.63 are not within 0\.\.31"),
        ("w8g32+f16", 64, "Q4_0", r"codes of -128\.\.127 are not within -8\.\.7"),
        ("w4g32+f16", 64, "Q4_1", r"its blocks have minima, and the scheme no zero points"),
        ("w4g32af+f16", 64, "Q8_0", r"its blocks have no minima, which float zero points need"),
        ("w4g32+f16", 64, "MXFP4", r"MXFP4 for mxfp4"),
        ("ternary+f16", 288, "TQ2_0", r"rows of 288 weights are no whole number of blocks of 256"),
    ],
)
def test_schemes_that_fit_no_type(scheme: str, cols: int, wanted: str | None, reason: str) -> None:
    with pytest.raises(FormatError, match=rf"layer 7 \(scheme .*\) does not fit .*{reason}; schem"):
        type_for(Scheme.parse(scheme), cols, "layer 7", wanted)


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ("w4g32", r"the scale .* of block 0 in row 0 is no number of float16.*or quantize with"),
        ("w4g32+dq", r"the scale .* is no number of float16"),
        ("w4g32af+f16", r"the minimum .* is no number of float16.*whole zero points"),
    ],
)
def test_numbers_that_float16_does_not_hold(
    scheme: str, reason: str, rng: np.random.Generator
) -> None:
    weights = random_weights(rng)
    packed = pack_matrix(torch.from_numpy(weights), scheme)
    kind = type_for(packed.scheme, 512, "w")
    with pytest.raises(FormatError, match=reason):
        blocks_of(packed, kind, "w")
    data, moved = blocks_of(packed, kind, "w", allow_rounding=True)
    change = np.abs(gguf.dequantize(data, kind_of(kind.name)) - packed.dequantize().numpy()).max()
    assert 0 < change <= moved * 1.001 and moved < np.abs(weights).max() / 100


def test_scales_beyond_float16_are_never_rounded() -> None:
    packed = pack_matrix(torch.full((1, 32), 1e8), "w8g32")
    with pytest.raises(FormatError, match="beyond the largest one, 65504"):
        blocks_of(packed, TYPES["Q8_0"], "w", allow_rounding=True)


def test_whole_zero_points_as_minima(rng: np.random.Generator) -> None:
    weights = torch.from_numpy(rng.integers(0, 16, (4, 64)).astype("float32")) - 5
    weights[:, ::32], weights[:, 1::32] = -5, 10
    packed = pack_matrix(weights, "w4g32a+f16")
    data, moved = blocks_of(packed, TYPES["Q4_1"], "w")
    assert moved == 0 and np.array_equal(gguf.dequantize(data, kind_of("Q4_1")), weights.numpy())


def test_wide_codes_after_zero_points() -> None:
    packed = pack_matrix(torch.linspace(-1, 200, 64).view(2, 32), "w8g32a+f16")
    with pytest.raises(FormatError, match=r"has codes of .* after zero points; Q8_0 of GGUF holds"):
        blocks_of(packed, type_for(packed.scheme, 32, "w"), "w")


def test_marked_groups_stay_nan() -> None:
    weights = torch.randn(2, 64)
    weights[0, 3] = torch.nan
    packed = pack_matrix(weights, "w4g32+f16", nonfinite="mark")
    data, _ = blocks_of(packed, TYPES["Q4_0"], "w")
    restored = gguf.dequantize(data, kind_of("Q4_0"))
    assert np.isnan(restored[0, :32]).all() and np.isfinite(restored[:, 32:]).all()
    with pytest.raises(FormatError, match="a scale is NaN, which MXFP4"):
        blocks_of(pack_matrix(weights, "mxfp4", nonfinite="mark"), TYPES["MXFP4"], "w")


def test_bytes_that_stand_for_nothing() -> None:
    with pytest.raises(FormatError, match=r"w \(MXFP4\): an exponent is 255"):
        packed_of(np.full((1, 17), 255, "uint8"), TYPES["MXFP4"], "w")
    with pytest.raises(FormatError, match=r"w \(TQ2_0\): a code is 3"):
        packed_of(np.full((1, 66), 3, "uint8"), TYPES["TQ2_0"], "w")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_dtypes_keep_codes_and_scales(dtype: str, rng: np.random.Generator) -> None:
    data = gguf.quantize(random_weights(rng), kind_of("Q4_1"))
    packed, wide = (packed_of(data, TYPES["Q4_1"], "w", each) for each in (dtype, "float32"))
    assert packed.dtype == dtype and torch.equal(packed.scales, wide.scales)
    assert torch.equal(packed.zero_points, wide.zero_points.to(getattr(torch, dtype)))
    if dtype == "float64":
        assert np.array_equal(blocks_of(packed, TYPES["Q4_1"], "w")[0], data)
    else:  # rounded zero points are other numbers, whatever minima they round to
        with pytest.raises(FormatError, match=r"the minimum .* is no number of float16"):
            blocks_of(packed, TYPES["Q4_1"], "w")


def test_zero_points_beyond_float16() -> None:
    block = np.zeros((1, 20), "uint8")
    block[0, :4] = np.array([2.0**-24, 5.0], "<f2").view("uint8")
    assert packed_of(block, TYPES["Q4_1"], "w").dequantize().unique().tolist() == [5.0]
    with pytest.raises(FormatError, match="beyond the largest number of float16: read it as"):
        packed_of(block, TYPES["Q4_1"], "w", "float16")


@pytest.mark.parametrize("name", WRITTEN)
def test_rows_are_taken_some_at_a_time(name: str, rng, monkeypatch: pytest.MonkeyPatch) -> None:
    data = gguf.quantize(random_weights(rng), kind_of(name))
    whole = packed_of(data, TYPES[name], "w")
    monkeypatch.setattr(packed, "_AT_ONCE", 1536)  # three rows
    parts = packed_of(data, TYPES[name], "w")
    assert torch.equal(parts.packed_weights, whole.packed_weights)
    assert torch.equal(parts.scales, whole.scales)
    assert np.array_equal(blocks_of(parts, TYPES[name], "w")[0], data)


@pytest.mark.parametrize("shape", [(0, 64), (4, 0)])
def test_matrices_without_weights(shape: tuple[int, int]) -> None:
    packed = pack_matrix(torch.zeros(shape), "w8g32+f16")
    data, moved = blocks_of(packed, TYPES["Q8_0"], "w")
    assert data.shape == (shape[0], shape[1] // 32 * 34) and moved == 0
    assert packed_of(data, TYPES["Q8_0"], "w").shape == shape


@pytest.mark.parametrize("name", list(HALVES))
def test_layers_run_on_what_was_read(name: str, rng: np.random.Generator) -> None:
    data = random_rows(name, rng)
    if name == "MXFP4":
        data.reshape(-1, 17)[:, 0] = rng.integers(110, 130, ROWS * BLOCKS)
    weight = torch.from_numpy(gguf.dequantize(data, kind_of(name)))
    layer = PackedLinearLayer.from_packed(packed_of(data, TYPES[name], "w"))
    x = torch.from_numpy(rng.normal(size=(3, weight.shape[1])).astype("float32"))
    exact = x.double() @ weight.double().T
    bound = (weight.shape[1] + 8) * 2.0**-23 * (x.double().abs() @ weight.double().abs().T)
    if name in WITH_MINIMA:  # sums of minima that cancel, too
        blocks = TYPES[name].decode(data.reshape(-1, TYPES[name].nbytes))
        group = TYPES[name].length // blocks.minima.shape[1]
        minima = np.repeat(np.abs(blocks.minima), group, axis=1).reshape(weight.shape)
        bound += (
            (weight.shape[1] + 8)
            * 2.0**-23
            * (x.double().abs() @ torch.from_numpy(minima).double().T)
        )
    assert ((layer(x) - exact).abs() <= bound).all()
