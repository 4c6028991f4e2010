"""Codes and numbers equal, bit for bit, to the expressions one would write in torch."""

from __future__ import annotations

import numpy as np
import pytest

from tests import oracle
from tests.kernels import quantize_calls as calls
from tests.oracle import FLOAT_CODES, SOURCES, Spec
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

torch = pytest.importorskip("torch")

SHAPES = [((1, 1), (1, 1)), ((7, 130), (1, 130)), ((33, 65), (33, 1)), ((24, 96), (1, 32))]
SHAPES += [((64, 33), (16, 1)), ((40, 50), (40, 50))]


def tensor_of(bits: np.ndarray, name: str) -> torch.Tensor:
    if name in oracle.FORMATS and bits.itemsize == 2:
        return torch.from_numpy(bits.view(np.int16)).view(getattr(torch, name))
    return torch.from_numpy(bits).view(getattr(torch, name))


def same_bits(ours: np.ndarray, theirs: torch.Tensor, name: str) -> bool:
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[ours.itemsize]
    bits = theirs.contiguous().view(width).numpy().view(ours.dtype)
    return calls.same_numbers(ours, bits, name)


def weights(rng: np.random.Generator, shape: tuple[int, int], source: str) -> torch.Tensor:
    x = rng.standard_normal(shape)
    x = np.where(rng.integers(0, 6, shape) == 0, np.rint(x * 4) / 8, x)
    return tensor_of(calls.stored(x, source), source)


def to_bits(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype in (torch.float16, torch.bfloat16):
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """In the compute type."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def each(per_block: np.ndarray, block: calls.Block, shape: tuple[int, int]) -> torch.Tensor:
    return torch.from_numpy(oracle.spread(per_block, block, shape))


@pytest.mark.parametrize(("shape", "block"), SHAPES)
@pytest.mark.parametrize("source", SOURCES)
def test_symmetric(
    isa: str, rng: np.random.Generator, source: str, shape: tuple[int, int], block: calls.Block
) -> None:
    x = weights(rng, shape, source)
    for low, high in ((-127, 127), (-128, 127), (-7, 7), (-1, 1)):
        scales = "float64" if source == "float64" else "float32"
        spec = Spec(source=source, code_min=low, code_max=high, scale=scales)
        made = calls.quantize(to_bits(x), block, spec)
        absmax = each(made.scale, block, shape) * 0
        for rows in torch.arange(shape[0]).split(block[0]):
            for cols in torch.arange(shape[1]).split(block[1]):
                part = widened(x)[rows[:, None], cols]
                absmax[rows[:, None], cols] = part.abs().max()
        scale = absmax / ((high - low) / 2)
        scale = torch.where(absmax == 0, torch.ones_like(scale), scale)
        assert torch.equal(scale, each(made.scale, block, shape))
        codes = torch.clamp(torch.round(widened(x) / scale), low, high).to(torch.int8)
        assert same_bits(made.codes, codes, "int8")
        decoded = calls.decode(made.codes, made.scale, None, block, "int8", source)
        assert same_bits(decoded, (codes.to(scale.dtype) * scale).to(x.dtype), source)


@pytest.mark.parametrize(("shape", "block"), SHAPES)
@pytest.mark.parametrize("source", SOURCES)
def test_asymmetric(
    isa: str, rng: np.random.Generator, source: str, shape: tuple[int, int], block: calls.Block
) -> None:
    x = weights(rng, shape, source)
    for code, low, high in (("int8", -128, 127), ("uint8", 0, 255), ("uint8", 0, 15)):
        scales = "float64" if source == "float64" else "float32"
        spec = Spec(source, code, "asymmetric", low, high, scales)
        made = calls.quantize(to_bits(x), block, spec)
        scale, zero = each(made.scale, block, shape), each(made.zero, block, shape)
        codes = torch.clamp(torch.round(widened(x) / scale) + zero, low, high)
        codes = codes.to(getattr(torch, code))
        assert same_bits(made.codes, codes, code)
        decoded = calls.decode(made.codes, made.scale, made.zero, block, code, source)
        number = (codes.to(scale.dtype) - zero) * scale
        assert same_bits(decoded, number.to(x.dtype), source)


@pytest.mark.parametrize("shape", [(1, 9), (7, 130), (33, 65)])
def test_as_torch_quantizes_by_rows(
    isa: str, rng: np.random.Generator, shape: tuple[int, int]
) -> None:
    """torch.fake_quantize_per_channel_affine multiplies by a reciprocal: a code near a tie may
    differ by one step, no more."""
    block = (1, shape[1])
    x = weights(rng, shape, "float32")
    made = calls.quantize(to_bits(x), block, Spec(mode="asymmetric", code_min=-128))
    scale, zero = (torch.from_numpy(a.reshape(-1)) for a in (made.scale, made.zero))
    theirs = torch.fake_quantize_per_channel_affine(x, scale, zero, 0, -128, 127)
    ours = calls.decode(made.codes, made.scale, made.zero, block, "int8", "float32")
    steps = (torch.from_numpy(ours) - theirs).abs() / scale[:, None]
    assert steps.max() < 1.001
    assert (steps > 0.5).float().mean() < 0.02


@pytest.mark.parametrize("code", FLOAT_CODES)
@pytest.mark.parametrize("source", SOURCES)
def test_float_targets(isa: str, rng: np.random.Generator, source: str, code: str) -> None:
    scales = "float64" if source == "float64" else "float32"
    spec = oracle.replace(Spec(source=source, scale=scales).to_float(code))
    kind, top = getattr(torch, code), oracle.largest(code)
    for shape, block in SHAPES:
        x = weights(rng, shape, source)
        made = calls.quantize(to_bits(x), block, spec)
        scale = each(made.scale, block, shape)
        codes = torch.clamp(widened(x) / scale, -top, top).to(kind)
        assert same_bits(made.codes, codes, code)
        for out in ("float32", "float16", "bfloat16") if scales == "float32" else ("float64",):
            decoded = calls.decode(made.codes, made.scale, None, block, code, out)
            number = codes.to(scale.dtype) * scale
            assert same_bits(decoded, number.to(getattr(torch, out)), out)


@pytest.mark.parametrize("name", oracle.FORMATS)
def test_conversions_of_every_pattern(isa: str, name: str) -> None:
    """To float32 and back as torch's .to() does, and around each pattern."""
    storage = np.dtype(oracle.STORAGE[name])
    bits = np.arange(256**storage.itemsize, dtype=storage).reshape(1, -1)
    one = np.ones((1, 1), np.float32)
    made = calls.decode(bits, one, None, bits.shape, name, "float32")
    theirs = tensor_of(bits, name).float()
    assert same_bits(made, theirs, "float32")
    finite = theirs[torch.isfinite(theirs)]
    nearby = [finite, *(finite * (1 + shift) for shift in (1e-3, -1e-3, 0.0625, 0.03))]
    values = torch.cat(nearby).clamp(-oracle.largest(name), oracle.largest(name)).reshape(1, -1)
    made = calls.encode(values.numpy(), one, None, values.shape, Spec().to_float(name))
    assert same_bits(made, values.to(getattr(torch, name)), name)
