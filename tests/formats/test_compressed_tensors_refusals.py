"""compressed-tensors: what is refused, in which words, and nothing is left behind."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from safetensors.torch import load_file

from quantization import (
    pack_matrix,
)
from quantization.checkpoint.disk.json_files import CheckpointError
from quantization.checkpoint.disk.stored_tensor import StoredTensor
from quantization.checkpoint.stored_model import StoredLayer, StoredModel
from quantization.formats import FormatError
from quantization.formats.compressed_tensors import (
    read_compressed_tensors,
    write_compressed_tensors,
)
from tests.formats.compressed_calls import assert_same, folder_of, packed_of, settings, stored_of
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

# ---- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nf4", r"cannot hold up \(nf4g64\): codes of the grid 'nf4' are places in a table"),
        ("fp4", "the grid 'fp4'"),
        ("mxfp4", "the grid 'mxfp4'"),
        ("kmeans4", "the grid 'kmeans'"),
        ("w4g32af", "its zero points are floats, not whole numbers; quantize that layer to"),
        ("w4g48", "its rows of 64 are no whole number of groups of 48; .* that divides 64"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_before_anything_is_written(
    name: str, message: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    layers = {"a": "w4", "up": name}
    layers = {key: packed_of(rng, scheme, 8, 64, torch.float32) for key, scheme in layers.items()}
    with pytest.raises(FormatError, match=message):
        write_compressed_tensors(stored_of(layers), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_embeddings_and_conv1d_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    packed = packed_of(rng, "w4", 8, 64, torch.float32)
    for layer, what in (
        (StoredLayer.of(packed, "embedding", padding_idx=None), "an embedding"),
        (StoredLayer.of(packed, was_conv1d=True), "a Conv1D of transformers"),
    ):
        with pytest.raises(FormatError, match=f"cannot hold up .*it is {what}.* leave it in float"):
            write_compressed_tensors(StoredModel({"up": layer}, {}), tmp_path / "a")


def test_a_failure_half_way_leaves_nothing(tmp_path: Path, rng: np.random.Generator) -> None:
    packed = packed_of(rng, "w4", 8, 64, torch.float32)
    meta = pack_matrix(torch.empty(8, 64, device="meta"), "w4")
    with pytest.raises(FormatError, match="on meta"):
        write_compressed_tensors(stored_of({"a": packed, "b": meta}), tmp_path / "a")
    assert not list(tmp_path.iterdir())
    write_compressed_tensors(stored_of({"a": packed}), tmp_path / "a")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write_compressed_tensors(stored_of({"a": packed}), tmp_path / "a")

    def fails() -> Any:
        raise OSError("no space")

    bad = StoredModel({"a": StoredLayer.of(packed)}, {"b": StoredTensor((1,), "float32", fails)})
    with pytest.raises(OSError, match="no space"):
        write_compressed_tensors(bad, tmp_path / "a", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert_same(read_compressed_tensors(tmp_path / "a").layers["a"].load(), packed)


def test_a_head_of_its_own_is_not_tied_again(tmp_path: Path, rng: np.random.Generator) -> None:
    packed = packed_of(rng, "w8", 8, 64, torch.float32)
    config = {"tie_word_embeddings": True}
    write_compressed_tensors(stored_of({"lm_head": packed}, config=config), tmp_path / "a")
    plain = json.loads((tmp_path / "a/config.json").read_text())
    assert plain["tie_word_embeddings"] is False and config["tie_word_embeddings"]
    assert plain["quantization_config"]["ignore"] == []


int32 = {"dtype": torch.int32}


@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        ("weight_packed", None, "has no tensor up.weight_packed"),
        ("weight_scale", None, "has no tensor up.weight_scale"),
        ("weight_shape", None, "has no tensor up.weight_shape"),
        ("weight_zero_point", None, "has no tensor up.weight_zero_point"),
        ("weight_packed", torch.zeros(8, 8), "up.weight_packed is float32; it must be int32"),
        ("weight_packed", torch.zeros(8, 9, **int32), r"shape \(8, 9\); it must be \(8, 8\)"),
        ("weight_scale", torch.zeros(8, 3), r"up.weight_scale has shape \(8, 3\)"),
        ("weight_scale", torch.zeros(8, 2, **int32), "up.weight_scale is int32"),
        ("weight_shape", torch.tensor([8, 65]), "up.weight_packed has shape"),
        ("weight_shape", torch.tensor([-8, 64]), "up.weight_shape is -8, 64"),
        ("weight_shape", torch.tensor([8]), r"up.weight_shape has shape \(1,\)"),
        (
            "weight_zero_point",
            torch.zeros(2, 2, **int32),
            r"up.weight_zero_point has shape \(2, 2\)",
        ),
        (
            "weight_zero_point",
            torch.zeros(8, 3, dtype=torch.int8),
            "up.weight_zero_point has shape",
        ),
        ("weight_zero_point", torch.zeros(1, 2), "up.weight_zero_point is float32"),
        ("weight_g_idx", torch.zeros(63, **int32), r"up.weight_g_idx has shape \(63,\)"),
    ],
)
def test_tensors_of_another_form_are_named(
    part: str, tensor: Any, message: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    packed = packed_of(rng, "w4g32a", 8, 64, torch.float32)
    write_compressed_tensors(stored_of({"up": packed}), tmp_path / "a")
    tensors = load_file(tmp_path / "a/model.safetensors")
    tensors.pop(f"up.{part}", None)
    if tensor is not None:
        tensors[f"up.{part}"] = tensor
    config = json.loads((tmp_path / "a/config.json").read_text())
    with pytest.raises(FormatError, match=message):
        read_compressed_tensors(folder_of(tmp_path / "b", tensors, config))


@pytest.mark.parametrize(
    ("form", "more", "message"),
    [
        ({"num_bits": 9}, {}, "weights are 'int' of 9 bits; read are 'int' of 1..8"),
        ({"num_bits": 0}, {}, "weights are 'int' of 0 bits"),
        ({"num_bits": True}, {}, "of True bits"),
        ({"type": "float"}, {}, "weights are 'float' of 8 bits"),
        ({"strategy": "block"}, {}, "the strategy of weights is 'block'"),
        ({"strategy": "group"}, {}, "group_size is None; it must be 1 or more"),
        ({"symmetric": 1}, {}, "symmetric is neither true nor false"),
        ({"dynamic": True}, {}, "weights are dynamic"),
        ({}, {"format": "float-quantized"}, "in the format 'float-quantized'; those that are read"),
        ({}, {"config_groups": []}, "config_groups are no object"),
        ({}, {"config_groups": {"W4A16": ["Linear"]}}, "W4A16 is the name of a preset"),
        ({}, {"config_groups": {"g": {"weights": {}}}}, "g has no targets"),
        (
            {},
            {"config_groups": {"g": {"targets": ["x"], "weights": {}}}},
            "no config group targets",
        ),
        ({}, {"config_groups": {"g": {"targets": ["re:("], "weights": {}}}}, "is no regular"),
        ({}, {"transform_config": {"config_groups": {"u": {}}}}, r"\(transform_config\)"),
        ({}, {"format": [0]}, r"in the format \[0\]; those that are read are pack-quantized"),
        ({}, {"format": {"a": 0}}, "in the format {'a': 0}; those that are read"),
        ({}, {"format": "mxfp4-pack-quantized"}, "num_bits of weights is 8; in mxfp4-pack-quanti"),
        ({}, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "is sparse as well"),
        ({}, {"quant_method": "gptq"}, "was quantized by 'gptq', not by 'compressed-tensors'"),
    ],
)
def test_settings_that_are_not_understood_are_named(
    form: dict[str, Any], more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tensors = {"up.weight": torch.ones(4, 8, dtype=torch.int8), "up.weight_scale": torch.ones(4, 1)}
    config = settings({"strategy": "channel"} | form, **more)
    with pytest.raises(FormatError, match=message):
        read_compressed_tensors(folder_of(tmp_path, tensors, config))


def test_codes_beyond_their_width_are_refused(tmp_path: Path) -> None:
    tensors = {"up.weight": torch.full((4, 8), 8, dtype=torch.int8)}
    tensors["up.weight_scale"] = torch.ones(4, 1)
    config = settings({"num_bits": 4, "strategy": "channel"})
    layer = read_compressed_tensors(folder_of(tmp_path, tensors, config)).layers["up"]
    with pytest.raises(FormatError, match=r"up.weight holds numbers beyond the 4 bits"):
        layer.load()


def test_symmetric_layers_have_no_zero_points(tmp_path: Path) -> None:
    tensors = {"up.weight": torch.ones(4, 8, dtype=torch.int8), "up.weight_scale": torch.ones(4, 1)}
    tensors["up.weight_zero_point"] = torch.zeros(4, 1, dtype=torch.int8)
    config = settings({"strategy": "channel"})
    with pytest.raises(
        FormatError, match=r"has up.weight_zero_point, and its config group is symm"
    ):
        read_compressed_tensors(folder_of(tmp_path, tensors, config))


def test_files_that_are_broken_are_named(tmp_path: Path, rng: np.random.Generator) -> None:
    with pytest.raises(FileNotFoundError, match="is no folder"):
        read_compressed_tensors(tmp_path / "nothing")
    layers = {"up": packed_of(rng, "w4", 8, 64, torch.float32)}
    folder = tmp_path / "a"
    write_compressed_tensors(stored_of(layers), folder)
    index = {"weight_map": {"up.weight_packed": "../../x.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=re.escape("'../../x.safetensors'")):
        read_compressed_tensors(folder)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "config.json").unlink()
    with pytest.raises(FormatError, match="does not say how it was quantized"):
        read_compressed_tensors(folder)
