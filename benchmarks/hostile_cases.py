"""The hostile battery: 47 things that people do to quantized models, each a function of a library.

Numbers and runs are here, modules in :mod:`benchmarks.hostile_modules`. A case passes if it
returns. Where a library may refuse, an error is as good as the right answer; a wrong number without
a word, a half-changed model or a hang never is.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from benchmarks.hostile_libraries import Library

Case = Callable[[Library], None]
CASES: dict[str, Case] = {}


def case(name: str) -> Callable[[Case], Case]:
    """Add a case under that name."""

    def add(function: Case) -> Case:
        CASES[name] = function
        return function

    return add


def linear(out_features: int = 64, in_features: int = 128, **options: Any) -> nn.Linear:
    """A layer of the same numbers each time."""
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, **options)


def close(got: torch.Tensor, right: torch.Tensor, tolerance: float) -> None:
    """Raise unless two outputs differ by less than codes explain."""
    assert got.shape == right.shape, f"shape {tuple(got.shape)}, not {tuple(right.shape)}"
    right = right.detach().double()
    error = float((got.detach().double() - right).norm() / (right.norm() + 1e-300))
    assert error <= tolerance or not right.numel(), f"relative error {error:.2g}"


def check(library: Library, model: nn.Module, *inputs: Any, **options: Any) -> nn.Module:
    """Quantize a model and compare its output with that of before."""
    model.eval()
    with torch.no_grad():
        right = model(*inputs, **options)
        quantized = library.quantize(model).eval()
        got = quantized(*inputs, **options)
    right, got = (y[0] if isinstance(y, tuple) else y for y in (right, got))
    close(got, right, library.tolerance)
    return quantized


def with_weight(weight: torch.Tensor) -> nn.Module:
    """A model of one layer of that weight."""
    layer = linear(*weight.shape, bias=False)
    layer.weight = nn.Parameter(weight)
    return nn.Sequential(layer)


def x(*shape: int) -> torch.Tensor:
    """The same activations each time."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*(shape or (4, 128)), generator=generator)


# ---- numbers ---------------------------------------------------------------------------------


def _row(value: float) -> nn.Module:
    weight = linear().weight.detach().clone()
    weight[3] = value
    return with_weight(weight)


@case("zero row")
def _(library: Library) -> None:
    model = check(library, _row(0.0), x())
    assert (model(x())[:, 3] == 0).all(), "the row is not zero"


@case("all zeros")
def _(library: Library) -> None:
    model = library.quantize(with_weight(torch.zeros(64, 128))).eval()
    assert (model(x()) == 0).all(), "not zero"


@case("denormal row")
def _(library: Library) -> None:
    model = check(library, _row(1e-40), x())
    assert model(x())[:, 3].abs().max() < 1e-30, "the row grew"


@case("tiny row")
def _(library: Library) -> None:
    check(library, _row(1e-30), x())


@case("huge row")
def _(library: Library) -> None:
    model = library.quantize(_row(1e38)).eval()
    right = linear(bias=False)(x() * 1e-6)
    got = model(x() * 1e-6)
    keep = [i for i in range(64) if i != 3]
    close(got[:, keep], right[:, keep], library.tolerance)
    assert got[:, 3].isfinite().all(), "the row is not finite"


def _one_bad_row(library: Library, value: float) -> None:
    """Refused, or that row alone is lost."""
    try:
        model = library.quantize(_row(value)).eval()
    except (ValueError, RuntimeError):
        return
    got, right = model(x()), linear(bias=False)(x())
    keep = [i for i in range(64) if i != 3]
    close(got[:, keep], right[:, keep], library.tolerance)
    assert not got[:, 3].isfinite().all(), "the row became finite in silence"


@case("NaN in one row")
def _(library: Library) -> None:
    _one_bad_row(library, math.nan)


@case("infinity in one row")
def _(library: Library) -> None:
    _one_bad_row(library, math.inf)


@case("odd K")
def _(library: Library) -> None:
    check(library, nn.Sequential(linear(33, 67)), x(4, 67))


@case("1 x 1")
def _(library: Library) -> None:
    check(library, nn.Sequential(linear(1, 1)), x(4, 1))


@case("transposed weight")
def _(library: Library) -> None:
    check(library, with_weight(linear(128, 64).weight.detach().t()), x())


