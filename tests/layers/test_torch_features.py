"""What torch does with modules, done with each kind of layer: compilers, transforms, processes."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from quantization import PackedEmbedding, PackedLinearLayer, QWQALinearLayer
from quantization.ops import operators
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

ROOT = Path(__file__).resolve().parents[2]
WORDS, WIDTH = 30, 40
SCHEMES = [
    "w4g16a",
    "w4g16af+dq",
    "w3g16",
    "nf4",
    "w5g16a+dq",
    "ternary",
    "kmeans2r",
    "mxfp4",
    "w3g16af",
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


class Model(nn.Module):
    """One layer of each kind."""

    def __init__(self, scheme: str = "w4g16a") -> None:
        super().__init__()
        self.words = PackedEmbedding(WORDS, WIDTH, scheme=scheme)
        self.up = PackedLinearLayer(WIDTH, 24, scheme=scheme)
        self.down = QWQALinearLayer(24, WIDTH)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.tail(self.words(words))

    def tail(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


class Tail(Model):
    """Without the embedding, which no gradient passes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tail(x)


def words(count: int, length: int = 5) -> torch.Tensor:
    return torch.randint(0, WORDS, (count, length))


# ---- compilers -------------------------------------------------------------------------------


def test_compile_breaks_no_graph_and_compiles_once() -> None:
    model = Model()
    told = torch._dynamo.explain(model)(words(2))
    assert (told.graph_count, told.graph_break_count) == (1, 0)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for count in (2, 3, 7, 16):
        rows = words(count)
        torch.testing.assert_close(compiled(rows), model(rows))
    assert counter.frame_count == 1


@pytest.mark.parametrize("scheme", ["w4g16a", "nf4"])
def test_inductor_with_a_dynamic_batch_and_backward(scheme: str) -> None:
    whole, tail = Model(scheme), Tail(scheme)
    compiled = torch.compile(whole, fullgraph=True, dynamic=True)
    for count in (2, 5):
        rows = words(count)
        torch.testing.assert_close(compiled(rows), whole(rows))
    compiled = torch.compile(tail, fullgraph=True, dynamic=True)
    for count in (2, 5):
        x = torch.randn(count, WIDTH, requires_grad=True)
        compiled(x).square().sum().backward()
        other = x.detach().clone().requires_grad_()
        tail(other).square().sum().backward()
        torch.testing.assert_close(x.grad, other.grad)


def test_compile_under_autocast() -> None:
    model, rows = Model(), words(2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        y, wanted = compiled(rows), model(rows)
    assert y.dtype == wanted.dtype
    torch.testing.assert_close(y, wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("scheme", ["w4g16a", "nf4", "ternary", "w5g16a+dq"])
def test_export_with_a_dynamic_batch(scheme: str) -> None:
    model = Model(scheme)
    batch = torch.export.Dim("batch", min=1)
    for strict in (False, True):
        program = torch.export.export(
            model, (words(3),), dynamic_shapes={"words": {0: batch}}, strict=strict
        )
        stored = io.BytesIO()
        torch.export.save(program, stored)
        stored.seek(0)
        rows = words(9)
        assert torch.equal(torch.export.load(stored).module()(rows), model(rows))


def test_an_asked_for_type_is_given_in_every_form() -> None:
    x = torch.randn(3, WIDTH).bfloat16()
    for layer in (PackedLinearLayer(WIDTH, 8), QWQALinearLayer(WIDTH, 8)):
        y = layer(x, out_dtype=torch.float32)
        assert y.dtype == torch.float32
        assert torch.equal(y.bfloat16(), layer(x))
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x, out_dtype=torch.float32), y)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x, out_dtype=torch.float32).dtype == torch.float32
        with pytest.raises(RuntimeError, match="float32, bfloat16, float16 or float64"):
            layer(x, out_dtype=torch.int8)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_packed_operators_pass_torchs_own_checks(scheme: str) -> None:
    layer = PackedLinearLayer(WIDTH, 24, scheme=scheme)
    optional = (layer.scale_steps, layer.zero_points, layer.codebook)
    flags = (operators.HAS_STEPS, operators.HAS_ZEROS, operators.HAS_CODEBOOK)
    pairs = zip(flags, optional, strict=True)
    present = sum(flag for flag, tensor in pairs if tensor is not None)
    filled = [torch.zeros(1) if tensor is None else tensor for tensor in optional]
    tensors = (layer.packed_weights, layer.scales, *filled)
    numbers = (layer._bits, layer._group)
    given = present | operators.HAS_BIAS
    x, grad = torch.randn(3, WIDTH), torch.randn(3, 24)
    torch.library.opcheck(
        torch.ops.quantization.packed.default,
        (x, *tensors, layer.bias, *numbers, given, torch.float32),
    )
    torch.library.opcheck(
        torch.ops.quantization.packed_backward.default,
        (grad, *tensors, WIDTH, *numbers, present, torch.float32),
    )


