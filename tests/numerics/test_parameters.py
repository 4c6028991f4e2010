"""Parameters are compared by value, follow their granularity and print briefly."""

from __future__ import annotations

import copy
import dataclasses
import doctest
import pickle

import numpy as np
import pytest

from quantization.linear_quantizer import (
    Granularity,
    Mode,
    QuantizationParameters,
    dequantize_linear,
    quantize_linear,
)
from quantization.numerics import parameters
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


def matrix(rows: int = 6, cols: int = 8, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(rows * cols).standard_normal((rows, cols)).astype(dtype)


def test_parameters_are_compared_by_value() -> None:
    torch = pytest.importorskip("torch")
    x = matrix()
    for tensor in (x, torch.from_numpy(x), torch.from_numpy(x).bfloat16()):
        _, params = quantize_linear(tensor, "int8", Granularity.PerGroup(3), Mode.Asymmetric)
        _, again = quantize_linear(tensor, "int8", Granularity.PerGroup(3), Mode.Asymmetric)
        assert params == again and params == copy.deepcopy(params)
        assert params == pickle.loads(pickle.dumps(params))
        for change in (
            {"scale": params.scale * 2},
            {"scale": params.scale[:1]},
            {"zero_point": params.zero_point + 1},
            {"mode": Mode.Symmetric},
            {"granularity": Granularity.PerGroup(4), "group_by": None},
            {"dtype": None},
        ):
            assert params != dataclasses.replace(params, **change)
        assert params != "params"
    _, array = quantize_linear(x, "int8", Granularity.PerTensor)
    _, tensor = quantize_linear(torch.from_numpy(x), "int8", Granularity.PerTensor)
    assert array != tensor and tensor != array
    assert array != dataclasses.replace(array, scale=tensor.scale)
    with pytest.raises(TypeError, match="unhashable"):
        hash(array)


def test_parameters_follow_their_granularity() -> None:
    one, zero = np.ones((2, 1), "float32"), np.zeros((2, 1), "int32")
    grouped = QuantizationParameters(one, zero, Mode.Symmetric, Granularity.PerGroup(8, 0))
    assert (grouped.group_by, grouped.dim) == (8, 0)
    assert grouped == QuantizationParameters(
        one, zero, Mode.Symmetric, Granularity.PerGroup(8, 0), 8, 0
    )
    lines = QuantizationParameters(one, zero, Mode.Symmetric, Granularity.PerDimension(1))
    assert (lines.group_by, lines.dim) == (None, 1)
    with pytest.raises(ValueError, match=r"group_by=4 contradicts Granularity.PerGroup\(by=8"):
        dataclasses.replace(grouped, group_by=4)
    with pytest.raises(ValueError, match=r"dim=1 contradicts Granularity.PerTensor, which has dim"):
        QuantizationParameters(one, zero, Mode.Symmetric, Granularity.PerTensor, dim=1)
    with pytest.raises(TypeError, match="mode must be"):
        QuantizationParameters(one, zero, "symmetric", Granularity.PerTensor)
    with pytest.raises(TypeError, match="granularity must be"):
        QuantizationParameters(one, zero, Mode.Symmetric, 1)


def test_fields_can_be_set_and_are_looked_at_when_they_are_used() -> None:
    codes, params = quantize_linear(matrix(), "int8", Granularity.PerGroup(4))
    restored = dequantize_linear(codes, params)
    params.scale = params.scale * 2
    assert np.array_equal(dequantize_linear(codes, params), 2 * restored)
    params.granularity = Granularity.PerDimension(1)
    assert (params.group_by, params.dim) == (None, 1)
    with pytest.raises(ValueError, match=r"params.scale has shape \(6, 2\), but codes of shape"):
        dequantize_linear(codes, params)
    for field, value, message in (
        ("mode", "symmetric", "mode must be"),
        ("granularity", 8, "granularity must be"),
        ("dim", 0, r"dim=0 contradicts Granularity.PerDimension\(dim=1\)"),
        ("scale", None, "params.scale must be a torch.Tensor or numpy.ndarray, not NoneType"),
    ):
        changed = copy.deepcopy(params)
        setattr(changed, field, value)
        assert changed != params and changed == copy.deepcopy(changed)
        with pytest.raises((TypeError, ValueError), match=message):
            dequantize_linear(codes, changed)


def test_what_is_not_known_yet_is_none() -> None:
    empty = QuantizationParameters(scale=None)
    assert empty == QuantizationParameters(None, None, Mode.Symmetric, Granularity.PerTensor)
    assert empty != QuantizationParameters(np.ones((), "float32"))
    empty.scale = np.float32(0.5)
    assert dequantize_linear(np.array([2], "int8"), empty).tolist() == [1.0]


def test_numpy_scalars_are_arrays_again() -> None:
    codes, params = quantize_linear(matrix(), "uint8", Granularity.PerTensor, Mode.Asymmetric)
    doubled = dataclasses.replace(params, scale=params.scale * 2, zero_point=params.zero_point + 0)
    assert isinstance(doubled.scale, np.ndarray) and isinstance(doubled.zero_point, np.ndarray)
    restored = dequantize_linear(codes, params)
    assert np.array_equal(dequantize_linear(codes, doubled), 2 * restored)


def test_the_repr_is_short_and_says_all() -> None:
    _, params = quantize_linear(matrix(), "int8", Granularity.PerTensor)
    text = repr(params)
    assert text.startswith("QuantizationParameters(Mode.Symmetric, Granularity.PerTensor, scale=")
    assert "zero_point=int32[] 0, dtype=float32)" in text
    _, params = quantize_linear(np.ones((0, 3)), "int8", Granularity.PerGroup(2))
    assert "scale=float64[0, 2], zero_point=int32[0, 2]," in repr(params)
    assert "scale=0.5, zero_point=None" in repr(
        QuantizationParameters(0.5, None, Mode.Symmetric, Granularity.PerTensor)
    )


def test_examples() -> None:
    assert doctest.testmod(parameters).failed == 0
