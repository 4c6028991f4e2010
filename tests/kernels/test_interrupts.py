"""A signal is heard in the middle of a native call, and what its handler raises comes out."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from quantization import Granularity, _kernels, pack_weights, quantize_linear
from quantization.ops import native
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

X = np.ones((4096, 1024), np.float32)
CODES = np.ones((4096, 2048), np.int8)
WEIGHTS = np.ones((512, 1024), np.int8)


def _layer() -> Callable[[], Any]:
    torch = pytest.importorskip("torch")
    from quantization import PackedLinearLayer

    layer, x = PackedLinearLayer(1024, 512, scheme="w4g32"), torch.ones(480, 1024)
    return lambda: layer(x)


CALLS: dict[str, Callable[[], Callable[[], Any]]] = {
    "quantize": lambda: lambda: quantize_linear(X, "int8", Granularity.PerDimension(1)),
    "slabs": lambda: lambda: quantize_linear(X, "int8", Granularity.PerTensor),
    "pack": lambda: lambda: pack_weights(CODES, 4, layout="dense"),
    "linear": lambda: lambda: native.linear(X[:480], WEIGHTS, np.ones(512, np.float32)),
    "layer": _layer,
}


class HeardError(Exception):
    pass


@pytest.fixture(autouse=True)
def slow_kernels() -> Iterator[None]:
    before = _kernels.active_isa(), signal.getsignal(signal.SIGPROF)
    _kernels.set_isa("reference")
    _kernels.set_num_threads(1)
    yield
    _kernels.set_isa(before[0])
    _kernels.set_num_threads(0)
    signal.signal(signal.SIGPROF, before[1])


@pytest.mark.parametrize("name", list(CALLS))
def test_a_signal_ends_a_call(name: str) -> None:
    call = CALLS[name]()
    call()  # what is made once is made
    begin = time.process_time()
    right = call()
    whole = time.process_time() - begin

    def handler(*_: Any) -> None:
        raise HeardError("by the handler")

    signal.signal(signal.SIGPROF, handler)
    begin = time.process_time()
    with pytest.raises(HeardError, match="by the handler"):
        signal.setitimer(signal.ITIMER_PROF, whole / 10)
        call()
    assert time.process_time() - begin < max(0.8 * whole, whole / 10 + 0.1)
    again = call()  # nothing is left of it
    np.testing.assert_equal(_numbers(again), _numbers(right))


def _numbers(result: Any) -> Any:
    if isinstance(result, tuple):  # codes and parameters
        return np.asarray(result[0])
    return np.asarray(getattr(result, "data", result))


def test_a_handler_that_returns_is_called_and_the_call_goes_on() -> None:
    heard = []
    signal.signal(signal.SIGPROF, lambda *_: heard.append(1))
    begin = time.process_time()
    native.linear(X[:48], WEIGHTS, np.ones(512, np.float32))
    whole = time.process_time() - begin
    signal.setitimer(signal.ITIMER_PROF, whole / 10)
    y = native.linear(X[:48], WEIGHTS, np.ones(512, np.float32))
    assert heard == [1] and (y == 1024).all()