# ---- transforms ------------------------------------------------------------------------------


def test_transforms_of_a_model() -> None:
    tail, x = Tail(), torch.randn(3, WIDTH)
    torch.testing.assert_close(torch.vmap(tail)(x), tail(x))
    asked = x.clone().requires_grad_()
    wanted = torch.autograd.grad(tail(asked).square().sum(), asked)[0]
    torch.testing.assert_close(torch.func.grad(lambda x: tail(x).square().sum())(x), wanted)
    each = torch.vmap(torch.func.grad(lambda x: tail(x).square().sum()))(x)
    torch.testing.assert_close(each, wanted)
    graph = torch.fx.symbolic_trace(tail)
    assert torch.equal(graph(x), tail(x))
    whole, rows = Model(), words(3)
    assert torch.equal(torch.fx.symbolic_trace(whole)(rows), whole(rows))
    assert torch.equal(torch.vmap(whole)(rows), whole(rows))
    state = dict(whole.named_buffers())
    assert torch.equal(torch.func.functional_call(whole, state, (rows,)), whole(rows))


def test_a_jacobian_by_rows_and_by_columns() -> None:
    tail, x = Tail(), torch.randn(WIDTH)
    by_rows, by_columns = torch.func.jacrev(tail)(x), torch.func.jacfwd(tail)(x)
    torch.testing.assert_close(by_rows, by_columns, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_activation_checkpoints(reentrant: bool, autocast: bool) -> None:
    tail, x = Tail(), torch.randn(3, WIDTH, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = checkpoint(tail, x, use_reentrant=reentrant)
        y.float().square().sum().backward()
        other = x.detach().clone().requires_grad_()
        tail(other).float().square().sum().backward()
    assert torch.equal(x.grad, other.grad)


# ---- processes -------------------------------------------------------------------------------

_CHILD = """
import sys, torch
from torch import multiprocessing
from quantization import PackedEmbedding, PackedLinearLayer, QWQALinearLayer

def work(layers, x, words, told, go):
    told.put([layers[0](x).tolist(), layers[1](x).tolist(), layers[2](words).tolist()])
    go.wait(60)
    told.put(layers[0](x).tolist())

if __name__ == "__main__":
    layers = [QWQALinearLayer(24, 8), PackedLinearLayer(24, 8), PackedEmbedding(9, 24)]
    x, words = torch.randn(3, 24), torch.arange(9)
    for layer in layers:
        layer.share_memory()
    context = multiprocessing.get_context("spawn")
    told, go = context.Queue(), context.Event()
    child = context.Process(target=work, args=(layers, x, words, told, go))
    child.start()
    wanted = [layers[0](x).tolist(), layers[1](x).tolist(), layers[2](words).tolist()]
    assert told.get(timeout=60) == wanted
    layers[0].int8_weights.zero_()  # one memory: the child sees it
    go.set()
    assert told.get(timeout=60) == layers[0].bias.expand(3, 8).tolist()
    child.join(60)
    assert child.exitcode == 0
    print("shared")
"""


def test_layers_in_shared_memory_work_in_another_process(tmp_path: Path) -> None:
    script = tmp_path / "shared.py"
    script.write_text(_CHILD)
    done = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "shared\n", done.stderr


class Features(Dataset):
    """Items that are made by the model, in the worker."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.rows = model, words(8)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        with torch.no_grad():
            return self.model(self.rows[index])


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_workers_of_a_data_loader_call_layers() -> None:
    data = Features(Model().eval())
    with torch.no_grad():
        wanted = data.model(data.rows)  # the parent has computed before
    batches = list(DataLoader(data, batch_size=4, num_workers=2))
    torch.testing.assert_close(torch.cat(batches), wanted)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("scheme", ["w4g64a", "nf4"])
def test_a_forked_child_can_run_a_packed_layer(scheme: str) -> None:
    """torch's own parallel operators hang there; the child compares by NumPy for that reason."""
    layer, x = PackedLinearLayer(512, 512, scheme=scheme), torch.randn(64, 512)
    wanted = layer(x).numpy().copy()
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        os._exit(0 if (layer(x).numpy() == wanted).all() else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_model_on_meta_comes_to_life() -> None:
    source = Model()
    with torch.device("meta"):
        model: Any = Model()
    assert model(words(2).to("meta")).shape == (2, 5, WIDTH)
    model.load_state_dict(source.state_dict(), assign=True)
    rows = words(3)
    assert torch.equal(model(rows), source(rows))


# ---- averages of models ----------------------------------------------------------------------


def averaged_codes(scheme: str, average: Any, use_buffers: bool) -> tuple[nn.Module, nn.Module]:
    """A model that was trained beside its frozen codes, and its average; both after 20 steps."""
    linear = nn.Linear(64, 64)
    layer: nn.Module = QWQALinearLayer.from_float(linear)
    if scheme != "int8":
        layer = PackedLinearLayer.from_float(linear, scheme)
    model = nn.Sequential(layer, nn.LayerNorm(64))
    mean = AveragedModel(model, multi_avg_fn=average, use_buffers=use_buffers)
    for step in range(20):
        nn.init.constant_(model[1].weight, step)
        mean.update_parameters(model)
    assert 0 < mean.module[1].weight[0] < 19
    return layer, mean.module[0]


def of_floats(averaged: Any, current: Any, count: Any) -> None:
    """As docs/torch.md has it."""
    if averaged[0].is_floating_point():
        get_ema_multi_avg_fn(0.9)(averaged, current, count)
    else:
        torch._foreach_copy_(averaged, current)


@pytest.mark.parametrize("scheme", ["int8", "w4g16a", "nf4"])
@pytest.mark.parametrize(
    ("average", "use_buffers"), [(get_ema_multi_avg_fn(0.9), False), (of_floats, True)]
)
def test_an_average_of_models_keeps_the_codes(scheme: str, average: Any, use_buffers: bool) -> None:
    layer, mean = averaged_codes(scheme, average, use_buffers)
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, mean.get_buffer(name)), name


@pytest.mark.parametrize("scheme", ["int8", "w4g16a"])
def test_torch_truncates_averages_of_codes(scheme: str) -> None:
    """A limit of torch that docs/torch.md tells; once this fails, the page can be shorter."""
    layer, mean = averaged_codes(scheme, get_ema_multi_avg_fn(0.9), use_buffers=True)
    assert not torch.equal(layer.codes, mean.codes)


class Encoder(nn.Module):
    """Layers between what can be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.model = nn.LayerNorm(WIDTH), Tail()
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.model(self.first(x)))


def test_a_model_that_can_be_trained_is_traced_and_saved() -> None:
    encoder, x = Encoder().eval(), torch.randn(2, WIDTH)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(encoder, (x,)), file)
    file.seek(0)
    again, other = torch.jit.load(file), torch.randn(5, WIDTH)
    torch.testing.assert_close(again(other), encoder(other))
