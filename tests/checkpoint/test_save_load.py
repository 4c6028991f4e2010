"""Save and load: the same bits, ties and behaviour; whole or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn

from quantization import (
    PackedEmbedding,
    QWQALinearLayer,
    load_quantized,
    quantize_model,
    save_quantized,
)
from quantization.checkpoint.writing import write_shard
from tests.checkpoint_models import (
    SCHEMES,
    TOKENS,
    Net,
    bytes_of,
    files_of,
    net,
    quantized_net,
    state_equal,
)
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", [*SCHEMES, "w8a16"])
def test_a_round_trip_keeps_every_bit(recipe: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = quantized_net(recipe, dtype=dtype)
    save_quantized(model, tmp_path / "saved")
    again = load_quantized(tmp_path / "saved", net(9, dtype))
    assert state_equal(model, again)
    assert torch.equal(model(TOKENS), again(TOKENS))
    assert type(again.blocks[1].inner) is type(model.blocks[1].inner)
    save_quantized(again, tmp_path / "twice")
    assert files_of(tmp_path / "saved") == files_of(tmp_path / "twice")


def test_ties_shared_modules_and_the_form_of_parameters_stay(tmp_path: Path) -> None:
    model = quantized_net("w4g32a", embed=True)
    assert model.head.packed_weights is model.embed.packed_weights
    save_quantized(model, tmp_path / "saved")
    with torch.device("meta"):
        bare = Net()
    bare.blocks[0].ramp, bare.blocks[1].ramp = model.blocks[0].ramp, model.blocks[1].ramp
    bare.blocks[0].gain.requires_grad_(False)
    again = load_quantized(tmp_path / "saved", bare).eval()
    assert again is bare and isinstance(again.embed, PackedEmbedding)
    assert again.embed.padding_idx == 0
    assert again.head.packed_weights is again.embed.packed_weights
    assert again.blocks[0] is again.blocks[2]
    assert isinstance(again.blocks[1].gain, nn.Parameter) and again.blocks[1].gain.requires_grad
    assert not again.blocks[0].gain.requires_grad
    assert torch.equal(again(TOKENS), model(TOKENS))
    once = sum(t.nbytes for t in {id(t): t for t in model.state_dict().values()}.values())
    size = (tmp_path / "saved/model.safetensors").stat().st_size
    assert size < once + 4096, "what is tied or shared is written once"


def test_a_float_tie_stays_a_tie(tmp_path: Path) -> None:
    model = quantized_net("w4g32")
    assert type(model.head) is nn.Linear
    save_quantized(model, tmp_path / "saved")
    again = load_quantized(tmp_path / "saved", net(seed=3))
    assert again.head.weight is again.embed.weight
    untied = Net()
    untied.head.weight = nn.Parameter(torch.rand(50, 96))
    again = load_quantized(tmp_path / "saved", untied)
    assert again.head.weight is again.embed.weight, "the checkpoint's tie counts"


def test_the_model_itself_may_be_the_layer(tmp_path: Path) -> None:
    layer = QWQALinearLayer(40, 30)
    save_quantized(layer, tmp_path / "saved")
    again = load_quantized(tmp_path / "saved", nn.Linear(40, 30))
    assert type(again) is QWQALinearLayer and state_equal(layer, again)


def test_hooks_training_flag_attributes_and_trained_biases_stay(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    quantize_model(model, "w4")
    model[1].bias = nn.Parameter(model[1].bias)
    save_quantized(model, tmp_path / "saved")
    calls = []
    target = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).train()
    quantize_model(target, {"1": "w8"})
    target[1].bias = nn.Parameter(target[1].bias)
    target[0].register_forward_hook(lambda *_: calls.append(1))
    target[0].note = "mine"
    load_quantized(tmp_path / "saved", target)
    target(torch.rand(1, 8))
    assert calls == [1] and target[0].note == "mine" and target[0].training
    assert isinstance(target[1].bias, nn.Parameter)
    assert str(target[1].scheme) == "w4"


@pytest.mark.parametrize("limit", [1, 4000, 20_000])
def test_shards_have_an_index_and_load_alike(limit: int, tmp_path: Path) -> None:
    model = quantized_net("w4g32a")
    save_quantized(model, tmp_path / "saved", max_shard_bytes=limit)
    files = sorted(path.name for path in (tmp_path / "saved").glob("*.safetensors"))
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "saved/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert state_equal(load_quantized(tmp_path / "saved", net()), model)


def test_other_libraries_can_open_the_files(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = quantized_net("w3g33a")
    save_quantized(model, tmp_path / "saved")
    tensors = load_file(tmp_path / "saved/model.safetensors")
    state = model.state_dict()
    assert all(bytes_of(tensors[key]) == bytes_of(state[key]) for key in tensors)
    assert all(tensor.data_ptr() % tensor.dtype.itemsize == 0 for tensor in tensors.values())


# ---- NumPy alone -----------------------------------------------------------------------------


def decode(folder: Path, name: str) -> np.ndarray:
    """A weight by the words of ``how_to_read``, with json and NumPy only."""
    document = json.loads((folder / "quantization.json").read_text())
    layer = document["layers"][name]
    (rows, cols), scheme, group = layer["shape"], layer["scheme"], layer["group"]
    raw = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    kinds = {"F32": "<f4", "U8": "u1", "I8": "i1", "F16": "<f2", "F64": "<f8"}

    def tensor(part: str) -> np.ndarray | None:
        entry = header.get(f"{name}.{part}")
        if entry is None:
            return None
        first, last = (8 + length + place for place in entry["data_offsets"])
        return np.frombuffer(raw[first:last], kinds[entry["dtype"]]).reshape(entry["shape"])

    def codes(packed: np.ndarray, count: int, bits: int) -> np.ndarray:
        flat = np.unpackbits(packed, axis=1, bitorder="little")[:, : count * bits]
        return flat.reshape(rows, count, bits) @ (1 << np.arange(bits))

    column = np.arange(cols) // group
    scales = tensor("scales")
    if layer["kind"] == "int8_linear":
        return tensor("int8_weights").astype("f4") * scales[:, None]
    if scheme["grid"] == "mxfp4":
        scales = np.ldexp(np.float32(1), scales.astype(int) - 127)
    if (steps := tensor("scale_steps")) is not None:
        scales = scales * steps[:, None]
    bits, book = scheme["bits"], tensor("codebook")
    zeros = tensor("zero_points")
    if scheme["grid"] == "ternary":
        digits = tensor("packed_weights")[:, :, None].astype(int) // 3 ** np.arange(5) % 3
        value = digits.reshape(rows, -1)[:, :cols]
        value = np.where(value == 2, -1, value)
    else:
        value = codes(tensor("packed_weights"), cols, bits)
        if book is not None:
            value = book[np.arange(rows)[:, None] if len(book) > 1 else 0, value]
        elif zeros is None:
            value = np.where(value >= 1 << bits - 1, value - (1 << bits), value)
    if zeros is not None:
        zeros = zeros if zeros.dtype != np.uint8 else codes(zeros, scales.shape[1], bits)
        value = value - zeros[:, column].astype("f4")
    return value.astype("f4") * scales.astype("f4")[:, column]


@pytest.mark.parametrize("recipe", [*SCHEMES, "w8a16"])
def test_numpy_alone_can_decode_it(recipe: str, tmp_path: Path) -> None:
    model = quantized_net(recipe)
    save_quantized(model, tmp_path / "saved")
    weight = model.blocks[1].inner.weight.numpy()
    assert np.array_equal(decode(tmp_path / "saved", "blocks.1.inner"), weight)


# ---- whole or not at all ---------------------------------------------------------------------


@pytest.mark.parametrize("what", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_save_leaves_nothing(what: BaseException, tmp_path: Path, monkeypatch) -> None:
    calls = []

    def fail(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise what
        return write_shard(*arguments)

    monkeypatch.setattr("quantization.checkpoint.writing.write_shard", fail)
    save = lambda: save_quantized(quantized_net("w4"), tmp_path / "new", max_shard_bytes=4000)  # noqa: E731
    with pytest.raises(type(what)):
        save()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="sets a limit on file sizes in a child")
def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    code = """
import resource, signal, sys, torch
from quantization import QWQALinearLayer, save_quantized
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_quantized(QWQALinearLayer(1000, 1000), sys.argv[1])
except OSError as error:
    print(type(error).__name__)
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "new")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.stdout == "OSError\n", run.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_failed_overwrite_keeps_the_old_folder(tmp_path: Path, monkeypatch) -> None:
    save_quantized(quantized_net("w4"), tmp_path / "saved")
    before = files_of(tmp_path / "saved")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("quantization.checkpoint.writing.write_shard", fail)
    with pytest.raises(OSError, match="No space"):
        save_quantized(quantized_net("w8"), tmp_path / "saved", overwrite=True)
    assert files_of(tmp_path / "saved") == before
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


class Slow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def get_extra_state(self) -> object:
        return {"any": "thing"}


def test_what_cannot_be_saved_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="extra state, which is no tensor"):
        save_quantized(Slow(), tmp_path / "new")
    with pytest.raises(ValueError, match="lazy: weight has no shape"):
        save_quantized(nn.Sequential(nn.LazyLinear(3)), tmp_path / "new")
    with pytest.raises(TypeError, match="expected a model"):
        save_quantized({"a": torch.ones(1)}, tmp_path / "new")
    with pytest.raises(ValueError, match="max_shard_bytes is 0"):
        save_quantized(nn.Linear(2, 2), tmp_path / "new", max_shard_bytes=0)
    assert list(tmp_path.iterdir()) == []
