"""Granularity: values that match, hash and pickle, and the block grid that each gives a shape."""

from __future__ import annotations

import copy
import doctest
import pickle

import numpy as np
import pytest

from quantization.numerics import granularity
from quantization.numerics.granularity import (
    PER_COLUMNS,
    PER_ROWS,
    Granularity,
    PerDimension,
    PerGroup,
)
from quantization.ops.native import Grid
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

VALUES = [Granularity.PerTensor, Granularity.PerDimension(0), Granularity.PerGroup(32, 1)]


def describe(value: object) -> tuple:
    match value:
        case Granularity.PerTensor:
            return ("tensor",)
        case Granularity.PerDimension(dim):
            return ("dimension", dim)
        case Granularity.PerGroup(by, dim):
            return ("group", by, dim)
    return ("other",)


def test_match_statements() -> None:
    assert describe(Granularity.PerTensor) == ("tensor",)
    assert describe(Granularity.PerDimension(-2)) == ("dimension", -2)
    assert describe(Granularity.PerGroup(32, 0)) == ("group", 32, 0)
    assert describe("PerTensor") == ("other",)
    match Granularity.PerGroup(by=8):
        case Granularity.PerGroup(by=by, dim=1):
            assert by == 8
        case _:
            pytest.fail("a keyword pattern did not match")


def test_values_are_equal_and_hash_by_their_fields() -> None:
    assert Granularity.PerDimension() == Granularity.PerDimension(PER_ROWS)
    assert Granularity.PerDimension(PER_COLUMNS) != Granularity.PerDimension(PER_ROWS)
    assert Granularity.PerGroup(8) == Granularity.PerGroup(by=8, dim=PER_ROWS)
    assert Granularity.PerGroup(np.int64(8), np.int8(1)) == Granularity.PerGroup(8, 1)
    table = {value: index for index, value in enumerate(VALUES)}
    assert [table[copy.deepcopy(value)] for value in VALUES] == [0, 1, 2]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", VALUES, ids=str)
def test_pickles(value: Granularity, protocol: int) -> None:
    assert pickle.loads(pickle.dumps(value, protocol)) == value
    assert pickle.loads(pickle.dumps(Granularity.PerTensor, protocol)) is Granularity.PerTensor


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_the_repr_builds_the_value(value: Granularity) -> None:
    assert eval(repr(value)) == value


def test_values_cannot_change() -> None:
    for value, field in [(VALUES[1], "dim"), (VALUES[2], "by"), (VALUES[0], "dim")]:
        with pytest.raises((AttributeError, TypeError)):
            setattr(value, field, 3)


@pytest.mark.parametrize(
    ("value", "shape", "grid", "scales"),
    [
        (Granularity.PerTensor, (4, 6), Grid(4, 6, 4, 6), ()),
        (Granularity.PerTensor, (), Grid(1, 1, 1, 1), ()),
        (Granularity.PerTensor, (5,), Grid(1, 5, 1, 5), ()),
        (Granularity.PerTensor, (2, 3, 5), Grid(6, 5, 6, 5), ()),
        (PerDimension(1), (4, 6), Grid(4, 6, 1, 6), (4, 1)),
        (PerDimension(-1), (4, 6), Grid(4, 6, 1, 6), (4, 1)),
        (PerDimension(0), (4, 6), Grid(4, 6, 4, 1), (1, 6)),
        (PerDimension(0), (4, 1), Grid(1, 4, 1, 4), (1, 1)),
        (PerDimension(0), (5,), Grid(1, 5, 1, 5), (1,)),
        (PerDimension(0), (2, 3, 5), Grid(2, 15, 2, 1), (1, 3, 5)),
        (PerDimension(1), (2, 3, 5), Grid(6, 5, 3, 1), (2, 1, 5)),
        (PerDimension(2), (2, 3, 5), Grid(6, 5, 1, 5), (2, 3, 1)),
        (PerDimension(-3), (2, 3, 5), Grid(2, 15, 2, 1), (1, 3, 5)),
        (PerGroup(4), (3, 10), Grid(3, 10, 1, 4), (3, 3)),
        (PerGroup(4, 0), (10, 3), Grid(10, 3, 4, 1), (3, 3)),
        (PerGroup(4, -2), (10, 3), Grid(10, 3, 4, 1), (3, 3)),
        (PerGroup(10**30), (3, 10), Grid(3, 10, 1, 10), (3, 1)),
        (PerGroup(10**30, 0), (3, 10), Grid(3, 10, 3, 1), (1, 10)),
        (PerGroup(4), (3, 0), Grid(3, 0, 1, 1), (3, 0)),
    ],
    ids=str,
)
def test_grids(value: Granularity, shape: tuple, grid: Grid, scales: tuple) -> None:
    assert value.grid(shape) == grid
    assert value.scale_shape(shape) == scales
    assert np.prod(grid.blocks) == np.prod(scales)


@pytest.mark.parametrize("shape", [(4, 6), (3, 4, 5), (7,), (2, 1, 3, 2)])
def test_blocks_hold_the_numbers_that_the_scale_reduces_over(shape: tuple) -> None:
    """Number the blocks by the grid and by broadcasting: they must agree."""
    for dim in range(-len(shape), len(shape)):
        value = PerDimension(dim)
        rows, cols, block_rows, block_cols = value.grid(shape)
        down, across = np.arange(rows) // block_rows, np.arange(cols) // block_cols
        by_grid = down[:, None] * value.grid(shape).blocks[1] + across
        scales = np.arange(np.prod(value.scale_shape(shape))).reshape(value.scale_shape(shape))
        assert (by_grid.reshape(shape) == np.broadcast_to(scales, shape)).all()


def test_refusals_name_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"PerGroup: by=0, but a group has at least 1 number"):
        Granularity.PerGroup(0)
    for wrong in (1.5, "1", None, True):
        with pytest.raises(TypeError, match=rf"dim must be an integer, not {wrong!r}"):
            Granularity.PerDimension(wrong)
        with pytest.raises(TypeError, match=rf"by must be an integer, not {wrong!r}"):
            Granularity.PerGroup(wrong)
    text = r"PerDimension\(dim=2\) does not fit a tensor of shape \(4, 6\): dim must be -2..1"
    with pytest.raises(ValueError, match=text):
        Granularity.PerDimension(2).grid((4, 6))
    with pytest.raises(ValueError, match=r"shape \(\): use Granularity.PerTensor"):
        Granularity.PerDimension(0).scale_shape(())
    with pytest.raises(
        ValueError, match=r"PerGroup\(by=4, dim=1\) cuts a 2-D tensor, but this one"
    ):
        Granularity.PerGroup(4).grid((2, 3, 5))
    with pytest.raises(ValueError, match=r"PerGroup\(by=4, dim=-3\) does not fit"):
        Granularity.PerGroup(4, -3).scale_shape((3, 5))


def test_examples() -> None:
    assert doctest.testmod(granularity).failed == 0
