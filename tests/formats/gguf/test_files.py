"""GGUF files of any model, by the names of its tensors; whole or not there."""

from __future__ import annotations

import logging
import runpy
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")

from torch import nn

from quantization import (
    PackedEmbedding,
    PackedLinearLayer,
    QWQALinearLayer,
    Target,
    pack_matrix,
    quantize_model,
    replace_linear_layers_with_w8a16,
)
from quantization.checkpoint.disk.stored_tensor import StoredTensor
from quantization.checkpoint.restore import restore_model
from quantization.checkpoint.stored_model import StoredLayer, StoredModel, stored_model
from quantization.formats import FormatError
from quantization.formats.gguf import read_gguf, reader, write_gguf
from quantization.formats.gguf.header import read_header
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "gguf_roundtrip.py"


class Net(nn.Module):
    """Every kind of tensor that GGUF has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 64, padding_idx=3)
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 20, bias=False)
        self.second.weight = self.table.weight
        self.norm = nn.BatchNorm1d(64)  # with a scalar of int64
        self.narrow = nn.Parameter(torch.randn(3, 5, 7).to(torch.float16))
        self.wide = nn.Parameter(torch.randn(4, dtype=torch.float64))
        self.point = nn.Parameter(torch.tensor(2.5))
        self.brain = nn.Parameter(torch.randn(4, 6).to(torch.bfloat16))
        self.register_buffer("bytes8", torch.arange(5, dtype=torch.int8))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(self.first(self.table(tokens))) * self.point)


def net(recipe: object = "w8g32+f16") -> Net:
    model = Net().eval()
    quantize_model(model, {nn.Embedding: recipe, "*": recipe} if recipe else {"*": None})
    return model


def test_any_model_comes_back(tmp_path: Path) -> None:
    model = net()
    written = write_gguf(stored_model(model), tmp_path / "net.gguf", plain=True)
    types = {each.key: each.type for each in written}
    assert types["table.weight"] == types["first.weight"] == "Q8_0" and types["narrow"] == "F16"
    assert types["wide"] == "F64" and types["brain"] == "BF16" and types["bytes8"] == "I8"
    stored = read_gguf(tmp_path / "net.gguf")
    other = restore_model(stored, Net().eval())
    assert isinstance(other.table, PackedEmbedding) and other.table.padding_idx == 3
    tokens = torch.tensor([1, 5, 19])
    assert torch.equal(other(tokens), model(tokens))
    for (name, one), two in zip(
        model.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(one, two) and one.dtype == two.dtype, name


def test_a_layer_that_is_the_model(tmp_path: Path) -> None:
    layer = PackedLinearLayer.from_float(nn.Linear(64, 32), "w4g32+f16")
    write_gguf(stored_model(layer), tmp_path / "layer.gguf", plain=True)
    again = restore_model(read_gguf(tmp_path / "layer.gguf"), nn.Linear(64, 32))
    assert torch.equal(again.weight, layer.weight) and torch.equal(again.bias, layer.bias)


def test_int8_layers_need_scales_of_float16(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    replace_linear_layers_with_w8a16(model, Target.Linear(QWQALinearLayer), [])
    with pytest.raises(FormatError, match=r"0 \(scheme w8\): the scale .* is no number of float16"):
        write_gguf(stored_model(model), tmp_path / "m.gguf", plain=True)
    (written, _) = write_gguf(
        stored_model(model), tmp_path / "m.gguf", plain=True, allow_rounding=True
    )
    restored = read_gguf(tmp_path / "m.gguf").layers["0"].load().dequantize()
    change = float((restored - model[0].weight).abs().max())
    assert written.type == "Q8_0" and 0 < change <= written.moved * 1.001


def test_types_on_request(tmp_path: Path) -> None:
    wide = nn.Sequential(nn.Linear(256, 8), nn.Linear(256, 8), nn.Linear(256, 8))
    quantize_model(wide, "ternaryg256+f16")
    types = {"1": "TQ2_0", "[02]": "F32"}
    written = write_gguf(stored_model(wide), tmp_path / "m.gguf", plain=True, types=types)
    assert {each.key: each.type for each in written if "weight" in each.key} == {
        "0.weight": "F32",
        "1.weight": "TQ2_0",
        "2.weight": "F32",
    }
    stored = read_gguf(tmp_path / "m.gguf")
    assert torch.equal(stored.tensors["0.weight"].load(), wide[0].weight)
    assert torch.equal(stored.layers["1"].load().dequantize(), wide[1].weight)


@pytest.mark.parametrize(
    ("types", "error", "reason"),
    [
        ({"*": "Q6_K"}, FormatError, r"types says 'Q6_K' for '\*'; allowed are"),
        ({"head": "Q8_0"}, ValueError, r"the pattern 'head' of types matches no quantized layer"),
        ({"*": "TQ2_0"}, FormatError, r"codes of -128\.\.127 are not within -1\.\.1"),
        ({"*": "F16"}, FormatError, r"has numbers that F16 does not hold"),
    ],
)
def test_types_that_cannot_be(types, error, reason: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=reason):
        write_gguf(stored_model(net()), tmp_path / "m.gguf", plain=True, types=types)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.ones(3, dtype=torch.bool), r"odd is bool; GGUF has float32, float16, bfloat16"),
        (torch.ones(1, 1, 1, 1, 1), r"odd has 5 dimensions; GGUF has up to 4"),
    ],
)
def test_tensors_without_a_place(tensor: torch.Tensor, reason: str, tmp_path: Path) -> None:
    stored = StoredModel({}, {"odd": StoredTensor.of(tensor)})
    with pytest.raises(FormatError, match=reason):
        write_gguf(stored, tmp_path / "m.gguf", plain=True)


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    def fail() -> torch.Tensor:
        raise OSError("no such disk")

    good = StoredTensor.of(torch.ones(1000))
    bad = StoredTensor((3,), "float32", fail)
    with pytest.raises(OSError, match="no such disk"):
        write_gguf(StoredModel({}, {"a": good, "b": bad}), tmp_path / "m.gguf", plain=True)
    assert list(tmp_path.iterdir()) == []
    path = tmp_path / "m.gguf"
    write_gguf(StoredModel({}, {"a": good}), path, plain=True)
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        write_gguf(StoredModel({}, {"a": good}), path, plain=True)
    with pytest.raises(OSError, match="no such disk"):
        write_gguf(StoredModel({}, {"b": bad}), path, plain=True, overwrite=True)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_tensors_are_views_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(StoredModel({}, {"a": StoredTensor.of(torch.ones(1000))}), path, plain=True)
    stored = read_gguf(path)
    one, two = (stored.tensors["a"].load() for _ in range(2))
    assert one.data_ptr() == two.data_ptr()
    one.zero_()  # stays in memory
    assert read_gguf(path).tensors["a"].load().sum() == 1000


def gguf_file(path: Path, name: str, data: np.ndarray, kind: str) -> Path:
    writer = gguf.GGUFWriter(path, "unheard-of")
    writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["IQ2_XXS", "IQ3_S", "IQ1_M", "NVFP4"])
def test_other_types_are_packed_anew(
    kind: str, tmp_path: Path, rng: np.random.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    length, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    data = rng.integers(0, 100, (16, 512 // length * size), "uint8")
    path = gguf_file(tmp_path / "m.gguf", "a.weight", data, kind)
    expected = torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[kind]))
    with caplog.at_level(logging.WARNING, "quantization"):
        layer = read_gguf(path, plain=True, fallback="w8g16").layers["a"]
        weight = layer.load().dequantize()
    assert layer.shape == (16, 512) and str(layer.scheme) == "w8g16"
    assert (weight - expected).norm() < 0.01 * expected.norm()
    assert f"1 tensors of {kind} have no scheme: packed anew as w8g16" in caplog.text
    assert f"a.weight: {kind} packed anew as w8g16, error 0.00" in caplog.text


def test_blocks_that_are_no_layer_become_floats(tmp_path: Path, rng: np.random.Generator) -> None:
    weights = rng.normal(size=(3, 4, 64)).astype("float32")  # experts, say
    data = gguf.quantize(weights, gguf.GGMLQuantizationType.Q8_0)
    path = gguf_file(tmp_path / "m.gguf", "experts.weight", data, "Q8_0")
    tensor = read_gguf(path, plain=True).tensors["experts.weight"]
    expected = gguf.dequantize(data, gguf.GGMLQuantizationType.Q8_0)
    assert tensor.shape == (3, 4, 64) and np.array_equal(tensor.load().numpy(), expected)
    assert read_gguf(path, plain=True, dtype="float16").tensors["experts.weight"].dtype == "float16"


def test_headers_are_read_as_gguf_reads_them(tmp_path: Path) -> None:
    model = net()
    write_gguf(stored_model(model), tmp_path / "m.gguf", plain=True)
    header, reader = read_header(tmp_path / "m.gguf"), gguf.GGUFReader(tmp_path / "m.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert header.facts == {key: fields[key] for key in fields if not key.startswith("GGUF.")}
    for ours, theirs in zip(header.tensors, reader.tensors, strict=True):
        assert (ours.name, ours.type) == (theirs.name, theirs.tensor_type.name)
        assert ours.shape == tuple(reversed(theirs.shape.tolist()))
        assert ours.data.tobytes() == theirs.data.tobytes()


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path) -> None:
    size = 1 << 20
    tensors = {
        f"t{i}": StoredTensor(
            (size,), "float32", lambda i=i: torch.from_numpy(np.full(size, i, "f4"))
        )
        for i in range(16)
    }
    layers = {
        f"l{i}": StoredLayer.of(pack_matrix(torch.randn(8, 64), "w8g32+f16")) for i in range(3)
    }
    tracemalloc.start()
    write_gguf(StoredModel(layers, tensors), tmp_path / "m.gguf", plain=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * 4 * size
    assert read_gguf(tmp_path / "m.gguf").tensors["t15"].load().unique().tolist() == [15]


def test_types_that_gguf_cannot_restore(tmp_path: Path) -> None:
    data = np.zeros((2, 40), "uint8")
    path = gguf_file(tmp_path / "m.gguf", "a.weight", data, "Q8_1")
    with pytest.raises(FormatError, match=r"a\.weight is Q8_1, which gguf cannot restore"):
        read_gguf(path, plain=True)


def test_gguf_is_an_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r'gguf is needed: pip install "qwqa\[gguf\]"'):
        read_gguf(tmp_path / "absent.gguf")
    with pytest.raises(ImportError, match=r"qwqa\[gguf\]"):
        write_gguf(StoredModel({}, {}), tmp_path / "m.gguf", plain=True)


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_gguf(tmp_path / "absent.gguf")
    with pytest.raises(FormatError, match="is a folder, no GGUF file"):
        read_gguf(tmp_path)
    with pytest.raises(TypeError, match="int8"):
        read_gguf(tmp_path / "absent.gguf", dtype="int8")
    with pytest.raises(ValueError, match="names no scheme"):
        read_gguf(tmp_path / "absent.gguf", fallback="w99x")
    assert reader.PLAIN == "plain"


def test_the_example_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "the same logits" in capsys.readouterr().out
