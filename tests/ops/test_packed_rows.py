"""Rows decoded by torch operators equal those that the packed matrix gives, bit for bit."""

from __future__ import annotations

import itertools

import pytest

torch = pytest.importorskip("torch")

from quantization import Scheme, pack_matrix
from quantization.ops.packed_rows import TERNARY, decode_rows
from quantization.schemes.packed_weights import PARTS
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

SIZES = [(1, 1), (3, 2), (2, 7), (5, 8), (4, 9), (3, 64), (2, 65), (7, 130)]
SPANS = ["", "g1", "g3", "g8", "g64", "t"]
GRIDS = [
    *(f"w{bits}{{}}" for bits in range(2, 9)),
    *(f"w{bits}{{}}a" for bits in range(1, 9)),
    *(f"w{bits}{{}}af" for bits in (2, 5)),
    *(f"kmeans{bits}{{}}" for bits in (1, 3)),
    "nf4{}",
    "fp4{}",
    "binary{}",
    "ternary{}",
]


def decoded(
    weight: torch.Tensor, scheme: Scheme, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    packed = pack_matrix(weight, scheme)
    parts = [getattr(packed, name) for name in PARTS[:5]]
    few = [part if part is None or len(part) != len(weight) else part[rows] for part in parts]
    bits = TERNARY if scheme.grid == "ternary" else scheme.bits
    got = decode_rows(*few, bits, scheme.group(weight.shape[1]), weight.shape[1])
    assert got.dtype == torch.float32
    return got, packed.dequantize("float32")[rows]


@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid_span_and_length(grid: str) -> None:
    torch.manual_seed(0)
    for (rows, cols), span in itertools.product(SIZES, SPANS):
        weight = torch.randn(rows, cols) * 3
        picked = torch.randint(rows, (4,))
        got, wanted = decoded(weight, Scheme.parse(grid.format(span)), picked)
        assert torch.equal(got, wanted), (grid, span, rows, cols)


@pytest.mark.parametrize("scheme", ["mxfp4", "w4g3+dq", "nf4g8+dq", "ternaryg5+dq", "w3g4a+dq"])
@pytest.mark.parametrize("size", [1.0, 1e-37, 1e37])
def test_scales_that_are_codes(scheme: str, size: float) -> None:
    torch.manual_seed(0)
    for rows, cols in SIZES:
        weight = torch.randn(rows, cols).clamp(-3, 3) * size
        got, wanted = decoded(weight, Scheme.parse(scheme), torch.arange(rows))
        assert torch.equal(got, wanted), (rows, cols)


def test_exponents_at_their_ends() -> None:
    codes = torch.full((1, 2), 0x22, dtype=torch.uint8)  # the level 1.0 of E2M1, four times
    levels = pack_matrix(torch.zeros(1, 1), "mxfp4").codebook
    scales = torch.tensor([[0, 1, 254, 255]], dtype=torch.uint8)
    got = decode_rows(codes, scales, None, None, levels, 4, 1, 4)
    assert got[0, :3].tolist() == [2.0**-127, 2.0**-126, 2.0**127] and got[0, 3].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_floats_of_other_types_are_read_as_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for scheme in ("w4g8af", "nf4g8", "w3a"):
        got, wanted = decoded(torch.randn(4, 30).to(dtype), Scheme.parse(scheme), torch.arange(4))
        assert torch.equal(got, wanted)
