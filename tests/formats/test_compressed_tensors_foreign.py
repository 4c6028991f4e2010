"""compressed-tensors as other programs write it: layouts and settings that are read."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from safetensors.torch import load_file

from quantization.formats import FormatError
from quantization.formats.compressed_tensors import (
    read_compressed_tensors,
    write_compressed_tensors,
)
from tests.formats.compressed_calls import assert_same, folder_of, packed_of, settings, stored_of
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["channel", "group", "tensor"])
@pytest.mark.parametrize("bits", [4, 8])
def test_int_quantized_weights_are_read(
    bits: int, strategy: str, symmetric: bool, tmp_path: Path, rng: np.random.Generator
) -> None:
    half = 1 << bits - 1
    groups = {"channel": 1, "group": 3, "tensor": 1}[strategy]
    shape = (1,) if strategy == "tensor" else (10, groups)
    codes = rng.integers(-half, half, (10, 96)).astype(np.int8)
    scales = rng.uniform(0.1, 1, shape).astype(np.float32)
    zeros = rng.integers(-half, half, shape).astype(np.int8)
    tensors = {"up.weight": torch.from_numpy(codes), "up.weight_scale": torch.from_numpy(scales)}
    if not symmetric:
        tensors["up.weight_zero_point"] = torch.from_numpy(zeros)
    form = {"num_bits": bits, "symmetric": symmetric, "strategy": strategy}
    form["group_size"] = 32 if strategy == "group" else None
    layer = read_compressed_tensors(folder_of(tmp_path, tensors, settings(form))).layers["up"]
    place = np.arange(96) // 32 if strategy == "group" else np.zeros(96, int)
    wide = np.broadcast_to(scales.reshape(-1, groups), (10, groups))[:, place]
    zero = np.broadcast_to(zeros.reshape(-1, groups), (10, groups))[:, place] * (not symmetric)
    exact = (codes.astype(np.float32) - zero.astype(np.float32)) * wide
    np.testing.assert_array_equal(layer.load().dequantize(), exact)
    assert layer.scheme.bits == bits and layer.load().scheme == layer.scheme


def test_activations_stay_float_and_a_warning_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = settings({"strategy": "channel"})
    group = config["quantization_config"]["config_groups"]["g"]
    group["input_activations"] = {"num_bits": 8, "dynamic": True, "strategy": "token"}
    tensors = {
        "up.weight": torch.ones(4, 8, dtype=torch.int8),
        "up.weight_scale": torch.ones(4, 1),
        "up.input_scale": torch.ones(1),
    }
    with caplog.at_level(logging.WARNING, "quantization"):
        stored = read_compressed_tensors(folder_of(tmp_path, tensors, config))
    assert not stored.tensors and "stay float" in caplog.text
    assert stored.layers["up"].kind == "int8_linear"


def test_settings_name_layers_by_name_pattern_and_class(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    names = {"a.up": "w4g32a", "a.down": "w8", "b.up": "w3"}
    layers = {name: packed_of(rng, scheme, 8, 64, torch.float32) for name, scheme in names.items()}
    folder = tmp_path / "a"
    write_compressed_tensors(stored_of(layers), folder)
    config = json.loads((folder / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    wanted = {4: ["Linear"], 8: [r"re:.*\.down$"], 3: ["b.up", "re:nothing"]}
    for group in groups.values():
        group["targets"] = wanted[group["weights"]["num_bits"]]
    (folder / "config.json").write_text(json.dumps(config))
    again = read_compressed_tensors(folder)
    assert {name: str(layer.scheme) for name, layer in again.layers.items()} == names


def test_zero_points_that_are_not_packed_are_read(tmp_path: Path, rng: np.random.Generator) -> None:
    from quantization.formats.integers import integers_of

    packed = packed_of(rng, "w4g32a", 10, 64, torch.float32)
    write_compressed_tensors(stored_of({"up": packed}), tmp_path / "a")
    tensors = load_file(tmp_path / "a/model.safetensors")
    zeros = integers_of(packed, 4).zero_points.to(torch.int8) - 8
    config = json.loads((tmp_path / "a/config.json").read_text())
    folder_of(tmp_path / "b", tensors | {"up.weight_zero_point": zeros}, config)
    assert_same(read_compressed_tensors(tmp_path / "b").layers["up"].load(), packed)


def test_g_idx_is_followed_or_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    packed = packed_of(rng, "w4g32a", 8, 96, torch.float32)
    write_compressed_tensors(stored_of({"up": packed}), tmp_path / "a")
    tensors = load_file(tmp_path / "a/model.safetensors")
    config = json.loads((tmp_path / "a/config.json").read_text())

    def read(places: torch.Tensor) -> torch.Tensor:
        made = tensors | {"up.weight_g_idx": places.to(torch.int32)}
        folder = folder_of(tmp_path / "b", made, config)
        return read_compressed_tensors(folder).layers["up"].load()

    assert_same(read(torch.full((96,), -1)), packed)
    assert_same(read(torch.arange(96) // 32), packed)
    turned = read(2 - torch.arange(96) // 32)
    assert torch.equal(turned.scales, packed.scales.flip(1))
    sorted_columns, back = read(torch.arange(96) % 3), torch.arange(96).view(32, 3).t().flatten()
    assert torch.equal(sorted_columns.input_order, back.int())
    assert torch.equal(sorted_columns.codes, packed.codes)
    place = torch.arange(96) % 3
    exact = (packed.codes - packed.integer_zero_points()[:, place]) * packed.scales[:, place]
    assert torch.equal(sorted_columns.dequantize(), exact)
    with pytest.raises(FormatError, match=r"up.weight_g_idx gives groups other sizes than 32"):
        read((torch.arange(96) % 4).clamp_max(2))
