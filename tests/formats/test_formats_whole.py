"""Whole models through compressed-tensors: a real one, and what memory a large one takes."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from quantization import pack_matrix, quantize_model
from quantization.checkpoint.stored_model import StoredLayer, StoredModel, stored_model
from quantization.demo.model_download import cached
from quantization.formats.compressed_tensors import (
    read_compressed_tensors,
    write_compressed_tensors,
)
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


def test_a_real_model_answers_the_same_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    if not cached("smollm2").is_dir() and not os.environ.get("QUANTIZATION_TEST_MODELS"):
        pytest.skip("smollm2 is not in the cache; QUANTIZATION_TEST_MODELS=1 downloads it")
    from quantization.demo.model_sources import load_model

    loaded = load_model("smollm2")
    quantize_model(loaded.model, "w4g32", exclude=["lm_head"])
    stored = stored_model(loaded.model, json.loads(loaded.model.config.to_json_string()))
    write_compressed_tensors(stored, tmp_path / "a")
    again = read_compressed_tensors(tmp_path / "a")
    assert len(again.layers) == len(stored.layers) == 210
    for name, layer in stored.layers.items():
        mine, other = layer.load(), again.layers[name].load()
        assert mine.scheme == other.scheme and torch.equal(mine.scales, other.scales)
        assert torch.equal(mine.packed_weights, other.packed_weights)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    tokens = loaded.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        expected, found = loaded.model(tokens).logits, theirs(tokens).logits
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_one_layer(tmp_path: Path) -> None:
    def resident() -> int:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) * 1024

    count, packed = 48, pack_matrix(torch.randn(1024, 2048), "w8")
    layers = {f"{i}": StoredLayer.of(packed) for i in range(count)}
    write_compressed_tensors(StoredModel(layers, {}), tmp_path / "a")
    total = (tmp_path / "a/model.safetensors").stat().st_size
    assert total > 100_000_000
    peaks = [0]

    def watched(layer: StoredLayer) -> StoredLayer:
        def load():  # what the layer before it left is still there
            made = layer.load()
            peaks.append(resident())
            return made

        return replace(layer, load=load)

    stored = read_compressed_tensors(tmp_path / "a")
    before = resident()
    watching = {name: watched(layer) for name, layer in stored.layers.items()}
    write_compressed_tensors(StoredModel(watching, {}), tmp_path / "b")
    assert len(peaks) == count + 1 and max(peaks) - before < 0.25 * total
