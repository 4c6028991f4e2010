"""What transformers' quantizer refuses, and in which words."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.22")
pytest.importorskip("accelerate")

from safetensors.torch import load_file, save_file
from torch import nn

import quantization.integrations.transformers as integration
from quantization import Scheme, save_quantized
from quantization.integrations.transformers import QuantizationConfig
from tests.integrations.saved_models import load
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


def test_importing_twice_is_harmless() -> None:
    save = transformers.PreTrainedModel.save_pretrained
    try:
        reloaded = importlib.reload(integration)
        assert reloaded.QuantizationConfig is QuantizationConfig
        assert transformers.PreTrainedModel.save_pretrained is save
    finally:
        importlib.reload(integration)


_WITHOUT = """
import sys, transformers
transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
"""


def test_without_the_import_loading_is_an_error(floats: dict[str, Path], tmp_path: Path) -> None:
    model = load("llama", floats["llama"], quantization_config=QuantizationConfig("w4g64a"))
    model.save_pretrained(tmp_path / "theirs")
    save_quantized(model, tmp_path / "ours")
    for folder in ("theirs", "ours"):
        command = [sys.executable, "-c", _WITHOUT, str(tmp_path / folder)]
        # An installed copy would register itself: not here.
        env = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode and "Unknown quantization type, got quantization" in done.stderr
        assert "size mismatch" in done.stderr
        assert "model.layers.{0, 1}.mlp.up_proj.weight" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (({nn.Linear: "w4"},), TypeError, "cannot be saved with the model"),
        (({lambda name, module: True: "w4"},), TypeError, "names, globs and 're:...'"),
        (("w4", [nn.Linear]), TypeError, "cannot be saved with the model"),
        (("w4", None), TypeError, r"exclude is None; give patterns, or \(\) for none"),
        (("w99",), ValueError, "bits"),
        (("nothing",), ValueError, "names no scheme"),
        ((None,), TypeError, "the recipe is None"),
        (({},), ValueError, "the recipe has no rules"),
    ],
)
def test_bad_arguments(arguments: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        QuantizationConfig(*arguments)


@pytest.mark.parametrize(
    ("recipe", "options", "text"),
    [
        ({"no_such_layer": "w4", "*": "w8"}, {}, "'no_such_layer' matches no module"),
        ("w4", {"exclude": ["q_porj"]}, "the nearest names are 'q_proj'"),
        ("w4", {"exclude": (), "strict": True}, "strict: 1 layers would be left"),
        ({"embed_tokens": "w8a16"}, {}, "w8a16 is a linear layer: give embeddings a scheme"),
    ],
)
def test_recipes_that_do_not_fit(
    recipe: Any, options: Any, text: str, floats: dict[str, Path]
) -> None:
    config = QuantizationConfig(recipe, **options)
    with pytest.raises(ValueError, match=text):
        load("tied", floats["tied"], quantization_config=config)


def test_a_weight_that_is_not_finite_is_named(floats: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "nan"
    shutil.copytree(floats["llama"], folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    text = r"model\.layers\.1\.mlp\.up_proj\.weight has nan at index \(3, 5\)"
    with pytest.raises(ValueError, match=text):
        load("llama", folder, quantization_config=QuantizationConfig("w4g64a"))
    config = QuantizationConfig("w4g64a", nonfinite="mark")
    marked = load("llama", folder, quantization_config=config).model.layers[1].mlp.up_proj.weight
    assert torch.isnan(marked).sum() == 64


def test_the_disk_while_quantizing_is_refused(floats: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be quantized and offloaded to the disk at once"):
        load(
            "llama",
            floats["llama"],
            quantization_config=QuantizationConfig("w4"),
            device_map={"model": "cpu", "lm_head": "disk"},
            offload_folder=str(tmp_path),
        )


@pytest.fixture
def saved(floats: dict[str, Path], tmp_path: Path) -> Path:
    model = load("llama", floats["llama"], quantization_config=QuantizationConfig("w4g32a"))
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


LAYER = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"format_version": 2}, "format_version 2; this package reads 1"),
        ({"format_version": None}, "format_version None"),
        ({"format_version": "1"}, "format_version '1'"),
        ({"secret": 1}, "unknown key 'secret'"),
        ({"layers": {LAYER: "w77"}}, f"layer '{LAYER}'"),
        ({"layers": {"nowhere": "w4"}}, "none of the 1 quantized layers"),
        ({"layers": {"model.norm": "w4", LAYER: "w4"}}, "layer model.norm of scheme w4"),
        ({"layers": [1]}, "layers, ties and schemes are objects"),
        ({"ties": {"a.scales": "b"}}, "'a.scales' is tied, and is no tensor of a layer"),
        ({"schemes": {"w4g32a": {"bits": 3}}}, "is described as w3"),
        ({"layers": None}, "without 'layers'"),
        ({"layers": None, "recipe": None}, "neither a 'recipe' nor 'layers'"),
    ],
)
def test_configs_that_are_wrong(change: dict[str, Any], text: str, saved: Path) -> None:
    path = saved / "config.json"
    plain = json.loads(path.read_text())
    plain["quantization_config"] |= change
    path.write_text(json.dumps(plain))
    with pytest.raises(ValueError, match=text):
        load("llama", saved)


@pytest.mark.parametrize(
    ("part", "new", "error", "text"),
    [
        ("packed_weights", None, ValueError, f"not in the checkpoint: {LAYER}.packed_weights"),
        ("scales", None, ValueError, f"not in the checkpoint: {LAYER}.scales"),
        ("zero_points", None, ValueError, f"not in the checkpoint: {LAYER}.zero_points"),
        (
            "packed_weights",
            torch.zeros(96, 31, dtype=torch.uint8),
            ValueError,
            rf"size mismatch for {LAYER}.packed_weights: .*\(96, 31\).*\(96, 32\) of scheme w4g32a",
        ),
        ("packed_weights", torch.zeros(96, 32), TypeError, "packed_weights has dtype float32"),
        ("scales", torch.zeros(96, 2, dtype=torch.uint8), TypeError, "scales"),
        ("scales", torch.zeros(96), ValueError, "size mismatch"),
    ],
)
def test_checkpoints_that_are_wrong(
    part: str, new: Any, error: Any, text: str, saved: Path
) -> None:
    tensors = load_file(saved / "model.safetensors")
    del tensors[f"{LAYER}.{part}"]
    if new is not None:
        tensors[f"{LAYER}.{part}"] = new
    save_file(tensors, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(error, match=text):
        load("llama", saved)


def test_a_dict_is_a_config_too(floats: dict[str, Path]) -> None:
    plain = {"quant_method": "quantization", "recipe": {"*": "w4g64a"}, "exclude": []}
    model = load("llama", floats["llama"], quantization_config=plain)
    assert model.lm_head.scheme == Scheme.parse("w4g64a")


def test_a_config_given_to_a_quantized_model_is_not_obeyed(saved: Path) -> None:
    with pytest.warns(UserWarning, match="from the model will be used"):
        model = load("llama", saved, quantization_config=QuantizationConfig("w8"))
    assert str(model.model.layers[0].mlp.up_proj.scheme) == "w4g32a"


@pytest.mark.parametrize("rules", [{"embed_tokens": "w8", "*": "w4"}, {"*": "w4"}])
def test_tables_of_codes_are_not_resized(rules: Any, floats: dict[str, Path]) -> None:
    model = load("llama", floats["llama"], quantization_config=QuantizationConfig(rules, ()))
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    with pytest.raises(ValueError, match="cannot be resized: resize the float model"):
        model.resize_token_embeddings(270)
    with pytest.raises(ValueError, match="cannot be resized"):
        model.resize_token_embeddings(pad_to_multiple_of=64)
    assert model.get_input_embeddings().num_embeddings == 264
    model = load("llama", floats["llama"], quantization_config=QuantizationConfig("w4"))
    assert model.resize_token_embeddings(270).num_embeddings == 270
