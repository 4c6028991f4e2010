"""A stored model into a module: what does not fit is said, and the module is as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from torch import nn

from quantization import (
    PackedLinearLayer,
    QWQALinearLayer,
    load_quantized,
    pack_matrix,
    save_quantized,
)
from quantization.checkpoint import read_checkpoint, write_checkpoint
from quantization.checkpoint.disk.stored_tensor import StoredTensor
from quantization.checkpoint.restore import RestoreError, restore_model
from quantization.checkpoint.stored_model import StoredLayer, StoredModel, stored_model
from tests.checkpoint_models import (
    files_of,
    net,
    quantized_net,
    state_equal,
)
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

# ---- a model that does not fit ---------------------------------------------------------------


def misfits() -> dict[str, tuple[nn.Module, str]]:
    def model(**changes: nn.Module) -> nn.Module:
        made = net()
        for name, module in changes.items():
            setattr(made, name, module)
        return made

    other = net()
    other.blocks[1].inner = nn.Linear(96, 96, bias=False)
    wide = net()
    wide.blocks[1].inner = nn.Linear(97, 96)
    short = net()
    del short.blocks[2]
    del short.blocks[1]
    parametrized = net()
    nn.utils.parametrizations.weight_norm(parametrized.blocks[1].inner)
    bare = net()
    bare.blocks[1].register_buffer("ramp", torch.empty(96, device="meta"), persistent=False)
    table = net()
    table.blocks[1].inner = nn.Embedding(96, 96)
    counted = net()
    counted.blocks[1].steps = torch.tensor(7.0)
    return {
        "missing": (model(extra=nn.LayerNorm(4)), "2 tensors of the model are not stored: extra"),
        "extra": (short, "stored layers are none of the model's: blocks.1.inner"),
        "no bias": (other, "blocks.1.inner is stored with a bias; the model's is without one"),
        "shape": (wide, r"stored with shape \(96, 96\); the model's is \(96, 97\)"),
        "parametrized": (parametrized, "cannot become a quantized layer: parametrized"),
        "meta buffer": (bare, "on meta and not stored, as they are not persistent: blocks.1.ramp"),
        "kind": (table, "blocks.1.inner cannot become a quantized layer: .* is not nn.Linear"),
        "number": (counted, "blocks.1.steps is stored as int64; the model's is float32"),
        "norm": (model(head=nn.Linear(96, 51, bias=False)), r"head.weight is stored with shape"),
    }


@pytest.mark.parametrize("case", list(misfits()))
def test_a_model_that_does_not_fit_is_left_as_it_was(case: str, tmp_path: Path) -> None:
    save_quantized(quantized_net("w4g32"), tmp_path / "saved")
    model, message = misfits()[case]
    before = {name: id(module) for name, module in model.named_modules()}
    tensors = {key: id(tensor) for key, tensor in model.named_parameters()}
    with pytest.raises(RestoreError, match=message):
        load_quantized(tmp_path / "saved", model)
    assert before == {name: id(module) for name, module in model.named_modules()}
    assert tensors == {key: id(tensor) for key, tensor in model.named_parameters()}


def test_without_a_model_or_config_the_error_says_what_to_give(tmp_path: Path) -> None:
    save_quantized(nn.Linear(2, 2), tmp_path / "saved")
    with pytest.raises(ValueError, match=r"no config\.json .* give the model"):
        load_quantized(tmp_path / "saved")
    for what in ("model", nn.Linear):
        with pytest.raises(TypeError, match="expected a model"):
            load_quantized(tmp_path / "saved", what)


def test_a_stored_model_goes_into_another_without_files() -> None:
    model = quantized_net("nf4", embed=True)
    again = restore_model(stored_model(model), net(seed=4))
    assert state_equal(again, model)
    assert again.head.packed_weights is again.embed.packed_weights
    assert again.head.packed_weights is model.head.packed_weights


def test_reading_and_writing_keeps_config_and_assets(tmp_path: Path) -> None:
    stored = stored_model(quantized_net("w4"), {"model_type": "net"})
    write_checkpoint(stored, tmp_path / "a")
    (tmp_path / "a/tokenizer.json").write_text("{}")
    for old, new in ("ab", "bc"):
        write_checkpoint(read_checkpoint(tmp_path / old), tmp_path / new)
    a, b, c = (files_of(tmp_path / name) for name in "abc")
    assert b == c and b"tokenizer.json" in b.pop("quantization.json")
    assert b"tokenizer.json" not in a.pop("quantization.json")  # it came later
    assert a == b


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int32])
def test_a_bias_that_no_kernel_adds_is_refused_when_it_comes(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    bias, packed = torch.ones(8).to(dtype), pack_matrix(torch.randn(8, 32), "w4")
    for make, weight in ((PackedLinearLayer, "w4"), (QWQALinearLayer, "int8")):
        with pytest.raises(TypeError, match=r"bias has dtype .*; allowed are float32"):
            make.from_packed(pack_matrix(torch.randn(8, 32), weight), bias)
    stored = StoredModel({"0": StoredLayer.of(packed)}, {"0.bias": StoredTensor.of(bias)})
    write_checkpoint(stored, tmp_path / "a")
    for model in (nn.Sequential(nn.Linear(32, 8)), nn.Sequential(PackedLinearLayer(32, 8))):
        before = model[0]
        with pytest.raises(RestoreError, match=r"0\.bias is stored as .*; a bias is one of"):
            load_quantized(tmp_path / "a", model)
        assert model[0] is before
        state = {"0.bias": bias}
        if isinstance(before, PackedLinearLayer):
            with pytest.raises(RuntimeError, match=r"0\.bias has dtype"):
                model.load_state_dict(state, strict=False, assign=True)
