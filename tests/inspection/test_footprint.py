"""Every byte is counted once, whoever has it."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
from torch import nn

from quantization import footprint, quantize_model
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


def storages(model: nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    kept = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(kept.values())


def test_owners_and_their_sum() -> None:
    model = nn.ModuleDict(
        {"embed": nn.Embedding(32, 64), "up": nn.Linear(64, 32), "norm": nn.BatchNorm1d(4)}
    )
    model["head"] = nn.Linear(64, 32, bias=False)
    model["head"].weight = model["embed"].weight
    before = footprint(model)
    assert sum(row.nbytes for row in before) == storages(model)
    assert before["float parameters"].shared == 32 * 64 * 4
    quantize_model(model, {"embed": "w4g32a", "head": "w4g32a", "up": "nf4"})
    after = footprint(model)
    assert sum(row.nbytes for row in after) == storages(model)
    assert after["codes"].nbytes == 2 * 32 * 32 and after["codes"].shared == 32 * 32
    assert {"scales", "zero points", "codebooks", "biases", "buffers"} <= {r.owner for r in after}
    assert sum(row.share for row in after) == pytest.approx(1)


def test_views_gradients_and_attributes() -> None:
    big = torch.zeros(100, 8)
    model = nn.Linear(8, 4, bias=False)
    model.weight = nn.Parameter(big[10:14])
    model.cache = torch.zeros(5)
    model.overlap = big[12:20]
    model(torch.ones(1, 8)).sum().backward()
    rows = {row.owner: row for row in footprint(model)}
    assert rows["float parameters"].nbytes == 128 == rows["gradients"].nbytes
    assert rows["plain attributes"].nbytes == 20 + 6 * 32
    assert rows["plain attributes"].shared == 2 * 32
    assert rows["kept alive by views"].nbytes == (100 - 10) * 32
    with pytest.raises(TypeError, match="expected a model"):
        footprint("model")
    assert not len(footprint(nn.Identity())) and footprint(nn.LazyLinear(3)) is not None
