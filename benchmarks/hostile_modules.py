"""The hostile battery: modules that are not what they seem, and quantized models that travel."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from benchmarks.hostile_cases import case, check, close, linear, x
from benchmarks.hostile_libraries import Library

# ---- modules ---------------------------------------------------------------------------------


def _attention() -> nn.MultiheadAttention:
    torch.manual_seed(0)
    return nn.MultiheadAttention(128, 4, batch_first=True)


@case("MultiheadAttention")
def _(library: Library) -> None:
    check(library, _attention(), x(2, 5, 128), x(2, 5, 128), x(2, 5, 128))


@case("MultiheadAttention with mask")
def _(library: Library) -> None:
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = True
    inputs = (x(2, 5, 128),) * 3
    check(library, _attention(), *inputs, key_padding_mask=mask, need_weights=False)


def _encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


@case("TransformerEncoder in eval mode")
def _(library: Library) -> None:
    check(library, _encoder(), x(2, 5, 128))


@case("TransformerEncoder with mask")
def _(library: Library) -> None:
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = True
    model = _encoder().eval()
    with torch.no_grad():
        right = model(x(2, 5, 128), src_key_padding_mask=mask)
        got = library.quantize(model).eval()(x(2, 5, 128), src_key_padding_mask=mask)
    close(got[~mask], right[~mask], library.tolerance)


@case("shared module stays shared")
def _(library: Library) -> None:
    layer = linear(128, 128)
    model = check(library, nn.Sequential(layer, nn.ReLU(), layer), x())
    assert model[0] is model[2], "two modules now"


class Tied(nn.Module):
    """An embedding and a head of one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 128)
        self.head = nn.Linear(128, 64, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.head(self.embed(ids))


@case("tie kept or reported")
def _(library: Library) -> None:
    told = library.reports(Tied())
    model: Any = check(library, Tied(), torch.arange(10))
    tensors = [[*part.parameters(), *part.buffers()] for part in (model.embed, model.head)]
    places = [{tensor.data_ptr() for tensor in part} for part in tensors]
    assert places[0] & places[1] or "tied" in told, "the tie is broken in silence"


class Adapter(nn.Linear):
    """As adapters do: more than x W^T + b."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.a, self.b = nn.Linear(in_features, 4), nn.Linear(4, out_features)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The base layer and the adapter."""
        return super().forward(input) + 3 * self.b(self.a(input))


@case("subclass with another forward")
def _(library: Library) -> None:
    torch.manual_seed(0)
    check(library, nn.Sequential(Adapter(128, 64)), x())


@case("parametrised weight")
def _(library: Library) -> None:
    layer = linear()
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Tanh())
    check(library, nn.Sequential(layer), x())


@case("weight_norm")
def _(library: Library) -> None:
    layer = parametrizations.weight_norm(linear())
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2)
    check(library, nn.Sequential(layer), x())


@case("pruned")
def _(library: Library) -> None:
    check(library, nn.Sequential(prune.l1_unstructured(linear(), "weight", 0.5)), x())


@case("lazy layer")
def _(library: Library) -> None:
    model = nn.Sequential(nn.LazyLinear(64), linear(32, 64))
    with suppress(ValueError, TypeError, RuntimeError):
        model = library.quantize(model)
    assert model.eval()(x()).isfinite().all()


def _state(model: nn.Module) -> list[Any]:
    return [(name, type(module), id(module)) for name, module in model.named_modules()]


@case("an error half-way changes nothing")
def _(library: Library) -> None:
    model = nn.Sequential(linear(), linear(64, 64, dtype=torch.complex64), linear(64, 64))
    before, weight = _state(model), model[0].weight
    try:
        library.quantize(model)
    except Exception:
        assert _state(model) == before and model[0].weight is weight, "half of the model is changed"
        return
    kept = type(model[1]) is nn.Linear and model[1].weight.dtype == torch.complex64
    assert kept, "complex numbers were taken in silence"


@case("quantized twice")
def _(library: Library) -> None:
    model = nn.Sequential(linear(), nn.ReLU(), linear(32, 64)).eval()
    once = library.quantize(model).eval()
    right = once(x()).detach()
    twice = library.quantize(once).eval()
    close(twice(x()), right, 1e-6)


@case("forward hook survives")
def _(library: Library) -> None:
    model, calls = nn.Sequential(linear()), []
    model[0].register_forward_hook(lambda *args: calls.append(1))
    library.quantize(model).eval()(x())
    assert calls == [1], f"called {len(calls)} times"


@case("training flags survive")
def _(library: Library) -> None:
    model = nn.Sequential(linear(), nn.Dropout(), linear(32, 64)).eval()
    model[2].train()
    model = library.quantize(model)
    flags = [module.training for module in (model, model[0], model[2])]
    assert flags == [False, False, True], f"{flags}"


@case("the root is a layer")
def _(library: Library) -> None:
    layer = library.quantize(linear()).eval()
    assert type(getattr(layer, "weight", None)) is not nn.Parameter, "nothing was quantized"
    close(layer(x()), linear()(x()), library.tolerance)


@case("5000 modules deep")
def _(library: Library) -> None:
    model: nn.Module = linear()
    for _ in range(5000):
        outer = nn.Module()
        outer.inner = model
        model = outer
    library.quantize(model)
    while hasattr(model, "inner"):
        model = model.inner
    assert type(getattr(model, "weight", None)) is not nn.Parameter, "nothing was quantized"


# ---- travel ----------------------------------------------------------------------------------


def _quantized(library: Library) -> tuple[nn.Module, torch.Tensor]:
    model = library.quantize(nn.Sequential(linear(), nn.ReLU(), linear(32, 64)).eval()).eval()
    return model, model(x()).detach()


@case("pickle")
def _(library: Library) -> None:
    model, right = _quantized(library)
    close(pickle.loads(pickle.dumps(model))(x()), right, 1e-6)


@case("deepcopy")
def _(library: Library) -> None:
    model, right = _quantized(library)
    close(copy.deepcopy(model)(x()), right, 1e-6)


@case("state dict by torch.save")
def _(library: Library) -> None:
    model, right = _quantized(library)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = library.quantize(nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32)))
    other.load_state_dict(torch.load(file, weights_only=True))
    close(other.eval()(x()), right, 1e-6)


@case("state dict by safetensors")
def _(library: Library) -> None:
    from safetensors.torch import load_file, save_file

    model, right = _quantized(library)
    with tempfile.TemporaryDirectory() as place:
        save_file(model.state_dict(), f"{place}/a.safetensors")
        state = load_file(f"{place}/a.safetensors")
    other = library.quantize(nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32)))
    other.load_state_dict(state)
    close(other.eval()(x()), right, 1e-6)
