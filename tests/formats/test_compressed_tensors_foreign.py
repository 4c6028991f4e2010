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


def test_a_quantized_cache_stays_float_and_a_warning_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rng: np.random.Generator
) -> None:
    name = "model.layers.0.self_attn.k_proj"
    write_compressed_tensors(
        stored_of({name: packed_of(rng, "w4g32", 8, 64, torch.float32)}), tmp_path / "a"
    )
    tensors = load_file(tmp_path / "a/model.safetensors")
    config = json.loads((tmp_path / "a/config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
    tensors |= {"model.layers.0.self_attn.k_scale": torch.ones(1)}
    tensors |= {"model.layers.0.self_attn.v_scale": torch.ones(1)}
    with caplog.at_level(logging.WARNING, "quantization"):
        stored = read_compressed_tensors(folder_of(tmp_path / "b", tensors, config))
    assert "quantizes the cache of keys and values too; here it stays float" in caplog.text
    assert list(stored.layers) == [name] and stored.tensors == {}


@pytest.mark.parametrize("place", ["text_config", "compression_config", "nested"])
def test_settings_may_stand_elsewhere(place: str, tmp_path: Path, rng: np.random.Generator) -> None:
    packed = packed_of(rng, "w4g32", 8, 64, torch.float32)
    write_compressed_tensors(stored_of({"up": packed}), tmp_path / "a")
    plain = json.loads((tmp_path / "a/config.json").read_text())["quantization_config"]
    config = {
        "text_config": {"text_config": {"quantization_config": plain, "a": 1}, "b": 2},
        "compression_config": {"compression_config": plain, "b": 2},
        "nested": {"compression_config": {"quantization_config": plain, "sparsity_config": {}}},
    }[place]
    tensors = load_file(tmp_path / "a/model.safetensors")
    stored = read_compressed_tensors(folder_of(tmp_path / "b", tensors, config))
    assert_same(stored.layers["up"].load(), packed)
    left = {"text_config": {"text_config": {"a": 1}, "b": 2}, "compression_config": {"b": 2}}
    assert stored.config == left.get(place)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("layout", ["pack-quantized", "int-quantized"])
def test_one_bit(layout: str, symmetric: bool, tmp_path: Path, rng: np.random.Generator) -> None:
    codes, scales = rng.integers(-1, 1, (32, 64)), rng.uniform(0.1, 1, (32, 2)).astype(np.float32)
    zeros = rng.integers(-1, 1, (32, 2)) * (not symmetric)
    tensors = {"up.weight_scale": torch.from_numpy(scales)}

    def words(bits: np.ndarray) -> torch.Tensor:
        stream = np.packbits(bits + 1, axis=-1, bitorder="little")
        return torch.from_numpy(np.ascontiguousarray(stream).view("<i4"))

    if layout == "pack-quantized":
        tensors |= {"up.weight_packed": words(codes), "up.weight_shape": torch.tensor([32, 64])}
        zero = words(zeros.T).T.contiguous()
    else:
        tensors["up.weight"] = torch.from_numpy(codes.astype(np.int8))
        zero = torch.from_numpy(zeros.astype(np.int8))
    if not symmetric:
        tensors["up.weight_zero_point"] = zero
    form = {"num_bits": 1, "symmetric": symmetric, "strategy": "group", "group_size": 32}
    layer = read_compressed_tensors(folder_of(tmp_path, tensors, settings(form, layout)))
    place = np.arange(64) // 32
    exact = (codes - zeros[:, place]).astype(np.float32) * scales[:, place]
    np.testing.assert_array_equal(layer.layers["up"].load().dequantize(), exact)
    assert str(layer.layers["up"].scheme) == "w1g32a"


@pytest.mark.parametrize("dtype", ["float32", None])
def test_mxfp4_is_read(dtype: str | None, tmp_path: Path, rng: np.random.Generator) -> None:
    codes, exponents = rng.integers(0, 16, (8, 64)), rng.integers(100, 150, (8, 2))
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)
    tensors = {"up.weight_packed": torch.from_numpy(packed)}
    tensors["up.weight_scale"] = torch.from_numpy(exponents.astype(np.uint8))
    form = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
    config = settings(form | {"symmetric": True}, "mxfp4-pack-quantized")
    config |= {} if dtype is None else {"dtype": dtype}
    layer = read_compressed_tensors(folder_of(tmp_path / "a", tensors, config)).layers["up"]
    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    levels = np.concatenate([levels, -levels])
    exact = levels[codes] * 2.0 ** (exponents[:, np.arange(64) // 32] - 127)
    np.testing.assert_array_equal(layer.load().dequantize("float64"), exact)
    assert str(layer.scheme) == "mxfp4" and layer.dtype == (dtype or "bfloat16")
    x = torch.randn(3, 64, dtype=torch.float64)
    torch.testing.assert_close(layer.module()(x), x @ torch.from_numpy(exact).T)
    tensors["up.weight_global_scale"] = torch.ones(1)
    with pytest.raises(FormatError, match=r"has up\.weight_global_scale, and mxfp4-pack-quantized"):
        read_compressed_tensors(folder_of(tmp_path / "b", tensors, config))
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(**form, symmetric=True)
    )
    library = compressors.BaseCompressor.get_value_from_registry("mxfp4-pack-quantized")
    parts = {
        key.removeprefix("up."): tensor for key, tensor in tensors.items() if "global" not in key
    }
    theirs = library.decompress(parts, scheme)["weight"]
    np.testing.assert_array_equal(theirs.double().numpy(), exact)
