"""No number moves by more than half a step, however awkward its block; blocks do not touch."""

from __future__ import annotations

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from quantization.linear_quantizer import (
    Granularity,
    Mode,
    dequantize_linear,
    get_info,
    quantize_linear,
)
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

TINY = {"float32": 1e-45, "float64": 5e-324, "float16": 6e-8}
INTEGERS = ["int2", "int3", "int4", "int8", "int16", "uint1", "uint2", "uint4", "uint8"]


def awkward_rows(source: str) -> np.ndarray:
    """Rows of 24: zeros, constants, denormals, one sign, outliers, the ends of the type."""
    info = np.finfo(source)
    top, tiny, normal = float(info.max), TINY[source], float(info.tiny)
    ramp = np.linspace(0.1, 1, 24)
    rows = [
        np.zeros(24),
        np.full(24, 0.3),
        np.full(24, -0.3),
        np.full(24, tiny),
        np.full(24, -tiny),
        np.arange(24) * tiny,
        -np.arange(24) * tiny,
        (np.arange(24) - 11) * tiny * 3,
        ramp * normal,
        (ramp - 0.5) * normal * 4,
        ramp,
        -ramp,
        ramp + 5,
        -ramp - 5,
        np.where(np.arange(24) == 7, 1000, ramp - 0.5),
        np.where(np.arange(24) == 7, -1000, 1e-3),
        np.where(np.arange(24) == 7, top, 0.0),
        np.where(np.arange(24) == 7, -top, normal),
        ramp * top,
        (ramp - 0.55) * top,
        np.where(np.arange(24) % 2, top, -top),
        np.full(24, top),
    ]
    with np.errstate(under="ignore"):
        return np.array(rows).astype(source)


def steps_off(x: np.ndarray, q: np.ndarray, params, granularity: Granularity) -> np.ndarray:
    """How many steps each number lies from what its code stands for, in float64.

    The allowance for the rounding of ``x / scale`` itself is taken off.
    """
    with np.errstate(over="ignore"):
        wide = x.astype(np.longdouble)
        scale = params.scale.astype(np.longdouble)
        zero = params.zero_point.astype(np.longdouble)
        if isinstance(granularity, Granularity.PerGroup):
            by, dim = granularity.by, granularity.dim
            keep = [slice(None)] * 2
            keep[dim] = slice(x.shape[dim])
            scale = np.repeat(scale, by, dim)[tuple(keep)]
            zero = np.repeat(zero, by, dim)[tuple(keep)]
        eps = np.finfo(params.scale.dtype).eps
        off = np.abs((q.astype(np.longdouble) - zero) - wide / scale)
        return off - 2 * eps * np.abs(wide / scale)


@pytest.mark.parametrize("mode", Mode, ids=str)
@pytest.mark.parametrize("target", INTEGERS)
@pytest.mark.parametrize("source", ["float32", "float64", "float16"])
@pytest.mark.parametrize(
    "cut",
    [Granularity.PerDimension(1), Granularity.PerGroup(24), Granularity.PerGroup(7)],
    ids=str,
)
def test_half_a_step_on_awkward_rows(
    cut: Granularity, source: str, target: str, mode: Mode
) -> None:
    rows = awkward_rows(source)
    if mode is Mode.Symmetric and not get_info(target).is_signed:
        rows = np.abs(rows)
    if mode is Mode.Asymmetric and get_info(target).bits == 1 and source != "float16":
        rows = rows[:-3]  # max - min itself is no number of the type: refused, tested elsewhere
    for narrow in {None, False} if get_info(target).is_signed else {None}:
        q, params = quantize_linear(rows, target, cut, mode, narrow_range=narrow)
        assert np.isfinite(params.scale).all() and (params.scale > 0).all()
        assert steps_off(rows, q, params, cut).max() <= 0.5
        restored = dequantize_linear(q, params)
        assert restored.dtype == rows.dtype
        assert not restored[0].any(), "zeros are exact"
        assert not restored[rows == 0].any(), "zero is exact in every block"
        assert np.isfinite(restored).all(), "no number leaves its type"


@pytest.mark.parametrize("source", ["float32", "float64", "float16"])
def test_columns_and_tensors_of_awkward_rows(source: str) -> None:
    rows = awkward_rows(source)
    for row in rows:
        for cut in (Granularity.PerTensor, Granularity.PerDimension(0)):
            q, params = quantize_linear(row, "int8", cut)
            assert steps_off(row, q, params, cut).max() <= 0.5
    q, params = quantize_linear(rows.T, "int8", Granularity.PerDimension(0))
    by_row, row_params = quantize_linear(rows, "int8", Granularity.PerDimension(1))
    assert np.array_equal(q.T, by_row) and np.array_equal(params.scale.T, row_params.scale)


def test_constant_blocks_come_back_exactly_within_one_rounding() -> None:
    for value in (0.3, -0.3, 1e-30, -7e20, 2.0**-149):
        x = np.full((1, 40), value, "float32")
        for target, mode in [("int8", Mode.Symmetric), ("uint8", Mode.Asymmetric)]:
            restored = dequantize_linear(*quantize_linear(x, target, Granularity.PerTensor, mode))
            np.testing.assert_allclose(restored, x, rtol=2**-23, atol=0)


