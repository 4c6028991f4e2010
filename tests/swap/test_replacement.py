"""Replacing the linear layers of a model: what is replaced, and what is left and why."""

from __future__ import annotations

import copy
import doctest
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn
from torch.nn.utils import prune

from quantization.linear_layer import (
    QWQALinearLayer,
    replace_linear_layers_with_w8a16,
)
from quantization.swap import conversion, replacement, report
from tests.swap.small_models import TARGET, mlp, snapshot, statuses
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


@pytest.mark.parametrize(
    "module", [replacement, conversion, report], ids=lambda module: module.__name__
)
def test_examples_in_the_docstrings(module: Any) -> None:
    assert doctest.testmod(module).failed == 0


# ---- what is replaced ------------------------------------------------------------------------


def test_every_layer_however_deep() -> None:
    model = mlp()
    x = torch.randn(5, 16)

    def run(model: nn.Module) -> torch.Tensor:
        hidden = model["act"](model["block"]["up"](x))
        return model["head"](model["block"]["down"](hidden))

    wanted = run(model)
    report = replace_linear_layers_with_w8a16(model, TARGET, [])
    assert set(statuses(report).values()) == {"replaced"} and len(report) == 3
    assert all(type(m) is not nn.Linear for m in model.modules())
    assert float(((run(model) - wanted).norm() / wanted.norm()).detach()) < 0.03
    assert report.model is model


def test_excluded_layers_stay() -> None:
    model = mlp()
    head = model["head"]
    report = replace_linear_layers_with_w8a16(model, TARGET, ["head", "block.down"])
    assert model["head"] is head and type(head) is nn.Linear
    assert statuses(report) == {
        "block.up": "replaced",
        "block.down": "excluded",
        "head": "excluded",
    }
    assert report["head"].reason == "by 'head'"
    assert [c.name for c in report.excluded] == ["block.down", "head"]


def test_one_pattern_need_not_stand_in_a_list() -> None:
    for pattern in ("head", nn.ModuleDict, lambda name, module: name == "head"):
        assert replace_linear_layers_with_w8a16(mlp(), TARGET, pattern).excluded


def test_a_pattern_that_matches_nothing_changes_nothing() -> None:
    model = mlp()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'haed' matches no module.*nearest names are 'head'"):
        replace_linear_layers_with_w8a16(model, TARGET, ["head", "haed"])
    assert snapshot(model) == before


def test_a_second_call_changes_nothing() -> None:
    model = mlp()
    first = replace_linear_layers_with_w8a16(model, TARGET, ["head", nn.Linear, "up"][:1])
    before = snapshot(model)
    again = replace_linear_layers_with_w8a16(model, TARGET, ["head"])
    assert snapshot(model) == before
    assert statuses(again) == {"block.up": "already", "block.down": "already", "head": "excluded"}
    assert again.bytes_before == again.bytes_after == 0
    assert again.model_bytes_before == again.model_bytes_after == first.model_bytes_after
    assert again.coverage == pytest.approx(first.coverage)
    assert "2 already QWQALinearLayer" in again.to_text()
    # A pattern that matched in the first call is no error in the second.
    model = mlp()
    patterns = [nn.Linear, lambda name, module: isinstance(module, nn.Linear), "up", "re:down"]
    for _ in range(2):
        replace_linear_layers_with_w8a16(model, TARGET, patterns[2:])
    assert len(replace_linear_layers_with_w8a16(mlp(), TARGET, patterns).excluded) == 3


def test_another_call_may_exclude_less() -> None:
    model = mlp()
    replace_linear_layers_with_w8a16(model, TARGET, ["head"])
    report = replace_linear_layers_with_w8a16(model, TARGET)
    assert [c.name for c in report.replaced] == ["head"]


@pytest.mark.parametrize("thing", [None, 3, "model", nn.Linear, [nn.Linear(2, 2)], torch.ones(2)])
def test_an_object_that_is_not_a_model(thing: Any) -> None:
    with pytest.raises(TypeError, match=r"expected a model \(a torch\.nn\.Module instance\)"):
        replace_linear_layers_with_w8a16(thing, TARGET, [])


