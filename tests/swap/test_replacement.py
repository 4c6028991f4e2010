"""Replacing the linear layers of a model: all or nothing, nothing lost, everything reported."""

from __future__ import annotations

import copy
import doctest
import gc
import math
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn
from torch.nn.utils import prune

from quantization.linear_layer import (
    QWQALinearLayer,
    Target,
    replace_linear_layers_with_w8a16,
    target_class_from,
)
from quantization.swap import conversion, replacement, report

TARGET = Target.Linear(QWQALinearLayer)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def mlp() -> nn.Module:
    block = nn.ModuleDict({"up": nn.Linear(16, 32), "down": nn.Linear(32, 16, bias=False)})
    return nn.ModuleDict({"block": block, "act": nn.ReLU(), "head": nn.Linear(16, 4)})


def statuses(report: Any) -> dict[str, str]:
    return {candidate.name: candidate.status for candidate in report}


def snapshot(model: nn.Module) -> list[tuple[int, int, Any]]:
    """Identity of every module and tensor, and what their attributes are."""
    return [
        (id(module), id(tensor), module.__dict__.get("activation_relu_or_gelu"))
        for module in model.modules()
        for tensor in (None, *module._parameters.values(), *module._buffers.values())
    ]


@pytest.mark.parametrize(
    "module", [replacement, conversion, report], ids=lambda module: module.__name__
)
def test_examples_in_the_docstrings(module: Any) -> None:
    assert doctest.testmod(module).failed == 0


# ---- the target ------------------------------------------------------------------------------


def test_target_is_a_value() -> None:
    assert Target.Linear(QWQALinearLayer) == TARGET and hash(TARGET) == hash(copy.copy(TARGET))
    assert isinstance(TARGET, Target)
    assert pickle.loads(pickle.dumps(TARGET)) == TARGET
    assert repr(TARGET).startswith("Target.Linear(cls=")
    with pytest.raises(AttributeError):
        TARGET.cls = nn.Linear
    match TARGET:
        case Target.Linear(cls):
            assert cls is QWQALinearLayer
        case _:
            pytest.fail("no match")


def test_target_class_from() -> None:
    assert target_class_from(TARGET) is target_class_from(QWQALinearLayer) is QWQALinearLayer


class NoQuantize(nn.Module):
    def __init__(self, in_features, out_features, bias, dtype): ...


class NoDtype(nn.Module):
    def __init__(self, in_features, out_features, bias=True): ...

    def quantize(self, weights): ...


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (nn.Linear, r"needs a method quantize\(weights\)"),
        (NoQuantize, r"needs a method quantize\(weights\)"),
        (NoDtype, "must take the keywords in_features, out_features, bias, dtype"),
        (int, "derived from torch.nn.Module"),
        ("QWQALinearLayer", r"give Target\.Linear\(QWQALinearLayer\)"),
        (None, r"give Target\.Linear\(QWQALinearLayer\)"),
        (Target, "derived from torch.nn.Module"),
        (QWQALinearLayer(2, 2), r"give Target\.Linear"),
    ],
)
def test_targets_of_a_wrong_kind(target: Any, message: str) -> None:
    model = mlp()
    before = snapshot(model)
    with pytest.raises(TypeError, match=message):
        replace_linear_layers_with_w8a16(model, target, [])
    assert snapshot(model) == before


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
    assert "2 already QWQALinearLayer" in repr(again)
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


# ---- sharing and ties ------------------------------------------------------------------------


def test_a_shared_module_stays_shared() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": shared, "c": nn.Linear(8, 8)})
    report = replace_linear_layers_with_w8a16(model, TARGET)
    assert model["a"][0] is model["b"] and type(model["b"]) is QWQALinearLayer
    assert len(report) == 2 and report["b"] is report["a.0"] and report[0].aliases == ("b",)
    assert report.bytes_after == 2 * (64 + 32 + 32)


def test_a_shared_block_stays_shared() -> None:
    block = nn.Sequential(nn.Linear(8, 8))
    model = nn.Sequential(block, block, nn.Linear(8, 8))
    report = replace_linear_layers_with_w8a16(model, TARGET)
    assert model[0] is model[1] is block and len(report.replaced) == 2


