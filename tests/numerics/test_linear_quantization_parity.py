"""Codes, scales, zero points and restored numbers equal the torch expression, bit for bit."""

from __future__ import annotations

import math

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

torch = pytest.importorskip("torch")

SOURCES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SIGNED = ["int2", "int3", "int4", "int5", "int6", "int7", "int8", "int16"]
UNSIGNED = ["uint1", "uint2", "uint3", "uint4", "uint5", "uint6", "uint7", "uint8"]
FLOATS = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
MATRIX_CUTS = [
    Granularity.PerTensor,
    Granularity.PerDimension(1),
    Granularity.PerDimension(0),
    Granularity.PerGroup(8, 1),
    Granularity.PerGroup(16, -1),
    Granularity.PerGroup(4, 0),
    Granularity.PerGroup(100, 0),
    Granularity.PerGroup(1, 1),
]
CASES = [((13, 50), cut) for cut in MATRIX_CUTS]
CASES += [((3, 5, 7), Granularity.PerDimension(dim)) for dim in (0, 1, 2, -1, -2, -3)]
CASES += [((3, 5, 7), Granularity.PerTensor), ((2, 3, 2, 5), Granularity.PerDimension(-3))]
CASES += [((9,), Granularity.PerTensor), ((9,), Granularity.PerDimension(0)), ((), MATRIX_CUTS[0])]


def reduced(t: torch.Tensor, granularity: Granularity, reduce) -> torch.Tensor:
    """``reduce(tensor, dim)`` over each block, in the shape of the scales."""
    match granularity:
        case Granularity.PerTensor:
            return reduce(t.reshape(-1), 0).reshape(())
        case Granularity.PerDimension(dim):
            return reduce(t, dim).unsqueeze(dim)
        case Granularity.PerGroup(by, dim):
            return torch.cat([reduce(part, dim).unsqueeze(dim) for part in t.split(by, dim)], dim)


def spread(scale: torch.Tensor, granularity: Granularity, shape: torch.Size) -> torch.Tensor:
    """Each block's value at each number of the block."""
    match granularity:
        case Granularity.PerGroup(by, dim):
            return scale.repeat_interleave(by, dim).narrow(dim, 0, shape[dim])
    return scale.expand(shape)


def widened(t: torch.Tensor) -> torch.Tensor:
    return t if t.dtype == torch.float64 else t.float()


def numbers(shape: tuple[int, ...], dtype: torch.dtype, least: float = 0.0) -> torch.Tensor:
    """Normal numbers, with ties and zeros among them, no magnitude but 0 below ``least``."""
    generator = torch.Generator().manual_seed(math.prod(shape) + len(shape))
    t = torch.randn(shape, generator=generator, dtype=torch.float64)
    t = torch.where(torch.rand(shape, generator=generator) < 0.2, (t * 4).round() / 8, t)
    return (t + t.sign() * least).to(dtype)


def check(t, granularity, target, mode, scale, zero, codes, **options) -> None:
    """Ours equals the given scales, zero points and codes; so do the numbers restored."""
    q, params = quantize_linear(t, target, granularity, mode, **options)
    assert params.scale.dtype == scale.dtype and torch.equal(params.scale, scale)
    assert params.zero_point.dtype == torch.int32 and torch.equal(params.zero_point, zero.int())
    assert q.dtype == codes.dtype and q.shape == t.shape
    assert torch.equal(widened(q), widened(codes))
    step = spread(scale, granularity, t.shape)
    restored = (codes.to(step.dtype) - spread(zero, granularity, t.shape)) * step
    assert torch.equal(dequantize_linear(q, params), restored.to(t.dtype))


@pytest.mark.parametrize("narrow", [True, False], ids=["narrow", "full"])
@pytest.mark.parametrize("target", SIGNED)
@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_symmetric(source: torch.dtype, target: str, narrow: bool) -> None:
    info = get_info(target)
    low, high = (-info.max if narrow else info.min), info.max
    for shape, cut in CASES:
        t = numbers(shape, source)
        absmax = reduced(widened(t).abs(), cut, torch.amax)
        scale = torch.where(absmax == 0, torch.ones_like(absmax), absmax / ((high - low) / 2))
        codes = torch.round(widened(t) / spread(scale, cut, t.shape)).clamp(low, high)
        codes = codes.to(getattr(torch, info.storage))
        check(t, cut, target, Mode.Symmetric, scale, 0 * scale, codes, narrow_range=narrow)


@pytest.mark.parametrize("target", UNSIGNED)
@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_symmetric_unsigned(source: torch.dtype, target: str) -> None:
    info = get_info(target)
    for shape, cut in CASES:
        t = numbers(shape, source).abs()
        absmax = reduced(widened(t), cut, torch.amax)
        scale = torch.where(absmax == 0, torch.ones_like(absmax), absmax / info.max)
        codes = torch.round(widened(t) / spread(scale, cut, t.shape)).clamp(0, info.max)
        check(t, cut, target, Mode.Symmetric, scale, 0 * scale, codes.to(torch.uint8))