def test_float16_near_its_limit() -> None:
    x = np.array([[65504, -65504, 1, 0], [65504, 65472, 60000, 3]], "float16")
    for target in ("int8", "int4", "float8_e4m3fn", "float16"):
        if target == "float8_e4m3fn":
            pytest.importorskip("ml_dtypes")
        q, params = quantize_linear(x, target, Granularity.PerDimension(1))
        restored = dequantize_linear(q, params)
        assert restored.dtype == np.float16 and np.isfinite(restored).all()
        assert restored[0, 0] == 65504 and restored[0, 1] == -65504
    for target in ("uint8", "int8"):
        q, params = quantize_linear(x, target, Granularity.PerDimension(1), Mode.Asymmetric)
        assert np.isfinite(dequantize_linear(q, params)).all()


def test_a_range_that_no_scale_can_hold_is_refused() -> None:
    x = np.array([3.4e38, -3.4e38], "float32")
    with pytest.raises(ValueError, match="use a wider type for the scales"):
        quantize_linear(x, "uint1", Granularity.PerTensor, Mode.Asymmetric)
    with pytest.raises(ValueError, match="use a wider type for the scales"):
        quantize_linear(x, "int8", Granularity.PerTensor, scale_dtype="float16")
    q, _ = quantize_linear(x, "uint2", Granularity.PerTensor, Mode.Asymmetric)
    assert q[0] - q[1] == 3


@pytest.mark.parametrize("mode", Mode, ids=str)
@pytest.mark.parametrize("by", [1, 2, 3, 7, 13, 36, 37, 38, 1000])
@pytest.mark.parametrize("target", ["int8", "int4", "int1", "int16"])
def test_a_group_is_quantized_as_if_alone(target: str, by: int, mode: Mode) -> None:
    if target == "int1" and mode is Mode.Asymmetric:
        pytest.skip("binary codes are symmetric")
    x = np.random.default_rng(by).standard_normal((5, 37)).astype("float32")
    q, params = quantize_linear(x, target, Granularity.PerGroup(by, 1), mode)
    down, down_params = quantize_linear(x.T.copy(), target, Granularity.PerGroup(by, 0), mode)
    assert params.scale.shape == (5, -(-37 // by))
    assert np.array_equal(down.T, q)
    assert np.array_equal(down_params.scale.T, params.scale)
    assert np.array_equal(down_params.zero_point.T, params.zero_point)
    for row in range(5):
        for index, start in enumerate(range(0, 37, by)):
            part = x[row, start : start + by]
            alone, one = quantize_linear(part, target, Granularity.PerTensor, mode)
            assert np.array_equal(q[row, start : start + by], alone)
            assert params.scale[row, index] == one.scale
            assert params.zero_point[row, index] == one.zero_point


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 5), (3, 1, 4, 2), (7,)])
def test_a_line_is_quantized_as_if_alone(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(1).standard_normal(shape)
    for dim in range(-len(shape), len(shape)):
        q, params = quantize_linear(x, "int8", Granularity.PerDimension(dim), Mode.Asymmetric)
        lines, codes = np.moveaxis(x, dim, -1), np.moveaxis(q, dim, -1)
        scales = np.moveaxis(params.scale, dim, -1)
        for at in np.ndindex(lines.shape[:-1]):
            alone, one = quantize_linear(lines[at], "int8", Granularity.PerTensor, Mode.Asymmetric)
            assert np.array_equal(codes[at], alone) and scales[at] == one.scale


@st.composite
def cuts_of(draw: st.DrawFn, ndim: int) -> Granularity:
    kinds = [st.just(Granularity.PerTensor)]
    if ndim:
        kinds.append(st.integers(-ndim, ndim - 1).map(Granularity.PerDimension))
    if ndim == 2:
        kinds.append(st.builds(Granularity.PerGroup, st.integers(1, 40), st.integers(-2, 1)))
    return draw(st.one_of(kinds))


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(data=st.data())
def test_round_trips(data: st.DataObject) -> None:
    source = data.draw(st.sampled_from(["float32", "float64", "float16"]))
    shapes = npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=20)
    shape = data.draw(shapes)
    width = np.dtype(source).itemsize * 8
    most = float(np.finfo(source).max) / 4
    elements = st.floats(-most, most, width=width)
    x = data.draw(npst.arrays(source, shape, elements=elements))
    cut, mode = data.draw(cuts_of(len(shape))), data.draw(st.sampled_from(Mode))
    target = data.draw(st.sampled_from(INTEGERS))
    if mode is Mode.Symmetric and target[0] == "u":
        x = np.asarray(np.abs(x))  # a scalar, of a 0-d array
    q, params = quantize_linear(x, target, cut, mode)
    assert q.shape == x.shape and q.dtype == get_info(target).storage
    assert params.scale.shape == params.zero_point.shape == cut.scale_shape(shape)
    if x.size == 0:
        return
    low, high = get_info(target).min, get_info(target).max
    assert low <= q.min() and q.max() <= high
    assert steps_off(x, q, params, cut).max() <= 0.5
    restored = dequantize_linear(q, params)
    assert restored.dtype == x.dtype and restored.shape == x.shape
    assert not restored[x == 0].any()
