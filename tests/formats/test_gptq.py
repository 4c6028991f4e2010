"""GPTQ checkpoints: every width, version and grouping against a packer in NumPy; refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from quantization import Mode, Scheme, quantize_model
from quantization.checkpoint.disk.json_files import CheckpointError
from quantization.checkpoint.restore import restore_model
from quantization.checkpoint.stored_model import StoredModel
from quantization.formats import FormatError
from quantization.formats.gptq import read_gptq
from tests.formats.foreign_oracle import gptq_tensors, numbers, write_folder
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

SETTINGS = {"bits": 4, "group_size": 32, "quant_method": "gptq", "checkpoint_format": "gptq"}


def layer_of(
    rng: np.random.Generator,
    bits: int = 4,
    group: int = 32,
    cols: int = 64,
    rows: int = 32,
    *,
    sym: bool = False,
    version: int = 1,
    dtype: Any = np.float16,
    places: np.ndarray | None = None,
) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """The tensors of a random layer, and its weight [out, in] in float64."""
    groups = 1 if group == -1 else -(-cols // group)
    if places is None:
        places = np.zeros(cols, int) if group == -1 else np.arange(cols) // group
    codes = rng.integers(0, 2**bits, (cols, rows))
    zeros = rng.integers(1, 2**bits, (groups, rows))
    zeros = np.full_like(zeros, 2 ** (bits - 1)) if sym else zeros
    scales = rng.uniform(0.01, 1, (groups, rows)).astype(dtype)
    tensors = gptq_tensors(codes, zeros, scales, places, bits, version)
    return tensors, numbers(codes, zeros, scales, places)


def check(stored: StoredModel, name: str, weight: np.ndarray) -> Scheme:
    """The layer has the numbers of ``weight``, rounded once."""
    layer = stored.layers[name]
    packed = layer.load()
    assert packed.scheme == layer.scheme and packed.shape == layer.shape == weight.shape
    exact = packed.dequantize("float64").numpy()
    # computed in float32: of codes of 8 bits and scales of 11 the product is exact
    np.testing.assert_array_equal(exact, weight.astype(np.float32))
    return layer.scheme


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_scales_and_zero_points_are_those_that_were_packed(
    bits: int, sym: bool, version: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    cases = [(32, 64, 32), (-1, 96, 32), (128, 256, 64), (64, 160, 96), (32, 32, 64)]
    layers, weights = {}, {}
    for group, cols, rows in cases:
        name = f"model.layers.{len(layers)}.mlp.up_proj"
        layers[name], weights[name] = layer_of(
            rng, bits, group, cols, rows, sym=sym, version=version
        )
        settings = {"bits": bits, "group_size": group, "desc_act": False, "sym": sym}
        settings |= {"checkpoint_format": {1: "gptq", 2: "gptq_v2"}[version]}
        place = tmp_path / str(len(layers))
        stored = read_gptq(write_folder(place, {name: layers[name]}, settings, config={}))
        scheme = check(stored, name, weights[name])
        assert scheme.mode is (Mode.Symmetric if sym else Mode.Asymmetric) and scheme.bits == bits
        assert str(scheme.granularity) == str(
            Scheme.parse(f"w{bits}" if group == -1 else f"w{bits}g{group}").granularity
        )
        assert stored.layers[name].dtype == "float16" and stored.tensors == {}


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("has_config", [False, True])
def test_dtype_is_the_models_and_scales_keep_theirs(
    dtype: Any, has_config: bool, tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors, weight = layer_of(rng, dtype=dtype)
    config = {"model_type": "llama", "torch_dtype": "bfloat16"} if has_config else None
    folder = write_folder(tmp_path, {"a": tensors}, SETTINGS, config=config)
    layer = read_gptq(folder).layers["a"]
    name = np.dtype(dtype).name
    assert layer.dtype == ("bfloat16" if has_config else name)
    assert layer.load().scales.dtype == getattr(torch, name)
    np.testing.assert_array_equal(layer.load().dequantize("float64"), weight.astype(np.float32))


def test_settings_may_stand_in_a_file_of_their_own(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors, weight = layer_of(rng)
    folder = write_folder(tmp_path, {"a": tensors}, SETTINGS, sidecar="quantize_config.json")
    stored = read_gptq(folder)
    check(stored, "a", weight)
    assert stored.config is None and stored.assets == ()
    (folder / "config.json").write_text(json.dumps({"quantization_config": SETTINGS, "a": 1}))
    assert read_gptq(folder).config == {"a": 1}
    other = {"quantization_config": SETTINGS | {"bits": 8}}
    (folder / "config.json").write_text(json.dumps(other))
    with pytest.raises(FormatError, match=r"quantize_config\.json has bits 4 beside 8"):
        read_gptq(folder)


def test_without_g_idx_groups_lie_in_order(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors, weight = layer_of(rng)
    del tensors["g_idx"]
    check(read_gptq(write_folder(tmp_path, {"a": tensors}, SETTINGS)), "a", weight)


def test_groups_in_another_order_are_kept_by_their_scales(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    places = np.repeat([2, 0, 3, 1], 32)
    tensors, weight = layer_of(rng, cols=128, places=places)
    stored = read_gptq(write_folder(tmp_path, {"a": tensors}, SETTINGS | {"desc_act": True}))
    check(stored, "a", weight)


@pytest.mark.parametrize(("bits", "group", "cols"), [(4, 32, 64), (3, 64, 160), (8, 16, 96)])
@pytest.mark.parametrize("sym", [False, True])
def test_act_order_keeps_every_number_and_multiplies_by_them(
    sym: bool, bits: int, group: int, cols: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    places = rng.permutation(np.arange(cols) // group)
    tensors, weight = layer_of(rng, bits, group, cols, sym=sym, places=places)
    settings = SETTINGS | {"bits": bits, "group_size": group, "desc_act": True}
    stored = read_gptq(write_folder(tmp_path, {"a": tensors}, settings))
    assert check(stored, "a", weight).input_order
    layer, x = stored.layers["a"].module(), torch.randn(3, cols, dtype=torch.float64)
    exact = x @ torch.from_numpy(weight.astype(np.float32)).double().T
    torch.testing.assert_close(layer(x), exact, rtol=1e-12, atol=1e-12)


def test_uneven_groups_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors, _ = layer_of(rng, places=rng.permutation([0] * 31 + [1] * 33))
    folder = write_folder(tmp_path, {"a": tensors}, SETTINGS | {"desc_act": True})
    with pytest.raises(FormatError, match=r"a\.g_idx gives groups other sizes than 32 columns"):
        read_gptq(folder)


def test_a_full_code_of_version_1_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors, _ = layer_of(rng)
    tensors["qzeros"][0, 0] = -1
    folder = write_folder(tmp_path / "1", {"a": tensors}, SETTINGS)
    with pytest.raises(FormatError, match=r"a\.qzeros holds the code 15 .* as 16, some as 0"):
        read_gptq(folder)
    settings = SETTINGS | {"checkpoint_format": "gptq_v2"}
    layer = read_gptq(write_folder(tmp_path / "2", {"a": tensors}, settings)).layers["a"]
    assert layer.load().zero_points is not None


def test_sizes_of_single_layers(tmp_path: Path, rng: np.random.Generator) -> None:
    wide, wide_weight = layer_of(rng, 8, 64, cols=128)
    narrow, narrow_weight = layer_of(rng)
    dynamic = {"-:lm_head": {}, r"+:.*\.down": {"bits": 8, "group_size": 64}, ".*down": {"bits": 2}}
    layers = {"0.down": wide, "0.up": narrow}
    stored = read_gptq(write_folder(tmp_path, layers, SETTINGS | {"dynamic": dynamic}))
    assert str(check(stored, "0.down", wide_weight)) == "w8g64a"
    assert str(check(stored, "0.up", narrow_weight)) == "w4g32a"


def test_a_model_gets_its_layers_and_other_tensors(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors, weight = layer_of(rng, dtype=np.float32)
    bias = torch.from_numpy(rng.normal(size=32).astype(np.float32))
    more = {"0.bias": bias, "1.weight": torch.ones(32), "1.bias": torch.zeros(32)}
    folder = write_folder(tmp_path, {"0": tensors}, SETTINGS, **more)
    (folder / "tokenizer.json").write_text("{}")
    stored = read_gptq(folder)
    assert stored.tensors.keys() == more.keys()
    assert [asset.name for asset in stored.assets] == ["tokenizer.json"]
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.LayerNorm(32))
    restore_model(stored, model)
    x = torch.randn(3, 64)
    exact = torch.nn.functional.layer_norm(
        x.double() @ torch.from_numpy(weight).T + bias.double(), (32,)
    )
    torch.testing.assert_close(model(x).double(), exact, rtol=1e-4, atol=1e-4)


def test_weights_are_read_when_asked_for(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantization.checkpoint.disk.safetensors_files import TensorFile

    read: list[str] = []
    tensor = TensorFile.tensor
    monkeypatch.setattr(
        TensorFile, "tensor", lambda self, key: (read.append(key), tensor(self, key))[1]
    )
    layers = {name: layer_of(rng)[0] for name in "ab"}
    stored = read_gptq(write_folder(tmp_path, layers, SETTINGS))
    assert not any("qweight" in key or "scales" in key for key in read)
    stored.layers["a"].load()
    assert "a.qweight" in read and "b.qweight" not in read


def _without(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


def _as(name: str, tensor: torch.Tensor) -> Any:
    return lambda tensors: tensors.update({name: tensor})


int32 = {"dtype": torch.int32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("qweight"), "has no tensor a.qweight"),
        (_without("qzeros"), "has no tensor a.qzeros"),
        (_without("scales"), "has no tensor a.scales"),
        (_as("qweight", torch.zeros(8, 32)), "a.qweight is float32; it must be int32"),
        (_as("qweight", torch.zeros(8, 16, **int32)), r"a.qweight has shape \(8, 16\)"),
        (_as("qweight", torch.zeros(8, **int32)), r"it must be \(any, any\)"),
        (_as("qzeros", torch.zeros(2, 5, **int32)), r"a.qzeros has shape .*must be \(2, 4\)"),
        (_as("qzeros", torch.zeros(2, 4)), "a.qzeros is float32"),
        (_as("scales", torch.zeros(3, 32)), r"a.scales has shape \(3, 32\)"),
        (_as("scales", torch.zeros(2, 32, **int32)), "a.scales is int32; it must be float32"),
        (_as("g_idx", torch.zeros(64)), "a.g_idx is float32; it must be int32 or int64"),
        (_as("g_idx", torch.zeros(65, **int32)), "a.g_idx has 65 columns"),
        (_as("g_idx", torch.full((64,), 2, **int32)), "a.g_idx names a group that is none of"),
        (_as("g_idx", torch.full((64,), -1, **int32)), "a.g_idx names a group that is none of"),
    ],
)
def test_tensors_of_another_form_are_named(
    change: Any, message: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors, _ = layer_of(rng)
    change(tensors)
    folder = write_folder(tmp_path, {"a": tensors}, SETTINGS)
    with pytest.raises(FormatError, match=message):
        read_gptq(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, "does not say how it was quantized"),
        ([], "the quantization settings are no object"),
        ({}, "bits of the quantization settings is missing; expected int"),
        ({"bits": "4"}, "bits of the quantization settings is '4'"),
        ({"bits": True}, "bits of the quantization settings is True"),
        (SETTINGS | {"bits": 5}, r"a has 5 bits; allowed are \(2, 3, 4, 8\)"),
        (SETTINGS | {"group_size": 0}, "a has group_size 0; it must be 1 or more, or -1"),
        (SETTINGS | {"checkpoint_format": "gptq_v3"}, "in the layout 'gptq_v3'"),
        (SETTINGS | {"checkpoint_format": "marlin"}, "in the layout 'marlin'"),
        (SETTINGS | {"is_marlin_format": True}, "in the layout 'marlin'"),
        (SETTINGS | {"quant_method": "awq"}, "was quantized by 'awq', not by 'gptq'"),
        (SETTINGS | {"dynamic": {"a": {"bits": None}}}, "a has None bits"),
    ],
)
def test_settings_that_are_not_understood_are_named(
    settings: Any, message: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    folder = write_folder(tmp_path, {"a": layer_of(rng)[0]}, settings, config={})
    with pytest.raises(FormatError, match=message):
        read_gptq(folder)


def test_files_that_are_broken_are_named(tmp_path: Path, rng: np.random.Generator) -> None:
    with pytest.raises(FileNotFoundError, match="is no folder"):
        read_gptq(tmp_path / "nothing")
    folder = write_folder(tmp_path, {"a": layer_of(rng)[0]}, SETTINGS)
    index = {"weight_map": {"a.qweight": "../../x.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=re.escape("'../../x.safetensors'")):
        read_gptq(folder)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "config.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(CheckpointError, match="the key 'a' twice"):
        read_gptq(folder)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cut short"):
        read_gptq(folder)


def test_numbers_agree_with_an_own_layer_of_that_scheme(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """What a model quantized here stores under GPTQ's names is read back as the same bytes."""
    from quantization.checkpoint.stored_model import stored_model
    from quantization.formats.integers import integers_of

    model = torch.nn.Sequential(torch.nn.Linear(96, 64, bias=False))
    quantize_model(model, "w4g32a")
    packed = stored_model(model).layers["0"].load()
    found = integers_of(packed, 4)
    tensors = gptq_tensors(
        found.codes.T.numpy(),
        found.zero_points.T.numpy(),
        np.ascontiguousarray(found.scales.T.numpy()),
        np.arange(96) // 32,
        4,
        2,
    )
    settings = SETTINGS | {"checkpoint_format": "gptq_v2"}
    again = read_gptq(write_folder(tmp_path, {"0": tensors}, settings)).layers["0"].load()
    assert again.scheme == packed.scheme
    for part in ("packed_weights", "scales", "zero_points"):
        assert torch.equal(getattr(again, part), getattr(packed, part))
