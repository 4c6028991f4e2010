"""Shares of layers, without any process: joined or added up they are the whole layer."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn

from quantization import PackedEmbedding, PackedLinearLayer, QWQALinearLayer
from quantization.distributed import EmbeddingShare, bounds, shard
from quantization.schemes.packed_weights import PARTS
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

EPSILON = 2.0**-24
SCHEMES = [
    *(f"w{bits}g33" for bits in range(2, 9)),
    *(f"w{bits}g32a" for bits in range(1, 9)),
    *("w4", "w3a", "w5t", "w4g16+f32", "nf4", "nf4r", "fp4g16+dq", "mxfp4", "kmeans3", "kmeans2r"),
    *("kmeans2g7", "binary", "binaryg16", "ternary", "ternaryg7", "ternaryg16+dq", "w3g33af"),
    *("w5g16a+dq", "w4g64a+dq", "w5g9af+dq", "w4g1000"),
]
OUT, IN = 43, 205


def layer_of(scheme: str, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Module:
    linear = nn.Linear(IN, OUT, bias=bias, dtype=dtype)
    if scheme == "rows":
        return QWQALinearLayer.from_float(linear)
    if scheme == "float":
        return linear
    return PackedLinearLayer.from_float(linear, scheme)


# ---- where shares begin ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((8, 2), [(0, 4), (4, 8)]),
        ((9, 4), [(0, 3), (3, 5), (5, 7), (7, 9)]),
        ((576, 2, 64), [(0, 320), (320, 576)]),
        ((100, 2, 64), [(0, 64), (64, 100)]),
        ((5, 1, 64), [(0, 5)]),
        ((130, 3, 64), [(0, 64), (64, 128), (128, 130)]),
    ],
)
def test_bounds(arguments: tuple[int, ...], expected: list[tuple[int, int]]) -> None:
    assert bounds(*arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((3, 4), ValueError, "3 features cannot be shared by 4 processes"),
        ((128, 4, 64), ValueError, "2 groups of 64 features cannot be shared by 4 processes"),
        ((0, 1), ValueError, "size is 0; it must be 1 or more"),
        ((4, 0), ValueError, "count is 0"),
        ((4, 2, 0), ValueError, "unit is 0"),
        ((4.5, 2), TypeError, "size must be an integer"),
    ],
)
def test_bounds_that_there_are_not(arguments: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        bounds(*arguments)


# ---- shares along the rows -------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("scheme", ["rows", *SCHEMES])
def test_outputs_of_shares_of_rows_joined_are_the_whole(scheme: str, count: int) -> None:
    layer = layer_of(scheme)
    shares = [shard(layer, 0, i, count) for i in range(count)]
    assert sum(share.out_features for share in shares) == OUT
    assert torch.equal(torch.cat([share.weight for share in shares]), layer.weight)
    for x in (torch.randn(IN), torch.randn(3, IN), torch.randn(2, 30, IN)):
        assert torch.equal(torch.cat([share(x) for share in shares], -1), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("scheme", ["rows", "w4g32a", "w3g33", "nf4"])
def test_shares_of_rows_in_other_types(scheme: str, dtype: torch.dtype) -> None:
    layer = layer_of(scheme, dtype)
    shares = [shard(layer, 0, i, 3) for i in range(3)]
    for tokens in (1, 5, 40):
        x = torch.randn(tokens, IN).to(dtype)
        y = torch.cat([share(x) for share in shares], -1)
        assert y.dtype == dtype and torch.equal(y, layer(x))


# ---- shares along the columns ----------------------------------------------------------------


def parts_of(shares: list[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    inputs = x.split([share.in_features for share in shares], -1)
    return [share(part) for share, part in zip(shares, inputs, strict=True)]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("scheme", ["rows", *SCHEMES])
def test_outputs_of_shares_of_columns_added_up_are_the_whole(scheme: str, count: int) -> None:
    layer = layer_of(scheme)
    shares = [shard(layer, 1, i, count) for i in range(count)]
    assert sum(share.in_features for share in shares) == IN
    assert torch.equal(torch.cat([share.weight for share in shares], 1), layer.weight)
    assert [share.bias is None for share in shares] == [False, *[True] * (count - 1)]
    for x in (torch.randn(IN), torch.randn(3, IN), torch.randn(2, 30, IN)):
        weight = layer.weight.double()
        size = x.double().abs() @ weight.abs().T + layer.bias.double().abs()
        exact = x.double() @ weight.T + layer.bias.double()
        error = (torch.stack(parts_of(shares, x)).sum(0).double() - exact).abs()
        assert (error <= (IN + count + 6) * EPSILON * size).all()


@pytest.mark.parametrize("scheme", ["w3g33", "w3g33af", "w4g32a", "ternaryg7", "w5g16a+dq"])
def test_every_group_is_whole_and_keeps_its_scale(scheme: str) -> None:
    layer = layer_of(scheme)
    group = layer.scheme.group(IN)
    start = 0
    for i in range(4):
        share = shard(layer, 1, i, 4)
        assert start % group == 0 and (share.in_features % group == 0 or i == 3)
        first = start // group
        scales = layer.scales[:, first : first + share.scales.shape[1]]
        assert torch.equal(share.scales, scales)
        start += share.in_features
    assert start == IN


@pytest.mark.parametrize("unit", [1, 5, 66])
def test_a_unit_holds_beside_groups(unit: int) -> None:
    layer = layer_of("w3g33")
    sizes = [shard(layer, 1, i, 2, unit=unit).in_features for i in range(2)]
    assert sizes == {1: [132, 73], 5: [165, 40], 66: [132, 73]}[unit]
    rows = [shard(layer, 0, i, 2, unit=unit).out_features for i in range(2)] if unit < 43 else None
    assert rows in (None, [22, 21], [25, 18])


# ---- what they hold --------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["rows", *SCHEMES, "float"])
@pytest.mark.parametrize("dim", [0, 1])
def test_shares_hold_their_own_bytes_and_no_more(scheme: str, dim: int) -> None:
    layer = layer_of(scheme)
    for i in range(2):
        share = shard(layer, dim, i, 2)
        tensors = [*share.buffers(), *share.parameters()]
        whole = {t.untyped_storage().data_ptr() for t in (*layer.buffers(), *layer.parameters())}
        for tensor in tensors:
            is_kept = tensor.untyped_storage().data_ptr() in whole  # a codebook, scales of rows
            assert is_kept or tensor.untyped_storage().nbytes() == tensor.nbytes
        codes = tensors[0] if scheme != "float" else share.weight
        assert codes.untyped_storage().data_ptr() not in whole
        assert codes.nbytes <= (layer.weight if scheme == "float" else next(layer.buffers())).nbytes


@pytest.mark.parametrize("scheme", ["w4g32", "w8g32", "nf4g32", "binaryg32"])
def test_even_shares_hold_an_nth(scheme: str) -> None:
    layer = PackedLinearLayer(256, 64, bias=False, scheme=scheme)
    book = 0 if layer.codebook is None else layer.codebook.nbytes
    for dim in (0, 1):
        for count in (2, 4):
            for i in range(count):
                assert shard(layer, dim, i, count).nbytes - book == (layer.nbytes - book) // count


def test_a_share_is_like_its_layer() -> None:
    for bias in (True, False):
        layer = layer_of("w4g32a", torch.bfloat16, bias).eval()
        for dim in (0, 1):
            share = shard(layer, dim, 1, 2)
            assert type(share) is PackedLinearLayer and not share.training
            assert share.dtype == torch.bfloat16 and share.scheme == layer.scheme
    layer.bias = nn.Parameter(torch.ones(OUT), requires_grad=False)
    rows, columns = shard(layer, 0, 1, 2), shard(layer, 1, 0, 2)
    assert isinstance(rows.bias, nn.Parameter) and not rows.bias.requires_grad
    assert rows.bias.shape == (21,) and columns.bias is layer.bias
    assert [name for name, _ in rows.named_parameters()] == ["bias"]


@pytest.mark.parametrize("scheme", ["rows", "w3g33a", "w3g33af", "nf4", "ternaryg7", "w5g16a+dq"])
@pytest.mark.parametrize("dim", [0, 1])
def test_shares_on_meta_have_the_shapes(scheme: str, dim: int) -> None:
    layer = layer_of(scheme)
    real = [shard(layer, dim, i, 3) for i in range(3)]
    layer.to("meta")
    for i in range(3):
        share = shard(layer, dim, i, 3)
        for name, tensor in real[i].state_dict().items():
            other = share.state_dict()[name]
            assert other.is_meta and (other.shape, other.dtype) == (tensor.shape, tensor.dtype)


@pytest.mark.parametrize("dim", [0, 1])
def test_float_layers_have_shares_too(dim: int) -> None:
    layer, x = layer_of("float"), torch.randn(3, IN)
    shares = [shard(layer, dim, i, 3) for i in range(3)]
    assert all(type(share) is nn.Linear for share in shares)
    if dim == 0:
        y = torch.cat([share(x) for share in shares], -1)
    else:
        y = torch.stack(parts_of(shares, x)).sum(0)
    torch.testing.assert_close(y, layer(x))


# ---- embeddings ------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["w8", "w3g33a", "nf4", "mxfp4", "kmeans2r", "ternary"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_rows_of_embedding_shares_added_up_are_the_whole(scheme: str, count: int) -> None:
    table = PackedEmbedding(19, IN, scheme=scheme)
    shares = [shard(table, 0, i, count) for i in range(count)]
    words = torch.randint(0, 19, (4, 5))
    assert torch.equal(torch.stack([share(words) for share in shares]).sum(0), table(words))
    assert all(type(share) is EmbeddingShare for share in shares)
    assert sum(share.num_embeddings for share in shares) == 19
    for share in shares:
        for wrong in (19, -1):
            with pytest.raises(IndexError):
                share(torch.tensor([3, wrong]))


def test_an_embedding_share_tells_its_rows_and_compiles() -> None:
    share = shard(PackedEmbedding(20, 45, scheme="w4g16a"), 0, 1, 3)
    assert repr(share).endswith("rows 7..13 of 20)")
    words = torch.tensor([[0, 8, 19]])
    compiled = torch.compile(share, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(words), share(words))
    with pytest.raises(TypeError, match="a share already"):
        shard(share, 0, 0, 2)


def test_a_nan_of_another_share_stays_there() -> None:
    weight = torch.ones(4, 32)
    weight[3, 0] = torch.nan
    table = PackedEmbedding(4, 32, scheme="w4g32")
    table.quantize(weight, nonfinite="mark")
    first, last = (shard(table, 0, i, 2)(torch.tensor([3, 0])) for i in range(2))
    assert not first[0].any() and last[0].isnan().all() and not last[1].any()


# ---- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "arguments", "kind", "message"),
    [
        (nn.ReLU(), (0, 0, 2), TypeError, "ReLU has no shares"),
        (nn.Embedding(4, 4), (0, 0, 2), TypeError, "Embedding has no shares"),
        (PackedLinearLayer(8, 8), (2, 0, 2), ValueError, "dim is 2; shares are along 0"),
        (PackedEmbedding(8, 8), (1, 0, 2), ValueError, "dim is 1; .* an embedding along 0"),
        (PackedLinearLayer(8, 8), (0, 2, 2), ValueError, "index is 2; the 2 shares are 0..1"),
        (PackedLinearLayer(8, 8), (0, -1, 2), ValueError, "index is -1"),
        (PackedLinearLayer(8, 3), (0, 0, 4), ValueError, "3 features cannot be shared by 4"),
        (PackedLinearLayer(128, 8), (1, 0, 4), ValueError, "2 groups of 64 features cannot be"),
    ],
)
def test_bad_arguments(
    layer: nn.Module, arguments: tuple[int, int, int], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        shard(layer, *arguments)


def test_the_layer_is_left_as_it_is() -> None:
    layer = layer_of("w3g33a")
    before = {name: (t.data_ptr(), t.clone()) for name, t in layer.state_dict().items()}
    for dim in (0, 1):
        shard(layer, dim, 1, 2)
    for name, tensor in layer.state_dict().items():
        assert tensor.data_ptr() == before[name][0] and torch.equal(tensor, before[name][1])
    assert set(PARTS) <= set(layer._buffers)
