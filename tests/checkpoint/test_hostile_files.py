"""Files that are broken, lie or come from a later version: a named error, and nothing changed."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import save_file

from quantization import load_quantized, quantize_checkpoint, save_quantized
from quantization.checkpoint import CheckpointError, verify_checkpoint
from quantization.checkpoint.disk.safetensors_files import (
    TensorFile,
    TensorFolder,
    TensorWriter,
    read_header,
)
from quantization.checkpoint.format import sealed
from tests.checkpoint_models import float_folder, net, quantized_net
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


FILE = "model.safetensors"


def write_raw(path: Path, header: Any, data: bytes = b"\0" * 16, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape: Any = (2, 2), offsets: Any = (0, 16), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


TWICE = b'{"a": %b, "a": %b}' % ((json.dumps(entry()).encode(),) * 2)
HEADERS: dict[str, tuple[Any, str]] = {
    "no json": (b"{nonsense", "is not JSON"),
    "no utf-8": (b"\xff\xfe{}", "is not JSON"),
    "a list": ([], "is JSON, but no object"),
    "deep": (b"[" * 100_000, "is not JSON"),
    "twice": (TWICE, "has the key 'a' twice"),
    "no dtype": ({"a": {"shape": [4], "data_offsets": [0, 16]}}, "a has no dtype, shape and data"),
    "dtype": ({"a": entry(dtype="F7")}, "a has the dtype F7; known are F64"),
    "text shape": ({"a": entry(shape=["2", 2])}, "negative or broken size"),
    "bool shape": ({"a": entry(shape=[True, 4])}, "negative or broken size"),
    "negative": ({"a": entry(shape=[-2, -2])}, "negative or broken size"),
    "backwards": ({"a": entry(offsets=[16, 0])}, "negative or broken size"),
    "three offsets": ({"a": entry(offsets=[0, 8, 16])}, "a has no dtype, shape and data_offsets"),
    "size": ({"a": entry(shape=[2, 3])}, r"a is F32 \[2, 3\], 24 bytes, and its place has 16"),
    "wraps": ({"a": entry(shape=[2**32, 2**32, 4])}, "and its place has 16"),
    "beyond": ({"a": entry(shape=[8], offsets=[0, 32])}, "its tensors end at"),
    "hole": ({"a": entry((1,), (0, 4)), "b": entry((2,), (8, 16))}, "b begins behind a hole"),
    "overlap": ({"a": entry(), "b": entry((1,), (0, 4))}, "overlaps another tensor"),
    "short": ({"a": entry((1,), (0, 4))}, "its tensors end at"),
    "control": ({"a\0b": entry()}, "control characters"),
    "metadata": ({"__metadata__": {"a": 1}, "a": entry()}, "metadata of the header are not texts"),
    "zero times huge": ({"a": entry((0, 10**12), (0, 16))}, "0 bytes, and its place has 16"),
    "huge times zero": ({"a": entry((2**62, 0), (0, 0))}, "without numbers sizes up to 16777216"),
    "beyond int64": ({"a": entry((0, 2**63), (0, 0))}, "without numbers sizes up to 16777216"),
    "dimensions": ({"a": entry([1] * 5000, (0, 4))}, "at most 64 dimensions are read"),
}


@pytest.mark.parametrize("case", list(HEADERS))
def test_headers_that_lie(case: str, tmp_path: Path) -> None:
    header, message = HEADERS[case]
    path = write_raw(tmp_path / "model.safetensors", header)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    with pytest.raises(CheckpointError):
        quantize_checkpoint(tmp_path, tmp_path / "new", "w4")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors"]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (".weight", "has '' among its names"),
        ("", "has '' among its names"),
        ("training", "has 'training' among its names"),
        ("a._modules.weight", "has '_modules' among its names"),
        ("a." * 5000 + "b", "has 5001 names; there are at most 100"),
        ("." * 5000, "among its names"),
    ],
)
def test_keys_that_no_module_can_have(key: str, message: str, tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", {key: entry()})
    with pytest.raises(CheckpointError, match=message):
        quantize_checkpoint(tmp_path, tmp_path / "new", "w4")


@pytest.mark.parametrize("shape", [(2**24, 0), (0, 2**24), (0, 5), (0,)])
def test_tensors_without_numbers_pass(shape: tuple[int, ...], tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", {"a.weight": entry(shape, (0, 0))}, b"")
    quantize_checkpoint(tmp_path, tmp_path / "new", "w4g32")
    assert verify_checkpoint(tmp_path / "new") >= 0


@pytest.mark.parametrize("name", [FILE, "other.safetensors", "config.json", "modules.json"])
def test_pipes_are_not_waited_for(name: str, tmp_path: Path) -> None:
    source = float_folder(tmp_path / "float")
    (source / name).unlink(missing_ok=True)
    os.mkfifo(source / name)
    if name == "modules.json":
        quantize_checkpoint(source, tmp_path / "new", "w4")
    elif name.endswith(".safetensors"):
        with pytest.raises(CheckpointError, match=f"{name} is no regular file"):
            TensorFile(source / name)


@pytest.mark.parametrize("given", [5, "LlamaForCausalLM", {"a": 1}, [5], [None]])
def test_architectures_that_are_no_names(given: Any, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    source = float_folder(tmp_path / "float")
    config = {"model_type": "llama", "architectures": given}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"config\.json: architectures is .*; expected a list"
    ):
        quantize_checkpoint(source, tmp_path / "new", "w4")


@pytest.mark.parametrize("wrong", [{"hidden_size": "x"}, {"num_attention_heads": 0}])
def test_configs_that_make_no_model(wrong: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    source = float_folder(tmp_path / "float")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **wrong}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"can make no model of .*config\.json: "):
        quantize_checkpoint(source, tmp_path / "new", "w4")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9, 60])
def test_a_length_that_lies(length: int, tmp_path: Path) -> None:
    path = write_raw(tmp_path / "a.safetensors", {}, b"", length)
    with pytest.raises(CheckpointError, match="no safetensors file, or cut short"):
        read_header(path)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 50, -1])
def test_a_file_cut_short(size: int, tmp_path: Path) -> None:
    save_quantized(quantized_net("w4g32a"), tmp_path / "saved")
    path = tmp_path / "saved/model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    model = net()
    names = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_quantized(tmp_path / "saved", model)
    assert names == {name: id(module) for name, module in model.named_modules()}


def test_every_byte_is_under_a_hash(tmp_path: Path) -> None:
    save_quantized(quantized_net("w4g32a"), tmp_path / "saved")
    path = tmp_path / "saved/model.safetensors"
    good = path.read_bytes()
    header = int.from_bytes(good[:8], "little")
    places = [8, 8 + header // 2, 8 + header, len(good) // 2, len(good) - 1]
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1
        path.write_bytes(bad)
        with pytest.raises(CheckpointError):
            verify_checkpoint(tmp_path / "saved")
    with pytest.raises(CheckpointError, match="has other bytes than were written"):
        load_quantized(tmp_path / "saved", net(), verify=True)
    load_quantized(tmp_path / "saved", net())  # reads no data, and says so in its documentation
    path.write_bytes(good)
    assert verify_checkpoint(tmp_path / "saved") > 10_000


# ---- the document ----------------------------------------------------------------------------


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "quantization.json"
        plain = json.loads(path.read_text())
        change(plain)
        path.write_text(json.dumps(sealed(plain)))  # a liar hashes his lies

    return apply


def layer(plain: dict[str, Any]) -> dict[str, Any]:
    return plain["layers"]["blocks.1.inner"]


DOCUMENTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "later version": (edit(lambda p: p.update(format_version=2)), "needs format version 2"),
    "no version": (edit(lambda p: p.pop("format_version")), "has the format version None"),
    "true": (edit(lambda p: p.update(format_version=True)), "has the format version True"),
    "feature": (edit(lambda p: p.update(required_features=["x"])), r"needs the features \['x'\]"),
    "format": (edit(lambda p: p.update(format="else")), "is not of the format"),
    "no layers": (edit(lambda p: p.pop("layers")), "has no 'layers'"),
    "layers a list": (edit(lambda p: p.update(layers=[])), "has no 'layers', or one that"),
    "kind": (edit(lambda p: layer(p).update(kind="conv")), "'blocks.1.inner' needs a kind out of"),
    "shape": (edit(lambda p: layer(p).update(shape=[96])), "needs a kind"),
    "other shape": (edit(lambda p: layer(p).update(shape=[96, 98])), "needs uint8"),
    "scheme": (edit(lambda p: layer(p)["scheme"].update(bits=9)), "inner': grid 'integer' has"),
    "field": (edit(lambda p: layer(p)["scheme"].update(new=1)), "no field 'new'"),
    "other bits": (edit(lambda p: layer(p)["scheme"].update(bits=5)), "needs uint8"),
    "dtype": (edit(lambda p: layer(p).update(dtype="int8")), "'blocks.1.inner'"),
    "int8": (edit(lambda p: layer(p).update(kind="int8_linear")), "is int8, and its scheme is"),
    "padding": (edit(lambda p: layer(p).update(nf="x")), "expected numbers"),
    "layer field": (
        edit(lambda p: layer(p).update(scale=2)), "inner' has the unknown field 'scale'; known are"
    ),
    "others": (edit(lambda p: p.update(other_files=[])), "has other_files that are no object"),
    "other": (
        edit(lambda p: p.update(other_files={"a": {"bytes": 1}})), ": a is no record of a file"
    ),
    "no file": (edit(lambda p: p["files"].clear()), "has no file and sha256"),
    "outside": (
        edit(lambda p: p["files"].update({"../x": p["files"][FILE]})), "'../x' is no name of a file"
    ),
    "absolute": (
        edit(lambda p: p["files"].update({"/x": p["files"][FILE]})), "'/x' is no name of a file"
    ),
    "no hash": (
        edit(lambda p: p["tensors"]["embed.weight"].pop("sha256")), "embed.weight has no file and"
    ),
    "hash": (
        edit(lambda p: p["files"][FILE].update(header_sha256="00")), "is no record of a file"
    ),
    "bytes": (edit(lambda p: p["files"][FILE].update(bytes=3)), "3 were written"),
    "header": (
        edit(lambda p: p["files"][FILE].update(header_sha256="0" * 64)), "its header is not the one"
    ),
    "tensor gone": (
        edit(lambda p: p["tensors"].pop("embed.weight")), "embed.weight is not both in"
    ),
    "tie": (edit(lambda p: p["ties"].update({"x": "nowhere"})), "ties x to nowhere, which cannot"),
    "tie over": (
        edit(lambda p: p["ties"].update({"embed.weight": "blocks.1.gain"})), "which cannot be"
    ),
    "not json": (lambda f: (f / "quantization.json").write_text("{"), "is not JSON"),
    "twice": (lambda f: (f / "quantization.json").write_text('{"a":1,"a":2}'), "key 'a' twice"),
    "no document": (lambda f: (f / "quantization.json").unlink(), "a folder without quantization"),
    "no tensors": (lambda f: (f / FILE).unlink(), "has no file model.safetensors"),
    "other tensors": (
        lambda f: save_file({"a": torch.ones(1)}, f / FILE), "bytes; [0-9]+ were written"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(DOCUMENTS))
def test_documents_that_lie(case: str, tmp_path: Path) -> None:
    change, message = DOCUMENTS[case]
    save_quantized(quantized_net("w4g32a"), tmp_path / "saved")
    change(tmp_path / "saved")
    model = net()
    names = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises((CheckpointError, FileNotFoundError), match=message):
        load_quantized(tmp_path / "saved", model)
    assert names == {name: id(module) for name, module in model.named_modules()}


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no folder"):
        load_quantized(tmp_path / "none", net())


# ---- folders of floats -----------------------------------------------------------------------


def index_of(folder: Path, **weight_map: str) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= weight_map
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "C:\\x", "a\0b"]
)
def test_an_index_that_names_other_places(name: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"secret")
    source = float_folder(tmp_path / "float", shards=2)
    index_of(source, **{"model.norm.weight": name})
    with pytest.raises(CheckpointError, match="is no name of a file in"):
        quantize_checkpoint(source, tmp_path / "new", "w4")
    assert not (tmp_path / "new").exists()


def test_an_index_and_its_files_disagree(tmp_path: Path) -> None:
    source = float_folder(tmp_path / "float", shards=2)
    index_of(source, **{"ghost.weight": "model-00001-of-00002.safetensors"})
    with pytest.raises(CheckpointError, match=r"has ghost\.weight in .*, which lacks it"):
        TensorFolder(source)
    index_of(source, **{"ghost.weight": "model-00003-of-00002.safetensors"})
    with pytest.raises(FileNotFoundError, match="has no file model-00003"):
        TensorFolder(source)
    (source / "model.safetensors.index.json").write_text('{"weight_map": []}')
    with pytest.raises(CheckpointError, match="has no weight_map"):
        TensorFolder(source)


def test_a_key_in_two_files(tmp_path: Path) -> None:
    source = float_folder(tmp_path / "float", shards=2)
    (source / "model.safetensors.index.json").unlink()
    shutil.copy(source / "model-00001-of-00002.safetensors", source / "z.safetensors")
    with pytest.raises(CheckpointError, match="is both in model-00001"):
        TensorFolder(source)


def test_a_folder_without_tensors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no safetensors files"):
        TensorFolder(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a folder nor a file"):
        TensorFolder(tmp_path / "none")


def test_links_are_followed(tmp_path: Path) -> None:
    source = float_folder(tmp_path / "float")
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / FILE).symlink_to(source / FILE)
    assert TensorFolder(linked).file_of.keys() == TensorFolder(source).file_of.keys()


def test_the_writer_refuses_other_tensors_than_announced(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with (
        pytest.raises(CheckpointError, match=r"a was announced as float32 \(2,\) and is float64"),
        TensorWriter(path, {"a": ("float32", (2,))}) as writer,
    ):
        writer.write("a", torch.ones(2, dtype=torch.float64))
    with (
        pytest.raises(CheckpointError, match="a was announced and not written"),
        TensorWriter(path, {"a": ("float32", (2,))}),
    ):
        pass
    with pytest.raises(CheckpointError, match="have no dtype int4"):
        TensorWriter(path, {"a": ("int4", (2,))})
