"""``.weight`` of every quantized layer: known at no cost, computed late, and never written."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode

from quantization import PackedEmbedding, PackedLinearLayer, QWQALinearLayer, quantize_model
from quantization.layers.weight_view import WeightView
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

KINDS: dict[str, Callable[[], Any]] = {
    "int8": lambda: QWQALinearLayer(24, 8),
    "w4": lambda: PackedLinearLayer(24, 8, scheme="w4g8a"),
    "nf4": lambda: PackedLinearLayer(24, 8, scheme="nf4", dtype=torch.bfloat16),
    "dq": lambda: PackedLinearLayer(24, 8, scheme="w5g8a+dq", dtype=torch.float64),
    "ternary": lambda: PackedLinearLayer(24, 8, scheme="ternary", dtype=torch.float16),
    "order": lambda: PackedLinearLayer(24, 8, scheme="w4g8a+order+cols"),
    "table": lambda: PackedEmbedding(8, 24, scheme="w3g8"),
}


@pytest.fixture(params=KINDS)
def layer(request: Any) -> Any:
    torch.manual_seed(0)
    return KINDS[request.param]()


def numbers(layer: Any) -> torch.Tensor:
    return layer.dequantize().weight.detach()


# ---- what is known without computing ---------------------------------------------------------


def test_what_a_tensor_says_of_itself_costs_nothing(
    layer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = numbers(layer)
    monkeypatch.setattr(type(layer), "_decoded", lambda self: pytest.fail("computed"))
    for weight in (layer.weight, layer.weight.data, layer.weight.detach()):
        assert isinstance(weight, WeightView)
        for name in ("dtype", "shape", "device", "ndim", "layout", "requires_grad", "is_leaf"):
            assert getattr(weight, name) == getattr(wanted, name), name
        for name in ("is_cpu", "is_meta", "is_cuda", "is_sparse", "itemsize", "nbytes", "grad"):
            assert getattr(weight, name) == getattr(wanted, name), name
        for call in ("size", "stride", "numel", "dim", "is_floating_point", "is_contiguous"):
            assert getattr(weight, call)() == getattr(wanted, call)(), call
        assert (weight.size(-1), len(weight), weight.element_size()) == (24, 8, wanted.itemsize)
        assert weight.to("cpu") is weight and weight.to(weight.dtype) is weight


def test_reading_is_of_the_codes_that_were_there(layer: Any) -> None:
    wanted, view = numbers(layer), layer.weight
    layer.quantize(torch.zeros(8, 24))
    assert torch.equal(view, wanted)
    assert not layer.weight.any()


# ---- writes ----------------------------------------------------------------------------------


def writes(weight: Any, plain: torch.Tensor) -> dict[str, Callable[[], Any]]:
    return {
        "add_": lambda: weight.add_(1),
        "copy_": lambda: weight.copy_(plain),
        "set_": lambda: weight.set_(plain),
        "resize_": lambda: weight.resize_(3),
        "out=": lambda: torch.add(plain, 1, out=weight),
        "+=": lambda: weight.__iadd__(1),
        "item": lambda: weight.__setitem__((0, 0), 1.0),
        "torch's own item": lambda: torch.Tensor.__setitem__(weight, 0, 1.0),
        "data =": lambda: setattr(weight, "data", plain),
        "data.copy_": lambda: weight.data.copy_(plain),
        "data[...] =": lambda: weight.data.__setitem__(..., 0.0),
        "detach": lambda: weight.detach().zero_(),
        "row": lambda: weight[0].zero_(),
        "transpose": lambda: weight.t().fill_(1),
        "flat": lambda: weight.view(-1)[3:].mul_(2),
        "chunk": lambda: weight.chunk(2)[1].zero_(),
        "same dtype": lambda: weight.to(weight.dtype).zero_(),
        "same device": lambda: weight.cpu().zero_(),
        "index_add_": lambda: weight.index_add_(0, torch.tensor([0]), plain[:1]),
        "masked_fill_": lambda: weight.masked_fill_(plain > 0, 0),
        "foreach": lambda: torch._foreach_add_([weight], 1),
        "init": lambda: nn.init.normal_(weight),
        "apply_": lambda: weight.apply_(lambda x: 1.0),
    }


def test_every_write_is_refused_with_the_remedy(layer: Any) -> None:
    plain = numbers(layer)
    for name, write in writes(layer.weight, plain).items():
        with pytest.raises(RuntimeError, match=r"layer\.quantize\(weights\).*dequantize_model"):
            write()
            pytest.fail(f"{name} was not refused")
    if plain.dtype is not torch.bfloat16:
        with pytest.raises(ValueError, match="read-only"):
            layer.weight.numpy()[0] = 1
    with pytest.raises(RuntimeError, match="incompatible tensor type"):
        torch.zeros(8, 24).data = layer.weight  # torch's own words: a view is no memory
    assert torch.equal(layer.weight, plain)


# ---- reads -----------------------------------------------------------------------------------


def test_copies_pickles_and_parameters_are_ordinary_tensors(layer: Any) -> None:
    wanted, weight = numbers(layer), layer.weight
    file = io.BytesIO()
    torch.save({"weight": weight}, file)
    file.seek(0)
    copies = [copy.deepcopy(weight), copy.copy(weight), pickle.loads(pickle.dumps(weight))]
    copies += [torch.load(file)["weight"], weight.clone(), weight.data.clone()]
    for made in copies:
        assert type(made) is torch.Tensor and torch.equal(made, wanted)
        made.zero_()
    for source, part in ((weight, wanted), (weight.data, wanted), (weight[2:], wanted[2:])):
        parameter = nn.Parameter(source)
        assert type(parameter) is nn.Parameter and torch.equal(parameter, part)
        assert parameter.requires_grad and nn.Parameter(source, False).requires_grad is False
        (parameter * 2).sum().backward()
        torch.optim.SGD([parameter], 1.0).step()
        assert torch.equal(parameter.detach(), part - 2)
        assert not isinstance(weight, nn.Parameter)
    module = nn.Linear(24, 8)
    module.weight, module.kept = nn.Parameter(weight), nn.Buffer(weight)
    assert {type(tensor) for tensor in module.state_dict().values()} == {torch.Tensor}
    assert torch.equal(module.kept, wanted) and torch.equal(weight, wanted)


def test_every_way_to_read_gives_the_numbers(layer: Any) -> None:
    wanted, weight = numbers(layer), layer.weight
    assert repr(weight) == repr(wanted)
    assert weight.tolist() == wanted.tolist()
    assert f"{weight[1, 2]:.3f}" == f"{wanted[1, 2]:.3f}"
    assert weight[1, 2].item() == float(weight[1, 2]) == float(wanted[1, 2])
    assert [row.tolist() for row in weight] == wanted.tolist()
    assert torch.equal(torch.from_dlpack(weight), wanted)
    assert torch.equal(torch.stack([weight, wanted])[0], wanted)
    assert torch.equal(weight.t(), wanted.t()) and torch.equal(weight.half(), wanted.half())
    if wanted.dtype is not torch.bfloat16:
        assert (np.asarray(weight) == wanted.numpy()).all()
        np.array(weight)[:] = 0
    torch.testing.assert_close(weight, wanted, rtol=0, atol=0)


def test_derivatives_transforms_and_autocast(layer: Any) -> None:
    wanted, weight = numbers(layer), layer.weight
    x = torch.randn(3, 24, dtype=wanted.dtype, requires_grad=True)
    F.linear(x, weight).sum().backward()
    assert torch.allclose(x.grad, wanted.sum(0).expand(3, 24), rtol=1e-2)
    for read in (layer.weight, weight):  # one of them not read before
        mapped = torch.vmap(lambda x, w=read: F.linear(x, w))(x.detach())
        torch.testing.assert_close(mapped, F.linear(x.detach(), wanted))
        slope = torch.func.grad(lambda w: F.linear(x.detach(), w).sum())(read)
        torch.testing.assert_close(slope, x.detach().sum(0).expand(8, 24))
    asked = layer.weight.detach().requires_grad_()
    (asked * 2).sum().backward()
    assert torch.equal(asked.grad, torch.full_like(wanted, 2))
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(x, layer.weight).dtype == F.linear(x, wanted).dtype
    with torch.inference_mode():
        inside = layer.weight
        assert torch.equal(inside, wanted)
    assert F.linear(x.detach(), inside).shape == (3, 8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["int8", "order"])
def test_compilers_tracers_and_fake_tensors(kind: str) -> None:
    torch._dynamo.reset()
    layer = KINDS[kind]()
    wanted = numbers(layer)
    x = torch.randn(3, 24, dtype=wanted.dtype)

    def read(x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.to(layer.weight.dtype), layer.weight)

    compiled = torch.compile(read, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), F.linear(x, wanted))
    if kind == "int8":
        given = torch.compile(lambda x, w: F.linear(x, w), backend="aot_eager")
        torch.testing.assert_close(given(x, layer.weight), F.linear(x, wanted))
    torch.testing.assert_close(torch.jit.trace(read, x)(x), F.linear(x, wanted))
    mode = FakeTensorMode()
    assert mode.from_tensor(layer.weight).shape == (8, 24)
    whole = copy.deepcopy(layer).to("meta")
    assert whole.weight.is_meta and F.linear(x.to("meta"), whole.weight).shape == (3, 8)
    for name, tensor in list(layer._buffers.items()):
        layer._buffers[name] = None if tensor is None else mode.from_tensor(tensor)
    with mode:
        assert F.linear(mode.from_tensor(x), layer.weight).shape == (3, 8)


def test_a_model_that_asks_for_the_dtype_is_exported() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = PackedLinearLayer(24, 8, scheme="w4g8a")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x.to(self.layer.weight.dtype)) + self.layer.weight.sum()

    model, x = Asks(), torch.randn(3, 24)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert torch.equal(torch.func.functional_call(model, state, (x,)), model(x))
    torch.testing.assert_close(torch.vmap(model)(x), torch.stack([model(row) for row in x]))


def test_the_fast_path_of_an_encoder_layer_reads_it() -> None:
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    quantize_model(encoder, {"linear2": "w4g16a", "*": None})
    encoder.activation_relu_or_gelu = 1  # as if nobody had told it to keep off
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        fast = encoder(x)
        encoder.activation_relu_or_gelu = 0
        torch.testing.assert_close(fast, encoder(x))
