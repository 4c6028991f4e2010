"""The packed embedding: rows gathered and dequantized, the table never made."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn

from quantization import PackedEmbedding, PackedLinearLayer, pack_matrix
from quantization.ops import packed_rows
from quantization.schemes.packed_weights import PackedWeights
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SCHEMES = [
    *(f"w{bits}g16" for bits in range(2, 9)),
    *(f"w{bits}a" for bits in range(1, 9)),
    "w4t",
    "nf4",
    "fp4g16+dq",
    "mxfp4",
    "kmeans3",
    "kmeans2r",
    "binaryg16",
    "ternary",
    "ternaryg16+dq",
    "w3g16af",
    "w5g16a+dq",
    "w4g16af+dq",
]


def table(**options: Any) -> nn.Embedding:
    return nn.Embedding(20, 45, **options)


def same_state(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return set(mine) == set(theirs) and all(torch.equal(mine[key], theirs[key]) for key in mine)


# ---- what it is and computes -----------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_call_gives_rows_of_the_weight(scheme: str, dtype: torch.dtype) -> None:
    float_table = table(dtype=dtype)
    layer = PackedEmbedding.from_float(float_table, scheme)
    assert torch.equal(layer.weight, pack_matrix(float_table.weight.detach(), scheme).dequantize())
    for rows in (torch.tensor(3), torch.tensor([[0, 19, 3], [3, 3, 1]]), torch.arange(20).int()):
        got = layer(rows)
        assert torch.equal(got, layer.weight[rows.long()]) and got.dtype == dtype
        assert got.shape == (*rows.shape, 45) and not got.requires_grad
    assert layer(torch.empty(0, 2, dtype=torch.long)).shape == (0, 2, 45)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_call_near_the_largest_number_is_finite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    float_table = table(dtype=dtype)
    shares = torch.linspace(0.98, 1, 20, dtype=torch.float64).unsqueeze(1)
    float_table.weight.data = (shares * largest).to(dtype).repeat(1, 45)
    for scheme in ("w8", "w5", "w4", "w4a"):
        layer = PackedEmbedding.from_float(float_table, scheme)
        got = layer(torch.arange(20))
        assert got.isfinite().all() and torch.equal(got, layer.weight)


def test_it_is_an_embedding_of_buffers() -> None:
    layer = PackedEmbedding(20, 45, 3, scheme="w4g16a", dtype=torch.bfloat16)
    assert isinstance(layer, nn.Embedding) and not list(layer.parameters())
    assert set(layer.state_dict()) == {"packed_weights", "scales", "zero_points"}
    assert layer.nbytes == layer.footprint == layer.scheme.nbytes((20, 45), "bfloat16")
    assert (layer.padding_idx, layer.max_norm, layer.sparse) == (3, None, False)
    assert not layer.weight[3].any()
    assert repr(layer) == (
        "PackedEmbedding(20, 45, padding_idx=3, dtype=bfloat16, weights=w4g16a, 620 bytes)"
    )


def test_a_fresh_one_draws_the_numbers_of_nn_embedding() -> None:
    torch.manual_seed(3)
    plain = table()
    torch.manual_seed(3)
    assert (PackedEmbedding(20, 45, scheme="w8").weight - plain.weight).abs().max() < 0.02


def test_the_whole_table_is_never_dequantized(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = PackedEmbedding(20, 45)
    rows: list[int] = []
    decode = packed_rows.decode_rows

    def watched(weights: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.append(weights.shape[0])
        return decode(weights, *rest)

    monkeypatch.setattr(packed_rows, "decode_rows", watched)
    monkeypatch.setattr(PackedWeights, "dequantize", None)
    layer(torch.tensor([[1, 2], [2, 2]]))
    assert rows == [4]


@pytest.mark.parametrize("wrong", [20, -1])
def test_rows_that_are_not_there(wrong: int) -> None:
    with pytest.raises(IndexError):
        PackedEmbedding(20, 45)(torch.tensor([0, wrong]))


@pytest.mark.parametrize("sizes", [(1, 1), (1, 45), (0, 45), (5, 0)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_tiny_and_empty_tables(sizes: tuple[int, int]) -> None:
    layer = PackedEmbedding(*sizes)
    rows = torch.arange(sizes[0])
    assert torch.equal(layer(rows), layer.weight) and layer.weight.shape == sizes


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_norm": 1.0}, ValueError, "max_norm is 1.0: rows that calls would shrink"),
        ({"num_embeddings": -1}, ValueError, "num_embeddings is -1"),
        ({"embedding_dim": 2.5}, TypeError, "embedding_dim must be an integer"),
        ({"padding_idx": 20}, ValueError, "padding_idx is 20; the table has 20 rows"),
        ({"dtype": torch.int8}, TypeError, "dtype int8"),
        ({"scheme": "w0"}, ValueError, "w0|1..8"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PackedEmbedding(**({"num_embeddings": 20, "embedding_dim": 45} | arguments))


def test_negative_padding_rows_count_from_the_end() -> None:
    assert PackedEmbedding(20, 45, -1).padding_idx == table(padding_idx=-1).padding_idx == 19


class Scaled(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Embedding(3, 2, max_norm=1.0), "max_norm: its calls shrink"),
        (Scaled(3, 2), "Scaled is a subclass of nn.Embedding: its forward may do more"),
        (nn.Linear(3, 2), "Linear is not nn.Embedding"),
        (nn.Embedding(3, 2, dtype=torch.complex64), "complex64"),
        (nn.utils.parametrizations.orthogonal(nn.Embedding(3, 2)), "parametrized"),
    ],
)
def test_from_float_says_what_it_cannot_take(module: nn.Module, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        PackedEmbedding.from_float(module)


# ---- how it travels --------------------------------------------------------------------------


def test_copies_casts_and_meta() -> None:
    layer = PackedEmbedding.from_float(table().eval(), "w4g16a")
    rows = torch.tensor([4, 4, 0])
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(rows), layer(rows)) and not other.training
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half(rows).dtype == half.dtype == torch.bfloat16
    assert torch.equal(half.packed_weights, layer.packed_weights)
    assert layer.to("meta")(torch.zeros(2, dtype=torch.long, device="meta")).shape == (2, 45)


def test_a_float_checkpoint_is_quantized_and_one_of_another_scheme_refused() -> None:
    source, layer = table(), PackedEmbedding(20, 45, scheme="w4g16a")
    layer.load_state_dict(source.state_dict())
    assert same_state(layer, PackedEmbedding.from_float(source, "w4g16a"))
    before = copy.deepcopy(layer)
    with pytest.raises(RuntimeError, match=r"scales.*\(20, 6\).*scheme w4g16a"):
        layer.load_state_dict(PackedEmbedding(20, 45, scheme="w4g8a").state_dict())
    assert same_state(layer, before)
    layer.load_state_dict(PackedEmbedding(20, 45, scheme="w4g16a").state_dict())
    assert not same_state(layer, before)


def test_the_weight_cannot_be_assigned() -> None:
    with pytest.raises(AttributeError, match="cannot be assigned"):
        PackedEmbedding(20, 45).weight = nn.Parameter(torch.zeros(20, 45))


@pytest.mark.parametrize("scheme", ["w3g16a", "nf4", "ternary", "mxfp4", "kmeans2r"])
def test_compile_makes_one_graph(scheme: str) -> None:
    torch._dynamo.reset()
    layer = PackedEmbedding(20, 45, scheme=scheme)
    rows = torch.tensor([[4, 4, 0]])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(rows), layer(rows))
    assert torch.equal(torch.fx.symbolic_trace(layer)(rows), layer(rows))
    assert torch.equal(torch.export.export(layer, (rows,)).module()(rows), layer(rows))
    assert torch.equal(torch.vmap(layer)(rows), layer(rows))


def test_other_schemes_and_back_to_float() -> None:
    layer = PackedEmbedding.from_float(table(padding_idx=2), "w4g16")
    wider = layer.to_scheme("w8g8")
    assert torch.equal(wider.weight, layer.weight) and wider.padding_idx == 2
    plain = layer.dequantize()
    assert type(plain) is nn.Embedding and plain.padding_idx == 2
    assert torch.equal(plain.weight, layer.weight) and isinstance(plain.weight, nn.Parameter)


def test_a_linear_layer_and_an_embedding_can_hold_the_same_tensors() -> None:
    layer = PackedEmbedding(20, 45, scheme="w4g16")
    head = PackedLinearLayer.from_packed(layer.packed())
    assert head.packed_weights is layer.packed_weights
    x = torch.randn(2, 45)
    torch.testing.assert_close(head(x), x @ layer.weight.T)
