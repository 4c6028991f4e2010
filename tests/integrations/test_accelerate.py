"""accelerate: empty models, loading by device map, offloading to memory and to the disk."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.22")
accelerate = pytest.importorskip("accelerate")

from accelerate.hooks import remove_hook_from_module

import quantization.integrations.transformers as integration
from quantization import quantize_model
from tests import tiny_models
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

RECIPES = ["w8a16", "w4g32a", "nf4+dq"]


def model_of(recipe: Any, kind: str = "llama") -> Any:
    model = tiny_models.random_model(kind)
    quantize_model(model, recipe, exclude="lm_head")
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_models.inputs_for("llama")).logits


def bytes_in_memory(model: Any) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.nbytes for tensor in tensors if not tensor.is_meta)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("include_buffers", [False, True])
def test_an_empty_model_is_loaded(recipe: str, include_buffers: bool, tmp_path: Path) -> None:
    model = model_of(recipe)
    model.save_pretrained(tmp_path)
    with accelerate.init_empty_weights(include_buffers=include_buffers):
        empty = type(model)(copy.deepcopy(model.config))
    quantize_model(empty, recipe, exclude="lm_head")
    assert all(parameter.is_meta for parameter in empty.parameters())
    if include_buffers:
        empty.model.rotary_emb = model.model.rotary_emb  # its table is no part of a state dict
    loaded = accelerate.load_checkpoint_and_dispatch(empty, tmp_path, device_map={"": "cpu"})
    assert torch.equal(logits(loaded.eval()), logits(model))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("offload_buffers", [False, True])
def test_cpu_offload(recipe: str, offload_buffers: bool) -> None:
    model = model_of(recipe)
    wanted, state = logits(model), copy.deepcopy(model.state_dict())
    everything = bytes_in_memory(model)
    accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=offload_buffers)
    resting = bytes_in_memory(model)
    assert torch.equal(logits(model), wanted) and bytes_in_memory(model) == resting
    assert resting < everything * (0.1 if offload_buffers else 1)
    remove_hook_from_module(model, recurse=True)
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in state)
    assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize("recipe", RECIPES)
def test_disk_offload(recipe: str, tmp_path: Path) -> None:
    model = model_of(recipe)
    wanted = logits(model)
    accelerate.disk_offload(model, tmp_path, execution_device="cpu", offload_buffers=True)
    assert bytes_in_memory(model) < 2000
    assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_dispatch_over_memory_and_disk(offload_buffers: bool, tmp_path: Path) -> None:
    model = model_of("w4g32a")
    wanted = logits(model)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=tmp_path, offload_buffers=offload_buffers
    )
    layer = model.model.layers[1].mlp.up_proj
    assert layer.packed_weights.is_meta is offload_buffers and model.lm_head.weight.is_meta
    assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_from_pretrained_over_memory_and_disk(offload_buffers: bool, tmp_path: Path) -> None:
    model = model_of("w4g32a")
    model.save_pretrained(tmp_path / "saved")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    offloaded = type(model).from_pretrained(
        tmp_path / "saved",
        device_map=places,
        offload_folder=str(tmp_path / "offload"),
        offload_buffers=offload_buffers,
    )
    assert torch.equal(logits(offloaded), logits(model))
    offloaded.save_pretrained(tmp_path / "again")
    again = type(model).from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))


def test_a_shared_head_cannot_be_offloaded(tmp_path: Path) -> None:
    model = tiny_models.random_model("tied")
    quantize_model(model, {"re:(embed_tokens|lm_head)$": "w6g32", "*": "w4g32a"})
    model.save_pretrained(tmp_path / "saved")
    places = {"model.embed_tokens": "disk", "lm_head": "cpu"}
    places |= dict.fromkeys(("model.layers", "model.norm", "model.rotary_emb"), "cpu")
    options = {"device_map": places, "offload_folder": str(tmp_path / "offload")}
    kept = type(model).from_pretrained(tmp_path / "saved", **options)
    assert torch.equal(logits(kept), logits(model))
    with pytest.raises(
        ValueError, match=r"to share model\.embed_tokens\.packed_weights, which is off"
    ):
        type(model).from_pretrained(tmp_path / "saved", offload_buffers=True, **options)


def test_the_device_map_counts_codes(tmp_path: Path) -> None:
    """Where memory is short, more layers fit, as those of the map are quantized ones."""
    model = tiny_models.random_model("llama")
    model.save_pretrained(tmp_path)
    config = integration.QuantizationConfig("w4g64", ())
    options = {"device_map": "auto", "max_memory": {"cpu": "150KB"}}
    assert "disk" in type(model).from_pretrained(tmp_path, **options).hf_device_map.values()
    made = type(model).from_pretrained(tmp_path, quantization_config=config, **options)
    assert bytes_in_memory(made) < 150_000 < bytes_in_memory(model)
    assert not [name for name, tensor in made.named_buffers() if tensor.is_meta]


def test_prepare() -> None:
    model = model_of("w4g32a")
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    loss = prepared(
        **tiny_models.inputs_for("llama"), labels=torch.ones(2, 6, dtype=torch.int64)
    ).loss
    accelerator.backward(loss)
    optimizer.step()
    assert torch.isfinite(loss)