@pytest.mark.parametrize("narrow", [False, True], ids=["full", "narrow"])
@pytest.mark.parametrize("target", SIGNED + UNSIGNED)
@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_asymmetric(source: torch.dtype, target: str, narrow: bool) -> None:
    info = get_info(target)
    if narrow and not info.is_signed:
        pytest.skip("unsigned codes have one range")
    least, most = (-info.max if narrow else info.min), info.max
    for shape, cut in CASES:
        t = numbers(shape, source) + 0.25
        low = reduced(widened(t), cut, torch.amin).clamp(max=0)
        high = reduced(widened(t), cut, torch.amax).clamp(min=0)
        scale = torch.where(high == low, torch.ones_like(high), (high - low) / (most - least))
        zero = torch.round(least - low / scale).clamp(least, most)
        codes = torch.round(widened(t) / spread(scale, cut, t.shape))
        codes = (codes + spread(zero, cut, t.shape)).clamp(least, most)
        codes = codes.to(getattr(torch, info.storage))
        check(t, cut, target, Mode.Asymmetric, scale, zero, codes, narrow_range=narrow or None)


@pytest.mark.parametrize("target", FLOATS, ids=str)
@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_float_codes(source: torch.dtype, target: torch.dtype) -> None:
    top = torch.finfo(target).max
    for shape, cut in CASES:
        # From 4 on absmax / max is a normal float32: smaller ones are rounded up, never to clip.
        t = numbers(shape, source, least=5.0)
        t = torch.where(t == 0, torch.full_like(t, 5.0), t)
        scale = reduced(widened(t).abs(), cut, torch.amax) / top
        codes = (widened(t) / spread(scale, cut, t.shape)).clamp(-top, top).float().to(target)
        check(t, cut, target, Mode.Symmetric, scale, 0 * scale, codes)


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_binary(source: torch.dtype) -> None:
    for shape, cut in CASES:
        t = numbers(shape, source)
        q, params = quantize_linear(t, "int1", cut)
        assert torch.equal(q, torch.where(t >= 0, 1, -1).to(torch.int8))
        mean = reduced(t.double().abs(), cut, torch.mean)
        torch.testing.assert_close(params.scale.double(), mean, rtol=2**-23, atol=0)
        assert not params.zero_point.any() and params.mode is Mode.Symmetric
        restored = q.to(params.scale.dtype) * spread(params.scale, cut, t.shape)
        assert torch.equal(dequantize_linear(q, params), restored.to(source))


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_scales_are_rounded_before_codes_are_made(
    source: torch.dtype, scale_dtype: torch.dtype
) -> None:
    for shape, cut in CASES:
        t = numbers(shape, source, least=1.0)
        absmax = reduced(widened(t).abs(), cut, torch.amax)
        exact = torch.where(absmax == 0, torch.ones_like(absmax), absmax / 127)
        scale = exact.to(scale_dtype).to(exact.dtype)
        codes = torch.round(widened(t) / spread(scale, cut, t.shape)).clamp(-127, 127)
        q, params = quantize_linear(t, torch.int8, cut, scale_dtype=scale_dtype)
        assert params.scale.dtype == scale_dtype and torch.equal(
            params.scale, scale.to(scale_dtype)
        )
        assert torch.equal(q, codes.to(torch.int8))
        restored = (codes * spread(scale, cut, t.shape)).to(source)
        assert torch.equal(dequantize_linear(q, params), restored)


@pytest.mark.parametrize("mode", Mode, ids=str)
@pytest.mark.parametrize("source", ["float32", "float64", "float16"])
def test_ndarrays_give_what_tensors_give(source: str, mode: Mode) -> None:
    for target in ("int8", "int4", "uint3", "int16"):
        for shape, cut in CASES:
            t = numbers(shape, getattr(torch, source))
            t = t.abs() if target[0] == "u" and mode is Mode.Symmetric else t
            q, params = quantize_linear(t, target, cut, mode)
            codes, given = quantize_linear(t.numpy(), target, cut, mode)
            for ours, theirs in [
                (codes, q),
                (given.scale, params.scale),
                (given.zero_point, params.zero_point),
                (dequantize_linear(codes, given), dequantize_linear(q, params)),
            ]:
                assert type(ours) is np.ndarray and ours.dtype == theirs.numpy().dtype
                assert np.array_equal(ours, theirs.numpy())


@pytest.mark.parametrize("mode", Mode, ids=str)
@pytest.mark.parametrize("target", ["int8", "uint4", "int1", "float8_e4m3fn"])
def test_helpers_give_the_scales_of_quantize_linear(target: str, mode: Mode) -> None:
    if mode is Mode.Asymmetric and target in ("int1", "float8_e4m3fn"):
        pytest.skip("symmetric only")
    t = numbers((6, 10), torch.float32)
    t = t.abs() if target[0] == "u" else t
    for dim in (None, 0, 1, -1):
        cut = Granularity.PerTensor if dim is None else Granularity.PerDimension(dim)
        _, params = quantize_linear(t, target, cut, mode)
        scale, zero = get_scale_and_zero_for(t, target, mode, dim)
        assert torch.equal(scale, params.scale) and torch.equal(zero, params.zero_point)
        assert zero.dtype == torch.int32
        if dim is not None:
            again = per_dim_scale_and_zero_for(t, target, mode, dim)
            assert torch.equal(again[0], scale) and torch.equal(again[1], zero)
    by_row = per_dim_scale_and_zero_for(t, target, mode)
    assert by_row[0].shape == by_row[1].shape == (6, 1)
