"""AWQ checkpoints: codes in their interleaved order against a packer in NumPy; refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from quantization import Mode
from quantization.formats import FormatError
from quantization.formats.awq import read_awq
from tests.formats.foreign_oracle import awq_tensors, numbers, write_folder
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

SETTINGS = {"bits": 4, "group_size": 32, "version": "gemm", "quant_method": "awq"}
SETTINGS |= {"zero_point": True, "modules_to_not_convert": None}


def layer_of(
    rng: np.random.Generator, group: int = 32, cols: int = 64, rows: int = 24, zero: int = -1
) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    groups = 1 if group == -1 else -(-cols // group)
    places = np.zeros(cols, int) if group == -1 else np.arange(cols) // group
    codes = rng.integers(0, 16, (cols, rows))
    zeros = rng.integers(0, 16, (groups, rows)) if zero < 0 else np.full((groups, rows), zero)
    scales = rng.uniform(0.01, 1, (groups, rows)).astype(np.float16)
    return awq_tensors(codes, zeros, scales), numbers(codes, zeros, scales, places)


@pytest.mark.parametrize("zero", [-1, 0, 8, 15])
@pytest.mark.parametrize(("group", "cols"), [(32, 64), (128, 384), (-1, 70), (64, 100), (16, 16)])
def test_codes_scales_and_zero_points_are_those_that_were_packed(
    group: int, cols: int, zero: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors, weight = layer_of(rng, group, cols, zero=zero)
    settings = SETTINGS | {"group_size": group}
    stored = read_awq(write_folder(tmp_path, {"model.q": tensors}, settings))
    layer = stored.layers["model.q"]
    packed = layer.load()
    assert layer.shape == packed.shape == (24, cols) and packed.scheme == layer.scheme
    assert layer.scheme.mode is (Mode.Symmetric if zero == 8 else Mode.Asymmetric)
    assert layer.scheme.group(cols) == (cols if group == -1 else min(group, cols))
    np.testing.assert_array_equal(packed.dequantize("float64"), weight.astype(np.float32))


def test_settings_of_autoawq_stand_in_a_file_of_their_own(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors, weight = layer_of(rng)
    own = {"w_bit": 4, "q_group_size": 32, "version": "GEMM", "zero_point": True}
    folder = write_folder(
        tmp_path, {"a": tensors}, own, sidecar="quant_config.json", b=torch.ones(2)
    )
    stored = read_awq(folder)
    np.testing.assert_array_equal(
        stored.layers["a"].load().dequantize("float64"), weight.astype(np.float32)
    )
    assert list(stored.tensors) == ["b"] and stored.assets == ()
    write_folder(folder, {"a": tensors}, SETTINGS)  # both files, one in capitals
    assert read_awq(folder).layers["a"].shape == (24, 64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SETTINGS | {"version": "gemv"}, "in the layout 'gemv'; 'gemm' is the one"),
        (SETTINGS | {"version": "marlin"}, "in the layout 'marlin'"),
        (SETTINGS | {"bits": 8}, r"a has 8 bits; allowed are \(4,\)"),
        (SETTINGS | {"group_size": 0}, "group_size 0; it must be 1 or more, or -1"),
        ({"bits": 4, "version": "gemm"}, "group_size of the quantization settings is missing"),
        (SETTINGS | {"quant_method": "gptq"}, "was quantized by 'gptq', not by 'awq'"),
    ],
)
def test_settings_that_are_not_understood_are_named(
    settings: Any, message: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    folder = write_folder(tmp_path, {"a": layer_of(rng)[0]}, settings)
    with pytest.raises(FormatError, match=message):
        read_awq(folder)


@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        ("qweight", None, "has no tensor a.qweight"),
        ("qzeros", None, "has no tensor a.qzeros"),
        ("scales", None, "has no tensor a.scales"),
        ("qweight", torch.zeros(64, 3), "a.qweight is float32; it must be int32"),
        ("qzeros", torch.zeros(1, 3, dtype=torch.int32), r"a.qzeros has shape \(1, 3\)"),
        ("scales", torch.zeros(2, 32), "a.scales has 32 rows, and a.qweight of 4 bits 24"),
        ("scales", torch.zeros(1, 24), r"a.scales has shape \(1, 24\)"),
    ],
)
def test_tensors_of_another_form_are_named(
    part: str, tensor: Any, message: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors, _ = layer_of(rng)
    tensors.pop(part) if tensor is None else tensors.update({part: tensor})
    folder = write_folder(tmp_path, {"a": tensors}, SETTINGS)
    with pytest.raises(FormatError, match=message):
        read_awq(folder)