def test_a_model_without_linear_layers() -> None:
    with pytest.warns(UserWarning, match="no layer was replaced: the model has no linear layer"):
        report = replace_linear_layers_with_w8a16(nn.Sequential(nn.ReLU()), TARGET)
    with pytest.warns(UserWarning, match="no layer was replaced: 0 is lazy"):
        replace_linear_layers_with_w8a16(nn.Sequential(nn.LazyLinear(3)), TARGET)
    assert len(report) == 0 and report.coverage == 0.0
    assert "0 of 0 linear layers" in repr(report)


def test_a_root_linear_is_in_the_report() -> None:
    linear = nn.Linear(16, 4)
    handle_calls = []
    linear.register_forward_hook(lambda *args: handle_calls.append(1))
    report = replace_linear_layers_with_w8a16(linear.eval(), TARGET, [])
    assert type(report.model) is QWQALinearLayer and not report.model.training
    assert type(linear) is nn.Linear
    report.model(torch.randn(2, 16))
    assert handle_calls == [1]
    assert "the model itself is the layer: go on with report.model" in repr(report)
    assert report[""].replaced and "(the model)" in repr(report)
    again = replace_linear_layers_with_w8a16(report.model, TARGET, [])
    assert again.model is report.model and again[0].status == "already"


def test_what_is_left_is_reported_with_its_reason() -> None:
    model = nn.ModuleDict(
        {
            "mha": nn.MultiheadAttention(8, 2),
            "lazy": nn.LazyLinear(3),
            "pruned": prune.random_unstructured(nn.Linear(4, 4), "weight", 0.5),
            "complex": nn.Linear(4, 4, dtype=torch.complex64),
            "fine": nn.Linear(4, 4),
        }
    )
    before = snapshot(model)
    with pytest.raises(ValueError, match="strict: 4 linear layers would be left") as error:
        replace_linear_layers_with_w8a16(model, TARGET, strict=True)
    assert all(
        word in str(error.value) for word in ("mha.out_proj:", "lazy:", "pruned:", "complex:")
    )
    assert snapshot(model) == before
    report = replace_linear_layers_with_w8a16(model, TARGET)
    assert {c.name for c in report.left} == {"mha.out_proj", "lazy", "pruned", "complex"}
    assert all(c.reason for c in report.left) and report["lazy"].shape is None
    left = ["mha", "lazy", "pruned", "complex"]
    strict = replace_linear_layers_with_w8a16(model, TARGET, left, strict=True)
    assert not strict.left and len(strict.excluded) == 4


def test_layers_inside_adapters_are_left() -> None:
    class LoraLayer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Linear(8, 8)
            self.lora_A = nn.Linear(8, 2, bias=False)

    report = replace_linear_layers_with_w8a16(nn.Sequential(LoraLayer(), nn.Linear(8, 8)), TARGET)
    assert statuses(report) == {"0.base_layer": "left", "0.lora_A": "left", "1": "replaced"}


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_dtype_and_device_are_those_of_each_layer(device: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(8, 4, device=device, dtype=dtype), nn.Linear(4, 2))
    report = replace_linear_layers_with_w8a16(model, TARGET)
    assert (model[0].scales.device.type, model[0].scales.dtype) == (device, dtype)
    assert model[1].scales.device.type == "cpu" and model[1].scales.dtype == torch.float32
    assert report["0"].bytes_after == 32 + 8 * dtype.itemsize


def test_depth_and_breadth() -> None:
    inner: nn.Module = nn.Linear(4, 4)
    for _ in range(5000):
        outer = nn.Module()
        outer.x = inner
        inner = outer
    report = replace_linear_layers_with_w8a16(inner, TARGET)
    assert len(report.replaced) == 1
    assert max(map(len, repr(report).splitlines())) < 300
    node: Any = inner
    while not isinstance(node, nn.Linear):
        node = node.x
    assert type(node) is QWQALinearLayer


