"""Streaming: the bits of the model quantized whole; memory of a tensor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file
from torch import nn

from quantization import (
    PackedEmbedding,
    Scheme,
    load_quantized,
    quantize_checkpoint,
    quantize_model,
    save_quantized,
)
from quantization.checkpoint import CheckpointError
from quantization.checkpoint.source.skeleton import skeleton_of_names
from tests.checkpoint.streaming_calls import RULES
from tests.checkpoint_models import bytes_of, files_of, float_folder, peak_of_streaming
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


def whole(source: Path, recipe, **options) -> nn.Module:
    """The model of those tensors in memory, quantized there."""
    tensors = {}
    for path in sorted(source.glob("*.safetensors")):
        tensors |= load_file(path)
    forms = {key: (str(t.dtype)[6:], tuple(t.shape)) for key, t in sorted(tensors.items())}
    model = skeleton_of_names(forms)
    model.load_state_dict(tensors, assign=True)
    quantize_model(model, recipe, **options)
    return model


def tensors_of(folder: Path) -> dict[str, bytes]:
    made = {}
    for path in folder.glob("*.safetensors"):
        made |= {key: bytes_of(tensor) for key, tensor in load_file(path).items()}
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "recipe", ["w4g64a", "w3g33", "nf4+dq", "ternary", "kmeans2", "kmeans3r", "w8t", "mxfp4", RULES]
)
def test_the_bits_are_those_of_the_model_quantized_whole(
    recipe, dtype: torch.dtype, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("quantization.checkpoint.source.float_source._BLOCK_BYTES", 2000)
    source = float_folder(tmp_path / "float", dtype=dtype)
    report = quantize_checkpoint(source, tmp_path / "new", recipe)
    model = whole(source, recipe)
    state = model.state_dict()
    assert tensors_of(tmp_path / "new") == {key: bytes_of(t) for key, t in state.items()}
    again = load_quantized(tmp_path / "new", whole(source, {"*": None}))
    assert {key: bytes_of(t) for key, t in again.state_dict().items()} == tensors_of(
        tmp_path / "new"
    )
    assert len(report.replaced) == (9 if recipe is RULES else 8)
    assert isinstance(again.model.embed_tokens, PackedEmbedding) == (recipe is RULES)
    saved = sum(c.bytes_after for c in report.replaced)
    assert saved == sum(m.footprint for m in again.modules() if hasattr(m, "footprint"))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("limit", [10**9, 20_000])
def test_sharded_in_and_out(shards: int, limit: int, tmp_path: Path) -> None:
    source = float_folder(tmp_path / "float", shards)
    single = float_folder(tmp_path / "single")
    quantize_checkpoint(source, tmp_path / "new", "w4g32a", max_shard_bytes=limit)
    quantize_checkpoint(single, tmp_path / "one", "w4g32a")
    assert tensors_of(tmp_path / "new") == tensors_of(tmp_path / "one")
    files = len(list((tmp_path / "new").glob("*.safetensors")))
    assert files == 1 if limit > 20_000 else files > 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["float", "new", "one", "single"]


def test_one_file_and_its_config_less_folder(tmp_path: Path) -> None:
    source = float_folder(tmp_path / "float")
    (source / "tokenizer.json").write_text("{}")
    (source / "pytorch_model.bin").write_text("weights of another kind")
    quantize_checkpoint(source / "model.safetensors", tmp_path / "a", "w4")
    quantize_checkpoint(source, tmp_path / "b", "w4")
    assert "tokenizer.json" not in files_of(tmp_path / "a")
    assert set(files_of(tmp_path / "b")) == set(files_of(tmp_path / "a")) | {"tokenizer.json"}


def test_transformers_classes_tell_layers_ties_and_turned_weights(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from tests.tiny_models import save_llama

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    for source, recipe in [
        (save_llama(tmp_path / "llama"), {"embed_tokens": "w8g32", "lm_head": "w8g32", "*": "w4"}),
        (tmp_path / "gpt2", "w4g16a"),
    ]:
        target = tmp_path / f"{source.name}-new"
        model = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
        report = quantize_model(model, recipe)
        streamed = quantize_checkpoint(source, target, recipe)
        again = load_quantized(target)
        x = torch.tensor([[1, 2, 3]])
        assert torch.equal(again(x).logits, model(x).logits)
        assert [c.status for c in streamed] == [c.status for c in report]
        assert {k: bytes_of(t) for k, t in again.state_dict().items()} == {
            k: bytes_of(t) for k, t in model.state_dict().items()
        }
        save_quantized(model, tmp_path / "saved", overwrite=True)
        assert tensors_of(tmp_path / "saved") == tensors_of(target)
        assert again.generation_config.to_dict() == model.generation_config.to_dict()
        assert torch.equal(
            again.generate(x, max_new_tokens=4, do_sample=False),
            model.generate(x, max_new_tokens=4, do_sample=False),
        )


def test_keys_the_model_lacks_are_left_out_and_said(tmp_path: Path) -> None:
    source = float_folder(tmp_path / "float")
    with torch.device("meta"):
        model = nn.ModuleDict({"model": nn.ModuleDict({"embed_tokens": nn.Embedding(50, 96)})})
    with pytest.warns(UserWarning, match="16 tensors of the source are none of the model's"):
        quantize_checkpoint(source, tmp_path / "new", {"re:embed": "w4"}, model=model)
    assert json.loads((tmp_path / "new/quantization.json").read_text())["layers"].keys() == {
        "model.embed_tokens"
    }
    with torch.device("meta"):
        model = nn.ModuleDict({"model": nn.Linear(3, 3)})
    with pytest.raises(CheckpointError, match=r"lacks 2 tensors of the model: model\.weight"):
        quantize_checkpoint(source, tmp_path / "other", "w4", model=model)


def test_nan_is_named_or_marked(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("quantization.checkpoint.source.float_source._BLOCK_BYTES", 2000)
    weight = torch.randn(64, 96)
    weight[50, 7] = torch.nan
    save_file({"a.weight": weight}, tmp_path / "float.safetensors")
    with pytest.raises(ValueError, match=r"a\.weight") as caught:
        quantize_checkpoint(tmp_path / "float.safetensors", tmp_path / "new", "w4g32")
    assert "rows are counted from row 50 of a.weight" in str(caught.value.__notes__)
    assert not (tmp_path / "new").exists()
    quantize_checkpoint(
        tmp_path / "float.safetensors", tmp_path / "marked", "w4g32", nonfinite="mark", restart=True
    )
    layer = load_quantized(tmp_path / "marked", nn.ModuleDict({"a": nn.Linear(96, 64, bias=False)}))
    assert int(layer["a"].weight.isnan().sum()) == 32


# ---- several processes -----------------------------------------------------------------------


def test_workers_give_the_same_files(tmp_path: Path) -> None:
    source = float_folder(tmp_path / "float")
    seen = []
    options = {"max_shard_bytes": 20_000}
    quantize_checkpoint(source, tmp_path / "one", RULES, **options)
    quantize_checkpoint(
        source, tmp_path / "two", RULES, workers=2, progress=lambda *a: seen.append(a), **options
    )
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert seen[-1][0] == seen[-1][1]
    with pytest.raises(ValueError, match="workers is 0"):
        quantize_checkpoint(source, tmp_path / "x", "w4", workers=0)


def test_a_worker_that_fails_says_why(tmp_path: Path) -> None:
    weight = torch.full((8, 8), torch.nan)
    save_file({"a.weight": weight}, tmp_path / "float.safetensors")
    with pytest.raises(ValueError, match=r"a\.weight"):
        quantize_checkpoint(tmp_path / "float.safetensors", tmp_path / "new", "w4", workers=2)
    assert not (tmp_path / "new").exists()


def test_torchrun_shares_the_files_out(tmp_path: Path) -> None:
    source = float_folder(tmp_path / "float")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom quantization import quantize_checkpoint\n"
        "quantize_checkpoint(sys.argv[1], sys.argv[2], 'w4g32a', max_shard_bytes=20_000)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(script), str(source), str(tmp_path / "new")]
    run = subprocess.run(
        command, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    quantize_checkpoint(source, tmp_path / "one", "w4g32a", max_shard_bytes=20_000)
    assert files_of(tmp_path / "new") == files_of(tmp_path / "one")


# ---- memory ----------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("scheme", ["w4g64a", "nf4", pytest.param("w8", marks=pytest.mark.deep)])
def test_memory_is_that_of_the_largest_tensor(scheme: str, tmp_path: Path) -> None:
    largest = 128 << 20
    weight = torch.randn(8192, 4096)
    small = float_folder(tmp_path / "small")
    (tmp_path / "big").mkdir()
    save_file({f"l{i}.weight": weight for i in range(1)}, tmp_path / "big/a.safetensors")
    save_file({"m.weight": weight}, tmp_path / "big/b.safetensors")
    grown = peak_of_streaming(tmp_path / "big", tmp_path / "new", small, scheme)
    assert 0 < grown <= largest + 200e6


# ---- what is refused before anything is written ----------------------------------------------


def test_bad_calls_write_nothing(tmp_path: Path) -> None:
    source = float_folder(tmp_path / "float")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    for arguments, error, message in [
        ((source, source, "w4"), FileExistsError, "is the source"),
        ((source, tmp_path / "full", "w4"), FileExistsError, "not empty; overwrite=True"),
        ((source, tmp_path / "new", "w99"), ValueError, "bits"),
        ((source, tmp_path / "new", {"nothing": "w4"}), ValueError, "matches no module"),
        ((source, tmp_path / "new", {}), ValueError, "no rules"),
        ((tmp_path / "none", tmp_path / "new", "w4"), FileNotFoundError, "neither a folder"),
    ]:
        with pytest.raises(error, match=message):
            quantize_checkpoint(*arguments)
    for options in ({"workers": "2"}, {"max_shard_bytes": "5GB"}, {"workers": True}):
        with pytest.raises(TypeError, match=f"{next(iter(options))} must be an integer, not"):
            quantize_checkpoint(source, tmp_path / "new", "w4", **options)
    with pytest.raises(ValueError, match="give no model, or workers=1"):
        model = skeleton_of_names({"a.weight": ("float32", (8, 8))})
        save_file({"a.weight": torch.ones(8, 8)}, tmp_path / "a.safetensors")
        quantize_checkpoint(
            tmp_path / "a.safetensors", tmp_path / "new", "w4", model=model, workers=2
        )
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"float", "full", "a.safetensors"}


def test_the_scheme_may_be_an_object(tmp_path: Path) -> None:
    source = float_folder(tmp_path / "float")
    quantize_checkpoint(source, tmp_path / "a", Scheme.nf4(), exclude=["up_proj"])
    layers = json.loads((tmp_path / "a/quantization.json").read_text())["layers"]
    assert {layer["name"] for layer in layers.values()} == {"nf4g64"} and len(layers) == 4