def test_two_layers_of_one_weight_share_one_set_of_codes() -> None:
    for device in ("cpu", "meta"):
        model = nn.Sequential(*(nn.Linear(8, 8, device=device) for _ in range(3)))
        model[1].weight = model[0].weight
        report = replace_linear_layers_with_w8a16(model, TARGET)
        assert model[0] is not model[1]
        assert model[0].int8_weights is model[1].int8_weights
        assert model[0].scales is model[1].scales
        assert model[0].bias is not model[1].bias
        assert model[2].int8_weights is not model[0].int8_weights
        assert report.bytes_before == 2 * 256 + 3 * 32
        assert report.bytes_after == 2 * (64 + 32) + 3 * 32


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.middle(self.embedding(x)))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_head_tied_to_an_embedding_stays_tied_or_is_untied_on_request(device: str) -> None:
    model = Tied().to(device)
    model.head.weight = model.embedding.weight
    report = replace_linear_layers_with_w8a16(model, TARGET)
    assert statuses(report) == {"middle": "replaced", "head": "left"}
    assert model.head.weight is model.embedding.weight
    assert report["head"].reason.startswith("tied to embedding.weight, which stays in float")
    with pytest.raises(ValueError, match="head: tied to embedding"):
        replace_linear_layers_with_w8a16(model, TARGET, strict=True)
    before = report.model_bytes_after
    report = replace_linear_layers_with_w8a16(model, TARGET, strict=True, untie=True)
    assert type(model.head) is QWQALinearLayer
    assert report["head"].reason == "untied from embedding.weight, which stays in float"
    assert report.model_bytes_after - before == 20 * 8 + 20 * 4


def test_a_tie_through_memory_alone_is_seen() -> None:
    model = Tied()
    model.head.weight = nn.Parameter(model.embedding.weight.data)
    assert replace_linear_layers_with_w8a16(model, TARGET)["head"].status == "left"


def test_a_layer_tied_to_an_excluded_one_is_left() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    report = replace_linear_layers_with_w8a16(model, TARGET, ["0"])
    assert report["1"].reason.startswith("tied to 0.weight")


def test_slices_of_one_storage_are_no_tie() -> None:
    packed = torch.randn(24, 8)
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in "qkv"})
    for i, name in enumerate("qkv"):
        model[name].weight = nn.Parameter(packed[8 * i : 8 * i + 8])
    assert len(replace_linear_layers_with_w8a16(model, TARGET, strict=True).replaced) == 3


# ---- what is carried over --------------------------------------------------------------------


def test_hooks_work_and_can_still_be_removed() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    calls: list[str] = []
    handles = [
        model[0].register_forward_hook(lambda *args: calls.append("forward")),
        model[0].register_forward_pre_hook(lambda *args: calls.append("pre")),
        model[0].register_full_backward_hook(lambda *args: calls.append("backward")),
        model[0].register_forward_hook(
            lambda module, args, kwargs, output: calls.append("kwargs"), with_kwargs=True
        ),
    ]
    replace_linear_layers_with_w8a16(model, TARGET)
    model(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert calls == ["pre", "forward", "kwargs", "backward"]
    calls.clear()
    for handle in handles:
        handle.remove()
    model(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert calls == []


@pytest.mark.parametrize("training", [True, False])
def test_training_flag_and_attributes(training: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).train(training)
    model[1].train(not training)
    model[0].tag, model[0]._is_hf_initialized = "mine", True
    report = replace_linear_layers_with_w8a16(model, TARGET)
    assert (model[0].training, model[1].training) == (training, not training)
    assert model[0].tag == "mine" and model[0]._is_hf_initialized
    assert "tag" not in vars(model[1])
    assert report.model.training is training


def test_random_numbers_are_not_drawn() -> None:
    model = mlp()
    state = torch.get_rng_state()
    replace_linear_layers_with_w8a16(model, Target.Linear(Course), ["head"])
    replace_linear_layers_with_w8a16(model, TARGET)
    assert torch.equal(state, torch.get_rng_state())


# ---- all or nothing --------------------------------------------------------------------------


def exploding(error: BaseException) -> type[QWQALinearLayer]:
    """A layer class whose third quantize fails."""

    class Exploding(QWQALinearLayer):
        built = 0

        def quantize(self, weights, **options):
            Exploding.built += 1
            if Exploding.built == 3:
                raise error
            super().quantize(weights, **options)

    return Exploding


@pytest.mark.parametrize(
    "error", [RuntimeError("no"), MemoryError(), KeyboardInterrupt(), SystemExit(3)], ids=repr
)
def test_an_error_on_the_way_leaves_the_model_as_it_was(error: BaseException) -> None:
    model = mlp()
    before = snapshot(model)
    with pytest.raises(type(error)) as caught:
        replace_linear_layers_with_w8a16(model, Target.Linear(exploding(error)), [])
    assert caught.value is error
    assert "while replacing head; the model was not changed" in error.__notes__
    assert snapshot(model) == before


def test_a_nan_in_the_last_layer_leaves_the_model_as_it_was() -> None:
    model = mlp()
    with torch.no_grad():
        model["head"].weight[2, 7] = math.nan
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"head\.weight.*nan.*2, 7"):
        replace_linear_layers_with_w8a16(model, TARGET, [])
    assert snapshot(model) == before
    replace_linear_layers_with_w8a16(model, TARGET, [], nonfinite="mark")
    y = model["head"](torch.randn(3, 16))
    assert torch.isnan(y[:, 2]).all() and torch.isfinite(y[:, [0, 1, 3]]).all()


class Interrupting(dict):
    """A mapping whose n-th write is interrupted, once."""

    writes_left = 10**9

    def __setitem__(self, key: Any, value: Any) -> None:
        Interrupting.writes_left -= 1
        if Interrupting.writes_left == 0:
            raise KeyboardInterrupt
        super().__setitem__(key, value)


@pytest.mark.parametrize("write", [1, 2, 3])
def test_an_interrupt_between_assignments_takes_them_back(write: int) -> None:
    model = mlp()
    for module in model.modules():
        module.__dict__["_modules"] = Interrupting(module._modules)
    before = snapshot(model)
    Interrupting.writes_left = write
    try:
        with pytest.raises(KeyboardInterrupt):
            replace_linear_layers_with_w8a16(model, TARGET, [])
    finally:
        Interrupting.writes_left = 10**9
    assert snapshot(model) == before
    assert len(replace_linear_layers_with_w8a16(model, TARGET, []).replaced) == 3


# ---- classes of the user's own ---------------------------------------------------------------


class Course(nn.Module):
    """A layer as courses write it: [1, out] bias buffer, no from_float, no other option."""

    def __init__(self, in_features, out_features, bias=True, dtype=torch.float32):
        super().__init__()
        codes = torch.randint(-128, 127, (out_features, in_features)).to(torch.int8)
        self.register_buffer("int8_weights", codes)
        self.register_buffer("scales", torch.randn(out_features, dtype=dtype))
        if bias:
            self.register_buffer("bias", torch.randn((1, out_features), dtype=dtype))
        else:
            self.bias = None

    def quantize(self, weights):
        wide = weights.clone().to(torch.float32)
        self.scales = (wide.abs().max(dim=-1).values / 127).to(weights.dtype)
        self.int8_weights = torch.round(wide / self.scales.unsqueeze(1)).to(torch.int8)

    def forward(self, x):
        y = nn.functional.linear(x, self.int8_weights.to(x.dtype)) * self.scales
        return y if self.bias is None else y + self.bias


class ParameterBias(Course):
    def __init__(self, in_features, out_features, bias=True, dtype=torch.float32):
        super().__init__(in_features, out_features, False, dtype)
        del self.bias
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype)) if bias else None