# ---- structure only --------------------------------------------------------------------------


def test_structure_only_then_a_quantized_state_dict() -> None:
    model, twin = mlp(), mlp()
    replace_linear_layers_with_w8a16(model, TARGET, ["head"])
    report = replace_linear_layers_with_w8a16(twin, TARGET, ["head"], quantize=False)
    assert "structure only" in report.to_text() and not report.quantized
    twin.load_state_dict(model.state_dict())
    x = torch.randn(3, 16)
    assert torch.equal(twin["block"]["up"](x), model["block"]["up"](x))
    empty = mlp().to("meta")
    replace_linear_layers_with_w8a16(empty, TARGET, ["head"], False)
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty["block"]["up"](x), model["block"]["up"](x))


def test_structure_only_keeps_the_biases() -> None:
    model = mlp()
    bias = model["head"].bias.detach().clone()
    replace_linear_layers_with_w8a16(model, TARGET, quantize=False)
    assert torch.equal(model["head"].bias, bias)


def test_a_float_checkpoint_loads_into_a_replaced_model() -> None:
    source, model, direct = mlp(), mlp(), None
    replace_linear_layers_with_w8a16(model, TARGET)
    model.load_state_dict(source.state_dict())
    direct = copy.deepcopy(source)
    replace_linear_layers_with_w8a16(direct, TARGET)
    mine, theirs = model.state_dict(), direct.state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


# ---- a hostile afternoon ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.zero_(),
        lambda w: w[1].zero_(),
        lambda w: w.fill_(1e-42),
        lambda w: w.fill_(-3e38),
        lambda w: w.abs_(),
        lambda w: w.fill_(0.5),
    ],
    ids=["zeros", "zero row", "denormal", "near the limit", "one sign", "constant"],
)
def test_awkward_weights(change: Callable[[torch.Tensor], Any]) -> None:
    model = nn.Sequential(nn.Linear(7, 5))
    change(model[0].weight.data)
    weight = model[0].weight.detach().double()
    replace_linear_layers_with_w8a16(model, TARGET)
    scales = model[0].scales.double()[:, None]
    got = model[0].int8_weights.double() * scales
    assert ((got - weight).abs() <= scales * 0.5001).all()


@pytest.mark.parametrize("offset", range(0, 8))
def test_misaligned_weights(offset: int) -> None:
    raw = torch.zeros(4 * 6 * 5 + 16, dtype=torch.uint8)
    view = raw.numpy()[offset : offset + 4 * 30].view("float32").reshape(5, 6)
    view[:] = torch.randn(5, 6).numpy()
    model = nn.Sequential(nn.Linear(6, 5))
    model[0].weight = nn.Parameter(torch.from_numpy(view))
    x = torch.randn(2, 6)
    wanted = model(x).detach()
    replace_linear_layers_with_w8a16(model, TARGET)
    assert float(((model(x) - wanted).norm() / wanted.norm()).detach()) < 0.03


def test_a_compiled_layer_is_not_run_in_its_old_form() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].compile(backend="eager")
    model(torch.randn(2, 8))
    replace_linear_layers_with_w8a16(model, TARGET)
    layer = model[0]
    x = torch.randn(2, 8)
    torch.testing.assert_close(model(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_models_in_wrappers() -> None:
    compiled = torch.compile(nn.Sequential(nn.Linear(8, 8)), backend="eager")
    x = torch.randn(2, 8)
    before = compiled(x)
    report = replace_linear_layers_with_w8a16(compiled, TARGET)
    assert len(report.replaced) == 1
    assert not torch.equal(compiled(x), before)
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8)))
    replace_linear_layers_with_w8a16(traced, TARGET)
    assert traced(x).shape == (2, 8)
    parallel = replace_linear_layers_with_w8a16(nn.DataParallel(mlp()), TARGET, ["head"])
    assert len(parallel.replaced) == 2
