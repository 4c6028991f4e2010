"""The quantizer's manners: kinds of tensors, memory layouts, ranges, marks, groups."""

from __future__ import annotations

import copy
import dataclasses
import doctest

import numpy as np
import pytest

from quantization.linear_quantizer import (
    PER_COLUMNS,
    PER_ROWS,
    Granularity,
    Mode,
    dequantize_linear,
    get_scale_and_zero_for,
    group,
    per_dim_scale_and_zero_for,
    quantize_linear,
)
from quantization.numerics import linear_quantization
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

CUTS = [Granularity.PerTensor, Granularity.PerDimension(1), Granularity.PerGroup(3)]


def matrix(rows: int = 6, cols: int = 8, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(rows * cols).standard_normal((rows, cols)).astype(dtype)


def same(left: tuple, right: tuple) -> bool:
    return np.array_equal(left[0], right[0]) and left[1] == right[1]


def test_examples() -> None:
    outcome = doctest.testmod(linear_quantization)
    assert outcome.failed == 0 and outcome.attempted > 0


# ---- kinds of tensors ----------------------------------------------------------------------------


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_every_memory_layout(cut: Granularity) -> None:
    x = matrix()
    expected = quantize_linear(x, "int8", cut)
    swapped = x.astype(">f4")
    strided = np.zeros((12, 24), "float32")[::2, ::3]
    strided[...] = x
    read_only = x.copy()
    read_only.flags.writeable = False
    buffer = np.zeros(x.nbytes + 1, "uint8")[1:]
    misaligned = buffer.view("float32").reshape(x.shape)
    misaligned[...] = x
    assert not misaligned.flags.aligned
    for other in (
        np.asfortranarray(x),
        swapped,
        strided,
        x[::-1, ::-1].copy()[::-1, ::-1],
        read_only,
        misaligned,
    ):
        kept = other.copy()
        made = quantize_linear(other, "int8", cut)
        assert type(made[0]) is np.ndarray
        assert same(made, expected)
        assert np.array_equal(dequantize_linear(*made), dequantize_linear(*expected))
        assert np.array_equal(other, kept), "the source is only read"
    assert quantize_linear(swapped, "int8", cut)[1].dtype == np.dtype("float32")


def test_codes_of_every_memory_layout_come_back() -> None:
    q, params = quantize_linear(matrix(), "int16", Granularity.PerGroup(3), Mode.Asymmetric)
    expected = dequantize_linear(q, params)
    turned = dataclasses.replace(
        params,
        scale=np.asfortranarray(params.scale).astype(">f4"),
        zero_point=params.zero_point.astype(">i4")[::-1].copy()[::-1],
    )
    for other in (np.asfortranarray(q), q.astype(">i2"), q[::-1].copy()[::-1]):
        assert np.array_equal(dequantize_linear(other, turned), expected)


@pytest.mark.parametrize("mode", Mode, ids=str)
@pytest.mark.parametrize(
    ("shape", "cut", "scales"),
    [
        ((0, 4), Granularity.PerTensor, ()),
        ((0,), Granularity.PerDimension(0), (1,)),
        ((3, 0), Granularity.PerDimension(1), (3, 1)),
        ((3, 0), Granularity.PerDimension(0), (1, 0)),
        ((3, 0), Granularity.PerGroup(4), (3, 0)),
        ((0, 9), Granularity.PerGroup(4), (0, 3)),
        ((2, 0, 3), Granularity.PerDimension(-1), (2, 0, 1)),
    ],
    ids=str,
)
def test_tensors_of_no_numbers(
    shape: tuple[int, ...], cut: Granularity, scales: tuple[int, ...], mode: Mode
) -> None:
    q, params = quantize_linear(np.empty(shape, "float16"), "int4", cut, mode)
    assert (q.shape, q.dtype) == (shape, np.int8)
    assert params.scale.shape == params.zero_point.shape == scales
    assert (params.scale == 1).all() and not params.zero_point.any()
    restored = dequantize_linear(q, params)
    assert (restored.shape, restored.dtype) == (shape, np.float16)


def test_tensors_of_one_number() -> None:
    for cut in (Granularity.PerTensor,):
        q, params = quantize_linear(np.array(-2.5), "int8", cut)
        assert q.shape == params.scale.shape == () and q == -127
        assert dequantize_linear(q, params) == -2.5


def test_bfloat16_and_float8_arrays_by_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = matrix().astype(ml_dtypes.bfloat16)
    q, params = quantize_linear(x, "int8", Granularity.PerDimension(1), scale_dtype=x.dtype)
    assert params.scale.dtype == params.dtype == ml_dtypes.bfloat16
    assert "scale=bfloat16[6, 1] 0.0" in repr(params)
    assert dequantize_linear(q, params).dtype == ml_dtypes.bfloat16
    for name in ("float8_e4m3fn", "float8_e5m2", "bfloat16"):
        q, params = quantize_linear(matrix(), name, Granularity.PerTensor)
        assert q.dtype == getattr(ml_dtypes, name)
        np.testing.assert_allclose(dequantize_linear(q, params), matrix(), rtol=0.13, atol=1e-4)
    with pytest.raises(
        TypeError, match=r"q has dtype int4; codes are stored as int8, int16, uint8"
    ):
        dequantize_linear(np.zeros((6, 8), ml_dtypes.int4), params)


def test_types_that_numpy_lacks_are_refused_without_ml_dtypes(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ml_dtypes", None)
    text = "NumPy has no float8_e5m2: install ml_dtypes, or pass a torch tensor instead"
    with pytest.raises(TypeError, match=text):
        quantize_linear(matrix(), "float8_e5m2", Granularity.PerTensor)
    with pytest.raises(TypeError, match="NumPy has no bfloat16: install ml_dtypes"):
        quantize_linear(matrix(), "int8", Granularity.PerTensor, scale_dtype="bfloat16")


# ---- torch ---------------------------------------------------------------------------------------


def test_torch_layouts_and_parameters() -> None:
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(matrix())
    for cut in CUTS:
        q, params = quantize_linear(x, torch.int8, cut)
        assert params.dtype is torch.float32
        twice = torch.stack([x, -x], dim=-1)
        for other in (
            x.t().contiguous().t(),
            twice[..., 0],
            torch.nn.Parameter(x),
            x.clone().requires_grad_(),
            torch._neg_view(-x),
        ):
            codes, same_params = quantize_linear(other, torch.int8, cut)
            assert torch.equal(codes, q) and same_params == params
            for value in (codes, params.scale, params.zero_point):
                assert type(value) is torch.Tensor and not value.requires_grad
                assert value.is_contiguous()
        restored = dequantize_linear(q, params)
        assert type(restored) is torch.Tensor and restored.dtype == x.dtype


@pytest.mark.parametrize("mode", Mode, ids=str)
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_meta_tensors_keep_to_meta(cut: Granularity, mode: Mode) -> None:
    torch = pytest.importorskip("torch")
    for source in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.empty(5, 7, dtype=source)
        for target in ("int4", torch.uint8, torch.int16):
            q, params = quantize_linear(x.zero_(), target, cut, mode)
            shape, given = quantize_linear(x.to("meta"), target, cut, mode)
            restored = dequantize_linear(shape, given)
            for ours, real in [
                (shape, q),
                (given.scale, params.scale),
                (given.zero_point, params.zero_point),
                (restored, x),
            ]:
                assert ours.is_meta and ours.shape == real.shape and ours.dtype == real.dtype
            assert dequantize_linear(shape, params).is_meta
            assert given == copy.deepcopy(given) != params
    q, _ = quantize_linear(x.to("meta"), torch.float8_e5m2, cut, scale_dtype=torch.float16)
    assert q.is_meta and q.dtype == torch.float8_e5m2
    scale, zero = get_scale_and_zero_for(x.to("meta"), "int8", mode, 0)
    assert scale.is_meta and zero.is_meta and scale.shape == zero.shape == (1, 7)
    with pytest.raises(ValueError, match="scale is on the meta device: it has a shape but no"):
        q, params = quantize_linear(x, "int8", cut, mode)
        dequantize_linear(q, dataclasses.replace(params, scale=params.scale.to("meta")))


def test_codes_choose_the_kind_that_comes_back() -> None:
    torch = pytest.importorskip("torch")
    q, params = quantize_linear(matrix(), "int8", Granularity.PerGroup(3), Mode.Asymmetric)
    expected = dequantize_linear(q, params)
    restored = dequantize_linear(torch.from_numpy(q), params)
    assert isinstance(restored, torch.Tensor) and np.array_equal(restored.numpy(), expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_sparse_and_nested_tensors_are_refused() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match=r"layout torch.sparse_coo; only dense"):
        quantize_linear(torch.eye(3).to_sparse(), "int8", Granularity.PerTensor)
    with pytest.raises(TypeError, match=r"tensor is a nested tensor: pass its parts, from unbind"):
        quantize_linear(torch.nested.nested_tensor([torch.ones(3)]), "int8", Granularity.PerTensor)


# ---- ranges and types ----------------------------------------------------------------------------


def test_ranges() -> None:
    x = np.linspace(-127.5, 127.5, 256, dtype="float32")
    for target, mode, narrow, expected in [
        ("int8", Mode.Symmetric, None, (-127, 127)),
        ("int8", Mode.Symmetric, False, (-128, 127)),
        ("int8", Mode.Asymmetric, None, (-128, 127)),
        ("int8", Mode.Asymmetric, True, (-127, 127)),
        ("int2", Mode.Symmetric, None, (-1, 1)),
        ("int2", Mode.Symmetric, False, (-2, 1)),
        ("int1", Mode.Symmetric, None, (-1, 1)),
        ("uint3", Mode.Asymmetric, False, (0, 7)),
        ("int16", Mode.Symmetric, np.True_, (-32767, 32767)),
    ]:
        numbers = x if mode is Mode.Symmetric else x + 127.5
        q, _ = quantize_linear(numbers, target, Granularity.PerTensor, mode, narrow_range=narrow)
        assert (q.min(), q.max()) == expected


def test_helpers_reduce_over_the_dimension_that_is_named() -> None:
    x = matrix()
    for dim, shape in [(None, ()), (PER_ROWS, (6, 1)), (PER_COLUMNS, (1, 8)), (-1, (6, 1))]:
        scale, zero = get_scale_and_zero_for(x, "int8", Mode.Asymmetric, dim)
        assert scale.shape == zero.shape == shape
        assert (scale.dtype, zero.dtype) == (np.float32, np.int32)
    assert per_dim_scale_and_zero_for(x, "int8", Mode.Symmetric)[0].shape == (6, 1)


def test_dtype_none_restores_to_the_type_of_the_scale() -> None:
    q, params = quantize_linear(matrix(dtype="float64"), "int8", Granularity.PerTensor)
    assert dequantize_linear(q, dataclasses.replace(params, dtype=None)).dtype == np.float64
    half = dataclasses.replace(params, scale=params.scale.astype("float16"), dtype=None)
    assert dequantize_linear(q, half).dtype == np.float16
    named = dataclasses.replace(params, dtype="float32")
    assert dequantize_linear(q, named).dtype == np.float32


# ---- NaN, infinity, signs ------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("target", ["int8", "uint8", "int1", "float16"])
def test_a_number_that_is_not_finite_is_named(target: str, bad: float) -> None:
    x = np.abs(np.random.default_rng(0).standard_normal((3, 4, 5)))
    x[1, 2, 3] = bad
    text = rf"^fc1\.weight has {bad:g} at index \(1, 2, 3\), but only finite numbers can be"
    for cut in (Granularity.PerTensor, *map(Granularity.PerDimension, (0, 1, 2))):
        with pytest.raises(ValueError, match=text):
            quantize_linear(x, target, cut, name="fc1.weight")
    with pytest.raises(ValueError, match=r"mark the block with nonfinite='mark'$"):
        quantize_linear(x, target, Granularity.PerTensor)
    with pytest.raises(ValueError, match=r"^tensor has .* at index \(1, 2, 3\)"):
        get_scale_and_zero_for(x, target, Mode.Symmetric, 1)


def test_the_first_of_several_is_named_whatever_the_layout() -> None:
    torch = pytest.importorskip("torch")
    x = torch.ones(6, 5)
    x[4, 1] = x[2, 3] = float("nan")
    for other in (x, x.t().contiguous().t(), x.bfloat16(), torch.nn.Parameter(x)):
        with pytest.raises(ValueError, match=r"tensor has nan at index \(2, 3\)"):
            quantize_linear(other, "int8", Granularity.PerGroup(4, 0))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("target", "mode"),
    [
        ("int8", Mode.Symmetric),
        ("int8", Mode.Asymmetric),
        ("uint4", Mode.Asymmetric),
        ("int1", Mode.Symmetric),
        ("float16", Mode.Symmetric),
    ],
)
def test_a_marked_block_is_nan_and_alone(target: str, mode: Mode, bad: float) -> None:
    x = matrix(6, 10)
    clean = quantize_linear(x, target, Granularity.PerGroup(4), mode)
    x[2, 5] = bad
    q, params = quantize_linear(x, target, Granularity.PerGroup(4), mode, nonfinite="mark")
    block = np.zeros((6, 3), bool)
    block[2, 1] = True
    inside = np.repeat(block, 4, 1)[:, :10]
    assert np.array_equal(np.isnan(params.scale), block)
    assert not params.zero_point[block].any() and not q[inside].any()
    assert np.array_equal(params.scale[~block], clean[1].scale[~block])
    assert np.array_equal(q[~inside], clean[0][~inside])
    restored = dequantize_linear(q, params)
    assert np.array_equal(np.isnan(restored), inside)
    assert params == copy.deepcopy(params) and "(1 NaN)" in repr(params)


def test_negative_numbers_need_a_sign_or_a_zero_point() -> None:
    x = np.array([[1.0, 2.0], [3.0, -0.5]], "float32")
    for target, signed in (("uint8", "int8"), ("uint3", "int3")):
        with pytest.raises(
            ValueError,
            match=rf"^w has -0.5 at index \(1, 1\), but symmetric {target} codes have no sign: use "
            rf"Mode.Asymmetric, or the signed type {signed}$",
        ):
            quantize_linear(x, target, Granularity.PerDimension(1), name="w")
        quantize_linear(x, target, Granularity.PerDimension(1), Mode.Asymmetric)
    quantize_linear(np.abs(x) * np.float32(-0.0), "uint8", Granularity.PerTensor)


# ---- groups --------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(12,), (3, 12), (2, 3, 12), (3, 0), (0, 12)])
def test_groups_and_back(shape: tuple[int, ...], by: int) -> None:
    x = np.arange(np.prod(shape), dtype="int32").reshape(shape) + 1
    groups, ungroup = group(x, by)
    assert groups.shape == (x.size // by, by) and groups.dtype == x.dtype
    assert np.array_equal(groups.reshape(-1), x.reshape(-1))
    assert np.array_equal(ungroup(groups), x)
    assert np.array_equal(ungroup(groups / 2), x / 2)


def test_groups_are_those_of_the_granularity() -> None:
    x = np.random.default_rng(0).standard_normal((4, 12)).astype("float32")
    codes, params = quantize_linear(x, "int8", Granularity.PerGroup(3))
    groups, ungroup = group(x, 3)
    alone, single = quantize_linear(groups, "int8", Granularity.PerDimension(1))
    assert np.array_equal(ungroup(alone), codes)
    assert np.array_equal(single.scale.reshape(4, 4), params.scale)


def test_groups_are_a_view_where_they_can_be() -> None:
    x = np.zeros((4, 6), "float32")
    groups, ungroup = group(x, 3)
    groups[3, 2] = 5
    assert x[1, 5] == 5
    ungroup(groups)[0, 0] = 7
    assert x[0, 0] == 7
    turned = np.arange(6).reshape(2, 3).T
    groups, ungroup = group(turned, 2)
    assert groups.tolist() == [[0, 3], [1, 4], [2, 5]] and np.array_equal(ungroup(groups), turned)


def test_groups_of_torch_tensors() -> None:
    torch = pytest.importorskip("torch")
    for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn):
        x = torch.arange(16.0).reshape(2, 8).to(dtype)
        groups, ungroup = group(x, 4)
        assert groups.shape == (4, 4) and groups.dtype == dtype
        assert torch.equal(ungroup(groups).float(), x.float())
    groups, ungroup = group(torch.empty(2, 8, device="meta"), 4)
    assert groups.is_meta and ungroup(groups).shape == (2, 8)
    leaf = torch.ones(6, requires_grad=True)
    groups, ungroup = group(leaf, 2)
    ungroup(groups * 3).sum().backward()
    assert torch.equal(leaf.grad, torch.full((6,), 3.0))


def test_what_group_refuses() -> None:
    with pytest.raises(TypeError, match=r"tensor must be a torch.Tensor or .*, not list"):
        group([1], 1)
    with pytest.raises(ValueError, match="by=0, but a group has at least 1 number"):
        group(np.ones(3), 0)
    with pytest.raises(TypeError, match=r"by must be an integer, not 1.5"):
        group(np.ones(3), 1.5)
    with pytest.raises(ValueError, match=r"group cuts the last dimension, but this tensor"):
        group(np.ones(()), 1)
    with pytest.raises(ValueError, match=r"shape \(2, 5\) has 5 numbers, no multiple of by=2: pad"):
        group(np.ones((2, 5)), 2)
    _, ungroup = group(np.ones((2, 6)), 2)
    with pytest.raises(ValueError, match=r"groups have shape \(2, 6\); \(6, 2\) is allowed"):
        ungroup(np.ones((2, 6)))
    with pytest.raises(TypeError, match=r"groups must be a torch.Tensor or .*, not list"):
        ungroup([1, 2])
    for call in (lambda masked: group(masked, 2), ungroup):
        with pytest.raises(TypeError, match=r"must be a torch.Tensor or .*, not MaskedArray"):
            call(np.ma.masked_array(np.ones((2, 6))))
