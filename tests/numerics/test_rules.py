"""What the quantizer refuses, and the words it does so in."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from quantization.linear_quantizer import (
    Granularity,
    Mode,
    dequantize_linear,
    get_info,
    get_scale_and_zero_for,
    per_dim_scale_and_zero_for,
    quantize_linear,
)
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

CUTS = [Granularity.PerTensor, Granularity.PerDimension(1), Granularity.PerGroup(3)]


def matrix(rows: int = 6, cols: int = 8, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(rows * cols).standard_normal((rows, cols)).astype(dtype)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        (([1.0], "int8", CUTS[0]), {}, TypeError, "tensor must be a torch.Tensor or numpy.ndarray"),
        ((None, "int8", CUTS[0]), {"name": "w"}, TypeError, "w must be .*, not NoneType"),
        ((np.ones(2, int), "int8", CUTS[0]), {}, TypeError, "tensor has dtype int64; allowed are"),
        ((np.ones(2, complex), "int8", CUTS[0]), {"name": "w"}, TypeError, "w has dtype complex"),
        ((np.ones(2, object), "int8", CUTS[0]), {}, TypeError, "tensor has dtype object"),
        ((np.ma.ones(2), "int8", CUTS[0]), {}, TypeError, "not MaskedArray"),
        ((np.ones(2), "int9", CUTS[0]), {}, TypeError, "'int9' is not a dtype"),
        ((np.ones(2), "uint16", CUTS[0]), {}, TypeError, "cannot quantize to uint16; allowed are"),
        ((np.ones(2), np.float64, CUTS[0]), {}, TypeError, "cannot quantize to float64"),
        ((np.ones(2), None, CUTS[0]), {}, TypeError, "None is not a dtype"),
        ((np.ones(2), "int8", "tensor"), {}, TypeError, "granularity must be Granularity.PerTens"),
        ((np.ones(2), "int8", Granularity.PerGroup), {}, TypeError, "granularity must be"),
        ((np.ones(2), "int8", CUTS[1]), {}, ValueError, "dim must be -1..0"),
        ((np.ones((2, 3)), "int8", Granularity.PerDimension(-3)), {}, ValueError, "must be -2..1"),
        ((np.ones(2), "int8", CUTS[2]), {}, ValueError, "cuts a 2-D tensor"),
        ((np.ones((2, 2, 2)), "int8", CUTS[2]), {}, ValueError, "reshape it first"),
        ((np.ones(2), "int8", CUTS[0], "sym"), {}, TypeError, "mode must be Mode.Symmetric or"),
        ((np.ones(2), "int8", CUTS[0], None), {}, TypeError, "not None"),
        ((np.ones(2), "int1", CUTS[0], Mode.Asymmetric), {}, ValueError, "uint1 for Mode.Asymm"),
        (
            (np.ones(2), "float16", CUTS[0], Mode.Asymmetric),
            {},
            ValueError,
            "float16 codes are symmetric: use Mode.Symmetric, or an integer type for a zero point",
        ),
        (
            (np.ones(2), "float16", CUTS[0]),
            {"narrow_range": True},
            ValueError,
            r"float16 codes have one range, -65504..65504: leave narrow_range out",
        ),
        (
            (np.ones(2), "int1", CUTS[0]),
            {"narrow_range": False},
            ValueError,
            r"int1 codes have one range, -1..1: leave narrow_range out",
        ),
        (
            (np.ones(2), "uint4", CUTS[0]),
            {"narrow_range": True},
            ValueError,
            r"uint4 codes have one range, 0..15: leave narrow_range out, or use a signed type",
        ),
        ((np.ones(2), "int8", CUTS[0]), {"narrow_range": 1}, TypeError, "True, False or None, not"),
        ((np.ones(2), "int8", CUTS[0]), {"scale_dtype": "int8"}, TypeError, r"a scale \(scale_dty"),
        (
            (np.ones(2, "float32"), "int8", CUTS[0]),
            {"scale_dtype": "float64"},
            TypeError,
            "scale_dtype is float64, but scales of a float32 tensor are computed in float32: leave",
        ),
        (
            (np.ones(2), "int8", CUTS[0]),
            {"nonfinite": "ignore"},
            ValueError,
            "nonfinite must be 'raise' or 'mark', not 'ignore'",
        ),
    ],
)
def test_what_quantize_linear_refuses(arguments, options, error, text) -> None:
    with pytest.raises(error, match=text):
        quantize_linear(*arguments, **options)


@pytest.mark.parametrize(
    ("q", "change", "error", "text"),
    [
        (np.zeros((6, 8), "int32"), {}, TypeError, "q has dtype int32; codes are stored as int8"),
        (np.zeros((6, 8), "float64"), {}, TypeError, "pass q as quantize_linear returned it"),
        ([1], {}, TypeError, "q must be a torch.Tensor or numpy.ndarray, not list"),
        (
            np.zeros((5, 8), "int8"),
            {},
            ValueError,
            r"params.scale has shape \(6, 3\), but codes of shape \(5, 8\) under "
            r"Granularity.PerGroup\(by=3, dim=1\) need \(5, 3\): pass the params",
        ),
        (np.zeros(8, "int8"), {}, ValueError, "cuts a 2-D tensor"),
        (None, {"scale": 1.0}, TypeError, "params.scale must be a torch.Tensor or numpy.ndarray"),
        (None, {"scale": np.ones((6, 3), int)}, TypeError, "params.scale has dtype int64"),
        (None, {"zero_point": None}, TypeError, "params.zero_point must be"),
        (
            None,
            {"zero_point": np.zeros((6, 3))},
            TypeError,
            "zero_point has dtype float64; allowed",
        ),
        (
            None,
            {"zero_point": np.zeros((6, 1), "int32")},
            ValueError,
            r"params.zero_point has shape \(6, 1\)",
        ),
        (None, {"dtype": "int8"}, TypeError, r"the tensor to restore \(params.dtype\) has dtype"),
        (None, {"granularity": Granularity.PerTensor}, ValueError, r"need \(\): pass the params"),
    ],
)
def test_what_dequantize_linear_refuses(q, change, error, text) -> None:
    made, params = quantize_linear(matrix(), "uint8", Granularity.PerGroup(3), Mode.Asymmetric)
    if "granularity" in change:
        change = {**change, "group_by": None, "dim": None}
    with pytest.raises(error, match=text):
        dequantize_linear(made if q is None else q, dataclasses.replace(params, **change))


def test_symmetric_parameters_have_zero_points_of_zero() -> None:
    q, params = quantize_linear(matrix(), "int8", Granularity.PerDimension(1))
    expected = dequantize_linear(q, params)
    without = dataclasses.replace(params, zero_point=None)
    assert np.array_equal(dequantize_linear(q, without), expected)
    moved = dataclasses.replace(params, zero_point=params.zero_point + 1)
    with pytest.raises(ValueError, match=r"symmetric, but zero_point is not 0: use Mode.Asymm"):
        dequantize_linear(q, moved)
    with pytest.raises(TypeError, match=r"params must be the QuantizationParameters .* not tuple"):
        dequantize_linear(q, (params.scale, params.zero_point))


def test_helpers_refuse_as_quantize_linear_does() -> None:
    with pytest.raises(ValueError, match=r"PerDimension\(dim=2\) does not fit"):
        get_scale_and_zero_for(matrix(), "int8", Mode.Symmetric, 2)
    with pytest.raises(TypeError, match="mode must be"):
        get_scale_and_zero_for(matrix(), "int8", "Symmetric")
    with pytest.raises(TypeError, match="reduce_dim must be an integer; get_scale_and_zero_for"):
        per_dim_scale_and_zero_for(matrix(), "int8", Mode.Symmetric, None)
    with pytest.raises(TypeError, match="no number type here is int64; allowed are float32"):
        get_info(int)
