"""Packed matrices: bytes, scales and numbers against an oracle that reads them bit by bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from quantization import Granularity, Mode, PackedWeights, Scheme, pack_matrix, quantize_linear
from tests.packed_calls import ALL, DTYPES, check_decoding, matrix, same
from tests.packed_oracle import PARTS, array_of, numbers, read
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

torch = pytest.importorskip("torch")

SHAPES = [(1, 1), (3, 7), (5, 32), (4, 100), (2, 129)]
SPANS = ("t", "r", "g1", "g7", "g32", "g64")
INTEGERS = [f"w{bits}{span}{mode}" for span in SPANS for mode in ("s", "a") for bits in range(1, 9)]
INTEGERS = [name for name in INTEGERS if not (name.startswith("w1") and name.endswith("s"))]


# ---- integers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INTEGERS)
def test_integer_codes_are_those_of_quantize_linear(name: str, rng: np.random.Generator) -> None:
    scheme = Scheme.parse(name)
    is_signed = scheme.mode is Mode.Symmetric
    for shape in SHAPES:
        for dtype in DTYPES:
            weight = matrix(rng, shape, dtype)
            packed = pack_matrix(weight, scheme)
            codes, params = quantize_linear(
                weight,
                f"{'' if is_signed else 'u'}int{scheme.bits}",
                scheme.granularity,
                scheme.mode,
                narrow_range=scheme.bits == 8 if is_signed else None,
                scale_dtype=weight.dtype,
            )
            found = read(packed)
            assert np.array_equal(found.level, codes.numpy())
            scale = np.broadcast_to(params.scale.double().numpy(), packed.scales.shape)
            assert np.array_equal(array_of(packed.scales), scale)
            if not is_signed:
                zeros = params.zero_point.numpy()
                place = np.arange(shape[1]) // scheme.group(shape[1])
                wide = np.broadcast_to(zeros, (shape[0], scheme.groups(shape[1])))
                assert np.array_equal(found.zero, wide[:, place])
            assert packed.scales.dtype == weight.dtype and packed.dtype == dtype
            check_decoding(packed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_the_int8_layer(dtype: str, rng: np.random.Generator) -> None:
    from quantization import QWQALinearLayer

    linear = torch.nn.Linear(33, 9).to(DTYPES[dtype])
    layer = QWQALinearLayer.from_float(linear)
    packed = pack_matrix(linear.weight, Scheme.int8())
    assert torch.equal(packed.packed_weights.view(torch.int8), layer.int8_weights)
    assert torch.equal(packed.scales, layer.scales[:, None])
    assert packed.dequantize().dtype == layer.weight.dtype


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_error_is_half_a_step(bits: int, rng: np.random.Generator) -> None:
    weight = rng.standard_normal((8, 200)).astype("float32")
    for mode in ("s", "a"):
        packed = pack_matrix(weight, f"w{bits}g32{mode}")
        error = np.abs(numbers(packed) - weight)
        assert (error <= read(packed).scale * (0.5 + 1e-5)).all()


def test_a_scale_type_of_ones_own(rng: np.random.Generator) -> None:
    weight = matrix(rng, (4, 64))
    for name, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16), ("f32", torch.float32)):
        packed = pack_matrix(weight, f"w4g16a+{name}")
        assert packed.scales.dtype == dtype and packed.dtype == "float32"
        check_decoding(packed)
    with pytest.raises(TypeError, match="scale_dtype is float64, but scales of a float32 tensor"):
        pack_matrix(weight, "w4+f64")


# ---- kinds of tensors --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_ndarrays_pack_as_tensors_do(name: str, rng: np.random.Generator) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for dtype in DTYPES:
        weight = matrix(rng, (5, 100), dtype)
        array = weight.double().numpy()
        array = array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        ours, theirs = pack_matrix(weight, name), pack_matrix(array, name)
        assert same(ours, theirs)
        assert all(isinstance(getattr(theirs, part), np.ndarray | None) for part in PARTS)
        assert theirs.dequantize().dtype == array.dtype
        assert np.array_equal(theirs.dequantize("float64"), ours.dequantize("float64").numpy())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_meta_and_empty_matrices(name: str, dtype: str) -> None:
    for shape in [(4, 100), (0, 100), (4, 0), (0, 0)]:
        meta = pack_matrix(torch.empty(shape, dtype=DTYPES[dtype], device="meta"), name)
        real = pack_matrix(torch.ones(shape, dtype=DTYPES[dtype]), name)
        for part in PARTS:
            one, other = getattr(meta, part), getattr(real, part)
            assert (one is None) == (other is None)
            if one is not None:
                assert one.is_meta and one.shape == other.shape and one.dtype == other.dtype
        assert meta.nbytes == real.nbytes == real.scheme.nbytes(shape, dtype)
        assert meta.dequantize().is_meta and tuple(meta.dequantize().shape) == shape
        assert tuple(real.dequantize().shape) == shape
        assert meta.dequantize().dtype == real.dequantize().dtype == DTYPES[dtype]


@pytest.mark.parametrize("name", ALL)
def test_any_memory_layout(name: str, rng: np.random.Generator) -> None:
    wide = matrix(rng, (100, 12))
    for weight in (wide.t(), wide[::2, 1::3], torch.nn.Parameter(wide)):
        before = weight.detach().clone()
        assert same(pack_matrix(weight, name), pack_matrix(before.contiguous(), name))
        assert torch.equal(weight.detach(), before)


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("culprit", [np.nan, np.inf, -np.inf])
def test_non_finite_weights(name: str, culprit: float, rng: np.random.Generator) -> None:
    weight = matrix(rng, (6, 100))
    weight[3, 65] = culprit
    message = rf"head has {culprit:g} at index \(3, 65\), but only finite numbers can be quantized"
    with pytest.raises(ValueError, match=message):
        pack_matrix(weight, name, name="head")
    with pytest.raises(ValueError, match="nonfinite must be 'raise' or 'mark', not 'skip'"):
        pack_matrix(weight, name, nonfinite="skip")
    packed = pack_matrix(weight, name, nonfinite="mark")
    group = packed.scheme.group(100)
    place = np.zeros((6, 100), bool)
    place[3, 65 // group * group : 65 // group * group + group] = True
    if packed.scheme.double_quant:  # the step of the row is the mark
        place[3] = True
    if packed.scheme.granularity is Granularity.PerTensor:
        place[:] = True
    assert np.array_equal(torch.isnan(packed.dequantize()).numpy(), place)


def test_refusals(rng: np.random.Generator) -> None:
    weight = matrix(rng, (2, 3))
    with pytest.raises(
        ValueError, match=r"weight has shape \(2, 3, 1\); expected \[out_features, "
    ):
        pack_matrix(weight[..., None], "w4")
    with pytest.raises(TypeError, match="weight has dtype int8; allowed are float32"):
        pack_matrix(weight.to(torch.int8), "w4")
    with pytest.raises(
        TypeError, match=r"weight must be a torch.Tensor or numpy.ndarray, not list"
    ):
        pack_matrix([[1.0]], "w4")
    with pytest.raises(TypeError, match="scheme must be a Scheme or its short name, not 4"):
        pack_matrix(weight, 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scheme w4 makes no choice that importance could weigh"):
        pack_matrix(weight, "w4", importance=torch.ones(3))


def test_parts_must_fit(rng: np.random.Generator) -> None:
    packed = pack_matrix(matrix(rng, (4, 100)), "w4g64a")
    parts = {name: getattr(packed, name) for name in PARTS}

    def build(**changes: Any) -> PackedWeights:
        return PackedWeights(packed.scheme, packed.shape, **(parts | changes))

    assert same(build(dtype=torch.float32), packed)
    with pytest.raises(ValueError, match="scheme w4g64a needs zero_points"):
        build(zero_points=None)
    with pytest.raises(ValueError, match="scheme w4g64a has no codebook"):
        build(codebook=torch.ones(1, 16))
    with pytest.raises(ValueError, match=r"scales has shape \(4, 3\); this scheme needs \(4, 2\)"):
        build(scales=torch.ones(4, 3))
    with pytest.raises(TypeError, match="scales has dtype int32; allowed are float32"):
        build(scales=torch.ones(4, 2, dtype=torch.int32))
    with pytest.raises(TypeError, match="packed_weights has dtype int8; this scheme needs uint8"):
        build(packed_weights=packed.packed_weights.view(torch.int8))
    with pytest.raises(TypeError, match=r"packed_weights must be a torch.Tensor or ndarray, not l"):
        build(packed_weights=[1, 2])


def test_the_dtype_is_that_of_the_scales_unless_it_is_said(rng: np.random.Generator) -> None:
    weight = matrix(rng, (4, 100), "bfloat16")
    packed = pack_matrix(weight, "w4g64a+f32")
    assert packed.dtype == "bfloat16"
    again = PackedWeights(packed.scheme, packed.shape, *(getattr(packed, name) for name in PARTS))
    assert again.dtype == "float32"
    assert repr(packed) == f"PackedWeights({packed.scheme!r}, (4, 100), bfloat16, 236 bytes)"
    assert packed.bits_per_weight == 8 * 236 / 400
    with pytest.raises(TypeError, match="the matrix to restore has dtype int8"):
        packed.dequantize("int8")
