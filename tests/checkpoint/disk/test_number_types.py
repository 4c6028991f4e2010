"""Numbers of the small types that safetensors has pass through our files and the library alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from safetensors.torch import load_file, save_file
from torch import nn

from quantization import load_quantized, quantize_checkpoint, save_quantized
from quantization.checkpoint.disk.json_files import CheckpointError
from quantization.checkpoint.disk.safetensors_files import TensorFile, TensorWriter, read_header
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

NAMES = ("float4_e2m1fn_x2", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e4m3fnuz",
         "float8_e5m2fnuz")  # fmt: skip


def tensor_of(name: str, *shape: int) -> torch.Tensor:
    raw = torch.randint(0, 256, shape, dtype=torch.uint8)
    return raw.view(getattr(torch, name))


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_small_floats_pass_through(name: str, tmp_path: Path) -> None:
    wanted = {"a": tensor_of(name, 4, 6), "b": tensor_of(name, 5), "c": tensor_of(name, 2, 0)}
    save_file(wanted, tmp_path / "theirs.safetensors")
    theirs = TensorFile(tmp_path / "theirs.safetensors")
    forms = {key: (name, tuple(tensor.shape)) for key, tensor in wanted.items()}
    with TensorWriter(tmp_path / "ours.safetensors", forms, {"format": "pt"}) as writer:
        for key, tensor in wanted.items():
            writer.write(key, tensor)
    ours = load_file(tmp_path / "ours.safetensors")
    for key, tensor in wanted.items():
        assert (theirs.header.entries[key].dtype, theirs.header.entries[key].shape) == forms[key]
        for found in (theirs.tensor(key), theirs.to_read(key).load(), ours[key]):
            assert found.dtype == tensor.dtype and found.shape == tensor.shape
            assert bits(found) == bits(tensor)
    assert bits(theirs.rows("a", 1, 3)) == bits(wanted["a"][1:3])


def test_streaming_and_saving_copy_them(tmp_path: Path) -> None:
    more = {f"x.{name}": tensor_of(name, 4, 6) for name in NAMES}
    (tmp_path / "float").mkdir()
    save_file({"0.weight": torch.randn(8, 32)} | more, tmp_path / "float/model.safetensors")
    quantize_checkpoint(tmp_path / "float", tmp_path / "small", "w4g32")
    copied = load_file(tmp_path / "small/model.safetensors")
    model = nn.ParameterDict({n: nn.Parameter(tensor_of(n, 4, 6), False) for n in NAMES})
    save_quantized(model, tmp_path / "b")
    again = nn.ParameterDict({n: nn.Parameter(tensor_of(n, 4, 6), False) for n in NAMES})
    load_quantized(tmp_path / "b", again, verify=True)
    for name in NAMES:
        assert bits(copied[f"x.{name}"]) == bits(more[f"x.{name}"])
        assert bits(again[name]) == bits(model[name])


@pytest.mark.parametrize("shape", [[2, 3], [], [0, 1]])
def test_two_numbers_to_an_element_need_an_even_size(shape: list[int], tmp_path: Path) -> None:
    text = json.dumps({"a": {"dtype": "F4", "shape": shape, "data_offsets": [0, 3]}}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(3))
    with pytest.raises(CheckpointError, match=r"a (has a negative or broken size|is F4 \[\])"):
        read_header(path)


def test_a_single_pair_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="have no dtype float4_e2m1fn_x2, as a has"):
        TensorWriter(tmp_path / "a.safetensors", {"a": ("float4_e2m1fn_x2", ())})