@case("strided weight")
def _(library: Library) -> None:
    check(library, with_weight(linear(128, 256).weight.detach()[::2, ::2]), x())


@case("misaligned weight")
def _(library: Library) -> None:
    weight = linear().weight.detach()
    raw = bytearray(b"\0" + weight.numpy().tobytes())
    moved = torch.frombuffer(raw, dtype=torch.float32, offset=1, count=weight.numel())
    check(library, with_weight(moved.view(64, 128)), x())


@case("bfloat16")
def _(library: Library) -> None:
    model = nn.Sequential(linear()).bfloat16()
    right = model(x().bfloat16()).float()
    close(library.quantize(model).eval()(x().bfloat16()).float(), right, library.tolerance + 0.01)


@case("no rows of input")
def _(library: Library) -> None:
    check(library, nn.Sequential(linear()), x(0, 128))


@case("1-D input")
def _(library: Library) -> None:
    check(library, nn.Sequential(linear()), x(128))


@case("3-D input")
def _(library: Library) -> None:
    check(library, nn.Sequential(linear()), x(2, 3, 128))


@case("4-D input")
def _(library: Library) -> None:
    check(library, nn.Sequential(linear()), x(2, 1, 3, 128))


@case("strided input")
def _(library: Library) -> None:
    check(library, nn.Sequential(linear()), x(128, 8).t()[::2])


# ---- runs ------------------------------------------------------------------------------------


def _in_child(function: Callable[[], Any], seconds: float) -> None:
    """Raise unless a forked child ends well in time."""
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            function()
            os._exit(0)
        os._exit(1)
    timer = threading.Timer(seconds, os.kill, (child, 9))
    timer.start()
    status = os.waitpid(child, 0)[1]
    timer.cancel()
    assert status == 0, "the child hangs" if os.WIFSIGNALED(status) else "the child fails"


def _large(library: Library) -> tuple[nn.Module, torch.Tensor]:
    torch.set_num_threads(2)
    model = library.quantize(nn.Sequential(linear(2048, 1024))).eval()
    return model, x(64, 1024)


@case("fork after forward")
def _(library: Library) -> None:
    model, rows = _large(library)
    with torch.no_grad():
        model(rows)
        (rows @ rows.t()).add(torch.zeros(64, 64))
        torch.zeros(1 << 20).add(1)
        _in_child(lambda: model(rows), 8)


@case("quantize after fork")
def _(library: Library) -> None:
    models = [nn.Sequential(linear(2048, 1024)), nn.Sequential(linear(2048, 1024).bfloat16())]
    torch.set_num_threads(2)
    torch.zeros(1 << 20).add(1)
    _in_child(lambda: [library.quantize(model) for model in models], 8)


@case("equal bits for 1 and 8 rows")
def _(library: Library) -> None:
    model, rows = _large(library)
    with torch.no_grad():
        whole = model(rows[:8])
        assert torch.equal(whole[:1], model(rows[:1])), "other bits"


@case("equal bits on 1 and 2 threads")
def _(library: Library) -> None:
    model, rows = _large(library)
    with torch.no_grad():
        two = model(rows)
        torch.set_num_threads(1)
        assert torch.equal(model(rows), two), "other bits"


@case("six threads at once")
def _(library: Library) -> None:
    model, rows = _large(library)
    with torch.no_grad():
        right = model(rows)
        got: list[torch.Tensor] = []
        threads = [threading.Thread(target=lambda: got.append(model(rows))) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(got) == 6
    for each in got:
        close(each, right, 1e-5)


@case("autocast")
def _(library: Library) -> None:
    model = nn.Sequential(linear()).eval()
    right = model(x())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        got = library.quantize(model).eval()(x())
    close(got.float(), right, library.tolerance + 0.02)


@case("the source is not changed")
def _(library: Library) -> None:
    weight = linear().weight.detach().clone()
    kept = weight.clone()
    library.quantize(with_weight(weight))
    assert torch.equal(weight, kept), "its numbers changed"


@case("gradient of the input")
def _(library: Library) -> None:
    model = nn.Sequential(linear()).eval()
    rows, same = x().requires_grad_(), x().requires_grad_()
    model(rows).square().sum().backward()
    library.quantize(model).eval()(same).square().sum().backward()
    assert same.grad is not None, "there is none"
    close(same.grad, rows.grad, 2 * library.tolerance)
