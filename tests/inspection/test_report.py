"""A report says what each layer is: codes counted one by one, errors by their definition."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn

from quantization import (
    Scheme,
    load_quantized,
    pack_matrix,
    quantize_checkpoint,
    quantize_model,
    report,
    save_quantized,
)
from quantization.checkpoint.format import Document, sealed
from quantization.inspection import codes, looked
from quantization.inspection.report import errors_of
from tests.checkpoint_models import float_folder
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

SCHEMES = ["w2a", "w3g5", "w4g64a", "w5", "w6g7af", "w7", "w8", "w8a", "w4g16af+dq", "nf4",
           "mxfp4", "kmeans3", "kmeans4r", "binaryg8", "ternary", "w4g8+cols", "int8"]  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(3, 37), (8, 64), (0, 5), (5, 0)])
def test_codes_are_counted_as_one_by_one(scheme: str, shape: tuple[int, int]) -> None:
    weight = np.random.default_rng(0).normal(size=shape).astype("float32")
    packed = pack_matrix(weight, scheme)
    each = packed.codes.astype("int64") if weight.size else np.zeros(0, "int64")
    counts = codes.code_counts(packed)
    assert counts.sum() == weight.size
    assert [int((each % len(counts) == code).sum()) for code in range(len(counts))] == [*counts]
    by_level = codes.counts_by_level(packed)
    assert sorted(by_level) == sorted(counts)
    if packed.codebook is None and weight.size:
        low, high = int(each.min()), int(each.max())
        used = [i for i, count in enumerate(by_level) if count]
        assert used[-1] - used[0] == high - low


@pytest.mark.parametrize("scheme", ["w4g16a", "nf4", "w8", "ternary", "w4g8+cols", "w3g16af:hqq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_errors_by_their_definition(scheme: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 32, dtype=dtype), nn.Embedding(16, 48, dtype=dtype))
    reference = copy.deepcopy(model)
    quantize_model(model, {"*": scheme, nn.Embedding: "w6"})
    table = report(model, reference)
    assert [row.method for row in table] == [scheme.partition(":")[2] or "rtn", "rtn"]
    for row, new, old in zip(table, model, reference, strict=True):
        decoded = new.packed().dequantize("float32").double()
        error = (decoded - old.weight.detach().double()).abs()
        ratio = old.weight.double().square().sum() / error.square().sum()
        assert row.sqnr == pytest.approx(10 * float(ratio.log10()), abs=1e-3)
        assert row.largest_error == pytest.approx(float(error.max()), rel=1e-5)
        assert row.mean_error == pytest.approx(float(error.mean()), rel=1e-5)
        assert row.nbytes == sum(tensor.nbytes for tensor in new.state_dict().values())
        assert sum(row.codes) == new.packed().codes.numel()
    place = errors_of(model[0].packed(), reference[0].weight).place
    assert place is not None and 0 <= place[0] < 32 and 0 <= place[1] < 48


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(32, 64),
            "attn": nn.MultiheadAttention(64, 2),
            "up": nn.Linear(64, 32),
            "head": nn.Linear(64, 32, bias=False),
        }
    )
    model["head"].weight = model["embed"].weight
    return model


def test_attention_ties_and_methods_survive_a_folder(tmp_path: Path) -> None:
    model, reference = net(), net()
    quantize_model(model, {"embed": "w4", "head": "w4", "up": "nf4:lsq", "*": "w8"})
    table = report(model, reference)
    assert [row.layer for row in table][:2] == ["embed", "attn.q_proj"] and len(table) == 6
    assert table["embed"].aliases == ("head",) and min(row.sqnr for row in table) > 15
    assert type(reference["attn"]) is nn.MultiheadAttention
    save_quantized(model, tmp_path / "saved")
    again = report(tmp_path / "saved", reference)
    assert set(again.to_dict()["pages"]) <= {"file", "small", "huge", ""}
    rows = [[row | {"pages": ""} for row in both.to_records()] for both in (again, table)]
    assert sorted(rows[0], key=str) == sorted(rows[1], key=str)
    loaded = load_quantized(tmp_path / "saved", net())
    assert {r.layer: r.method for r in report(loaded)} == {r.layer: r.method for r in table}
    loaded["up"].load_state_dict(model["up"].state_dict())
    assert report(loaded)["up"].method == ""  # codes of whoever


def test_folders_of_before_are_read_without_their_methods(tmp_path: Path) -> None:
    model = net()
    quantize_model(model, "w4")
    save_quantized(model, tmp_path / "saved")
    document = tmp_path / "saved" / "quantization.json"
    plain = json.loads(document.read_text())
    assert plain["methods"]["up"] == "rtn"
    del plain["methods"]
    document.write_text(json.dumps(sealed(plain)))
    assert {row.method for row in report(tmp_path / "saved")} == {""}
    for wrong in (["up"], {"up": 3}):
        text = json.dumps(sealed(plain | {"methods": wrong})).encode()
        with pytest.raises(ValueError, match="methods that are no names"):
            Document.from_json(text)


def test_a_float_folder_is_a_reference(tmp_path: Path) -> None:
    source = float_folder(tmp_path / "float")
    quantize_checkpoint(source, tmp_path / "new", {"q_proj": "w4g32a:lsq", "*": "w8"})
    table = report(tmp_path / "new", source)
    assert all(row.sqnr > 15 for row in table) and {r.method for r in table} == {"lsq", "rtn"}
    with pytest.raises(ValueError, match="the reference has no float layer"):
        report(tmp_path / "new", net())
    with pytest.raises(TypeError, match="expected a model"):
        report(3)


def test_conv1d_meta_and_models_that_are_layers() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(conv1d(48, 16))
    nn.init.normal_(model[0].weight)
    reference = copy.deepcopy(model)
    quantize_model(model, "w8")
    assert report(model, reference)["0"].sqnr > 35
    meta = report(model.to("meta"))
    assert meta["0"].codes is None and meta["0"].used is None and str(meta)
    layer = quantize_model(nn.Linear(8, 8), "w8a16").model
    assert report(layer)[0].layer == "(the model)" and report(layer)[0].scheme == "w8a16"
    assert str(report(nn.Sequential(nn.Linear(2, 2)))).startswith("0 quantized layers")


def test_the_worst_is_the_one_that_was_damaged() -> None:
    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(6)])
    reference = copy.deepcopy(model)
    quantize_model(model, "w6")
    model[3].scales[5] *= 9
    assert report(model, reference).sort("sqnr")[0].layer == "3"
    assert Scheme.parse("w6").bits == 6 and looked.layers_of(model)[3].module is model[3]