class BiasLess(Course):
    def __init__(self, in_features, out_features, bias=True, dtype=torch.float32):
        super().__init__(in_features, out_features, False, dtype)


@pytest.mark.parametrize("cls", [Course, ParameterBias])
def test_a_class_of_the_users_own(cls: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4, bias=False))
    x = torch.randn(3, 16)
    wanted, bias = model(x), model[0].bias.detach().clone()
    for target in (Target.Linear(cls), cls):
        report = replace_linear_layers_with_w8a16(model, target)
        assert type(model[0]) is cls and len(report) == 2
        assert torch.equal(model[0].bias.flatten(), bias)
        assert isinstance(model[0].bias, nn.Parameter) == (cls is ParameterBias)
        assert float(((model(x) - wanted).norm() / wanted.norm()).detach()) < 0.03
    assert report.coverage == pytest.approx((128 + 32) / (128 + 32 + 8))


def test_a_class_that_lost_its_bias() -> None:
    model = mlp()
    before = snapshot(model)
    with pytest.raises(
        TypeError, match="BiasLess was built with bias=True and has no fitting bias"
    ):
        replace_linear_layers_with_w8a16(model, Target.Linear(BiasLess))
    assert snapshot(model) == before


def test_a_class_of_the_users_own_on_meta() -> None:
    model = nn.Sequential(nn.Linear(16, 8, device="meta"))
    replace_linear_layers_with_w8a16(model, Target.Linear(Course))
    assert model[0].int8_weights.is_meta and model[0].bias.is_meta


def test_hooks_of_the_new_layer_come_before_those_carried_over() -> None:
    calls: list[str] = []

    class Hooked(Course):
        def __init__(self, in_features, out_features, bias=True, dtype=torch.float32):
            super().__init__(in_features, out_features, bias, dtype)
            self.register_forward_hook(lambda *args: calls.append("new"))

    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_hook(lambda *args: calls.append("old"))
    replace_linear_layers_with_w8a16(model, Hooked)
    model(torch.randn(1, 4))
    assert calls == ["new", "old"]


