"""The bound that a shared model is held to, and the bytes that a process is said to hold."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
from torch import nn

from quantization import PackedLinearLayer, QWQALinearLayer
from quantization.distributed import (
    ColwiseQuantized,
    RowwiseQuantized,
    allowed_difference,
    held_bytes,
    shard,
)
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


class InParts(nn.Module):
    """A layer as the sum of its shares, as processes would compute it."""

    def __init__(self, layer: nn.Module, count: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(shard(layer, 1, i, count) for i in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inputs = x.split([part.in_features for part in self.parts], -1)
        pairs = zip(self.parts, inputs, strict=True)
        return torch.stack([part(x) for part, x in pairs]).sum(0)


@pytest.mark.parametrize("count", [2, 4])
def test_sums_of_shares_stay_within_it_and_wrong_ones_do_not(count: int) -> None:
    torch.manual_seed(0)
    whole = nn.Sequential(PackedLinearLayer(256, 256, scheme="w4g32a"), nn.GELU())
    whole.append(QWQALinearLayer(256, 16))
    plan, x = {"0": RowwiseQuantized(), "2": ColwiseQuantized()}, torch.randn(5, 256)
    allowed = allowed_difference(whole, plan, lambda model: model(x))
    shared = copy.deepcopy(whole)
    shared[0] = InParts(whole[0], count)
    difference = float((shared(x) - whole(x)).abs().max())
    assert 0 < difference <= allowed < 1e-3
    shared[0].parts[1].bias = whole[0].bias  # added twice
    assert float((shared(x) - whole(x)).abs().max()) > 10 * allowed


def test_a_model_without_sums_may_not_move() -> None:
    model, x = nn.Sequential(PackedLinearLayer(64, 8)), torch.randn(2, 64)
    plan = {"0": ColwiseQuantized(gather_output=True)}
    assert allowed_difference(model, plan, lambda model: model(x)) == 0
    with pytest.raises(ZeroDivisionError):
        allowed_difference(model, {"0": RowwiseQuantized()}, lambda model: 1 / 0)
    assert not model[0]._forward_hooks


def test_tied_layers_count_once() -> None:
    layer = PackedLinearLayer(64, 8, scheme="w4g32")
    tied = PackedLinearLayer.from_packed(layer.packed())
    assert held_bytes(nn.Sequential(layer, tied, nn.Linear(2, 2))) == layer.nbytes