def test_layers_of_one_weight_that_do_not_quantize_alike_share_nothing() -> None:
    class Random(Course):
        def quantize(self, weights):
            self.int8_weights = torch.randint_like(self.int8_weights, -127, 127)

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    replace_linear_layers_with_w8a16(model, Random)
    assert model[0].int8_weights is not model[1].int8_weights


# ---- structure only --------------------------------------------------------------------------


def test_structure_only_then_a_quantized_state_dict() -> None:
    model, twin = mlp(), mlp()
    replace_linear_layers_with_w8a16(model, TARGET, ["head"])
    report = replace_linear_layers_with_w8a16(twin, TARGET, ["head"], quantize=False)
    assert "structure only" in repr(report) and not report.quantized
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


# ---- the report ------------------------------------------------------------------------------


def test_figures_of_the_report() -> None:
    model = mlp()
    bytes_before = sum(p.nbytes for p in model.parameters())
    report = replace_linear_layers_with_w8a16(model, TARGET, ["head"])
    assert report.bytes_before == 4 * (512 + 32 + 512)
    assert report.bytes_after == 512 + 4 * 32 + 4 * 32 + 512 + 4 * 16
    assert report.model_bytes_before == bytes_before
    tensors = [*model.parameters(), *model.buffers()]
    assert report.model_bytes_after == sum(tensor.nbytes for tensor in tensors)
    assert report.coverage == pytest.approx(1024 / (1024 + 32 + 64 + 4))
    assert [t.name for t in report.float_tensors] == ["head.weight", "block.up.bias", "head.bias"]
    assert report["block.up"].shape == (32, 16) and report["block.up"].kind == "Linear"


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999_949, "999.9 kB"), (999_950, "1.0 MB"), (2.5e9, "2.5 GB"), (3e12, "3.0 TB")],
)
def test_bytes_for_reading(nbytes: int, text: str) -> None:
    assert report.size(int(nbytes)) == text


def test_further_names_of_a_layer_are_told() -> None:
    shared = nn.Linear(4, 4)
    text = repr(replace_linear_layers_with_w8a16(nn.Sequential(shared, shared), TARGET))
    assert "0 (also 1) " in text
    text = repr(replace_linear_layers_with_w8a16(nn.Sequential(*[nn.Linear(4, 4)] * 9), TARGET))
    assert "0 (also 1, 2, ...) " in text


def test_replaced_layers_take_about_a_quarter() -> None:
    model = nn.Sequential(nn.Linear(576, 1536, bias=False), nn.Linear(1536, 576, bias=False))
    report = replace_linear_layers_with_w8a16(model, TARGET)
    assert 0.25 < report.bytes_after / report.bytes_before < 0.27


def test_the_report_is_a_sequence() -> None:
    report = replace_linear_layers_with_w8a16(mlp(), TARGET, ["head"])
    assert len(report) == 3 and report[0] is next(iter(report)) and report[-1].name == "head"
    assert report[:2] == tuple(report)[:2]
    with pytest.raises(KeyError, match="'tail' is no linear layer"):
        report["tail"]
    with pytest.raises(IndexError):
        report[3]


def test_bare_parameters_are_named_among_the_floats() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up = nn.Parameter(torch.zeros(4, 16, 16))
            self.router = nn.Linear(16, 4)

    report = replace_linear_layers_with_w8a16(nn.Sequential(Experts()), TARGET)
    assert report.float_tensors[0].name == "0.gate_up"
    assert "0.gate_up [4, 16, 16] float32 4.1 kB" in repr(report)
    assert report.coverage < 0.1


def test_a_long_report_joins_the_layers_of_a_family() -> None:
    model = nn.ModuleDict(
        {
            "layers": nn.ModuleList(
                nn.ModuleDict({"up1": nn.Linear(8, 16), "down": nn.Linear(16, 8)})
                for _ in range(30)
            ),
            "head": nn.Linear(8, 4),
        }
    )
    lines = repr(replace_linear_layers_with_w8a16(model, TARGET, ["layers.3", "head"])).splitlines()
    text = "\n".join(lines)
    assert "layers.*.up1 (29 layers)" in text and "layers.3.down" in text
    assert "excluded: by 'layers.3'" in text
    assert len(lines) < 12
    row = next(line for line in lines if "layers.*.up1" in line)
    assert row.index("16 x 8") + len("16 x 8") == lines[1].index("out x in") + len("out x in")


def test_the_report_keeps_no_float_weight_alive() -> None:
    model = mlp()
    alive = weakref.ref(model["head"].weight)
    report = replace_linear_layers_with_w8a16(model, TARGET)
    gc.collect()
    assert alive() is None and report.replaced


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
