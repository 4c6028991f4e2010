"""Bad arguments of quantize, measure, encode and decode: refused before anything is written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from quantization import _kernels
from tests.kernels import quantize_calls as calls
from tests.memory import Guarded
from tests.oracle import Spec, largest, replace
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

MATRIX = np.ones((4, 6), np.float32)


class Call:
    """Buffers of one quantize call, in an order of arguments that tests may spoil."""

    def __init__(self, spec: Spec, **changes: Any) -> None:
        self.codes = Guarded((4, 6), np.int8)
        self.scale = Guarded((4, 1), np.float32)
        self.zero = Guarded((4, 1), np.int32)
        self.named: dict[str, Any] = {
            "codes": self.codes.array,
            "scale": self.scale.array,
            "zero": self.zero.array,
            "source": MATRIX,
        }
        self.grid: list[Any] = [4, 6, 1, 6]
        self.spec = list(calls.arguments(spec))
        self.named.update(changes)

    def quantize(self) -> None:
        _kernels.quantize(*self.named.values(), *self.grid, *self.spec)

    def measure(self) -> None:
        given = [self.named[name] for name in ("scale", "zero", "source")]
        _kernels.measure(*given, *self.grid, *self.spec)

    def encode(self) -> None:
        given = [self.named[name] for name in ("codes", "source", "scale", "zero")]
        _kernels.encode(*given, *self.grid, *self.spec)

    def refused(self, error: type[Exception], text: str | None = None) -> None:
        """Each of the three calls raises, and no output changes."""
        for call in (self.quantize, self.measure, self.encode):
            with pytest.raises(error, match=text):
                call()
        for memory in (self.codes, self.scale, self.zero):
            memory.check()
            assert memory.untouched()


def test_a_good_call_is_taken() -> None:
    call = Call(Spec())
    call.quantize()
    assert (call.codes.array == 127).all()


@pytest.mark.parametrize(
    ("position", "number"),
    [
        (0, _kernels.INT8),
        (0, _kernels.FLOAT8_E4M3FN),
        (0, 99),
        (0, -1),
        (1, _kernels.FLOAT64),
        (1, 99),
        (1, -1),
        (2, _kernels.INT8),
        (2, 99),
        (2, -1),
    ],
)
def test_dtypes_of_the_wrong_class(position: int, number: int) -> None:
    call = Call(Spec())
    call.spec[position] = number
    with pytest.raises((TypeError, ValueError)):
        call.quantize()
    assert call.codes.untouched()
    assert call.scale.untouched()


@pytest.mark.parametrize("number", [-1, 3, 1000])
def test_unknown_modes(number: int) -> None:
    call = Call(Spec())
    call.spec[3] = number
    call.refused(ValueError, "code range")


@pytest.mark.parametrize(
    "spec",
    [
        Spec(code_min=-129),
        Spec(code_max=128),
        Spec(code_min=-128.5),
        Spec(code_min=-0.5, code_max=0.5),
        Spec(code_min=5, code_max=5),
        Spec(code_min=7, code_max=-7),
        Spec(code_min=float("nan")),
        Spec(code_max=float("inf")),
        Spec(code_min=-3, code_max=10),
        Spec(code_min=-10, code_max=3),
        Spec(code_min=1, code_max=10),
        Spec(code_min=-1, code_max=127, mode="binary"),
        Spec(code_min=0, code_max=1, mode="binary"),
        Spec(code_min=-2, code_max=1, mode="binary"),
        Spec(code="uint8"),
        Spec(code="uint8", code_min=0, code_max=256),
        Spec(code="uint8", code_min=-1, code_max=1, mode="binary"),
        Spec(code="uint8", code_min=0, code_max=256, mode="asymmetric"),
    ],
    ids=str,
)
def test_code_ranges(spec: Spec) -> None:
    Call(spec).refused(ValueError, "code range")


@pytest.mark.parametrize("code", ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_float_codes_are_symmetric_and_within_their_type(code: str) -> None:
    good = Spec().to_float(code)
    top = largest(code)
    wider = float(np.nextafter(top, np.inf))
    for changes in ({"code_min": 0.0}, {"code_min": -top / 2}, {"code_max": wider}):
        with pytest.raises(ValueError, match="code range"):
            calls.quantize(MATRIX, (1, 6), replace(good, **changes))
    with pytest.raises(ValueError, match="code range"):
        calls.quantize(MATRIX, (1, 6), replace(good, code_min=-wider, code_max=wider))
    for mode in ("asymmetric", "binary"):
        with pytest.raises(TypeError, match="dtype"):
            calls.quantize(MATRIX, (1, 6), replace(good, mode=mode))


def test_asymmetric_needs_zero_points_and_symmetric_does_not() -> None:
    call = Call(Spec(mode="asymmetric", code_min=-128), zero=None)
    for refused in (call.quantize, call.measure):
        with pytest.raises(ValueError, match="zero points"):
            refused()
    assert call.codes.untouched()
    assert call.scale.untouched()
    call = Call(Spec(), zero=None)
    call.quantize()
    assert (call.scale.array == np.float32(1 / 127)).all()


@pytest.mark.parametrize(
    "grid",
    [
        (4, 6, 0, 6),
        (4, 6, 1, 0),
        (4, 6, -1, 6),
        (4, 6, 1, -6),
        (-4, 6, 1, 6),
        (4, -6, 1, 6),
        (2**62, 2**62, 1, 6),
        (2**40, 2**40, 1, 2**40),
        (2**63 - 1, 2, 1, 2),
    ],
)
def test_grids(grid: tuple[int, ...]) -> None:
    call = Call(Spec())
    call.grid = list(grid)
    call.refused(ValueError)
    with pytest.raises(ValueError):
        _kernels.decode(
            MATRIX.copy(), call.codes.array, MATRIX[:, :1].copy(), None, *grid, 0, _kernels.INT8
        )


@pytest.mark.parametrize("name", ["codes", "scale", "zero", "source"])
def test_arrays_of_the_wrong_kind(name: str) -> None:
    good = Call(Spec()).named[name]
    wrong = [
        good.tolist(),
        good[:-1].copy(),
        np.zeros(good.size + 1, good.dtype),
        np.zeros(good.shape, f"V{good.itemsize * 2}"),
        np.zeros((*good.shape, 2), good.dtype)[..., 0],
    ]
    if good.itemsize > 1:
        wrong.append(good.astype(good.dtype.newbyteorder()))
    if name != "source":
        frozen = good.copy()
        frozen.flags.writeable = False
        wrong.append(frozen)
    for array in wrong:
        call = Call(Spec(), **{name: array})
        with pytest.raises((TypeError, ValueError), match=name):
            call.quantize()
        assert call.codes.untouched()
        assert call.scale.untouched()


def test_outputs_may_not_share_memory() -> None:
    memory = np.ones(160, np.uint8)
    source = memory[:96].view(np.float32).reshape(4, 6)
    for codes in (memory[:24], memory[95:119], memory[40:64]):
        call = Call(Spec(), source=source, codes=codes.view(np.int8).reshape(4, 6))
        for refused in (call.quantize, call.encode):
            with pytest.raises(ValueError, match="shares memory"):
                refused()
    scale = memory[80:96].view(np.float32).reshape(4, 1)
    call = Call(Spec(), source=source, scale=scale)
    for refused in (call.quantize, call.measure):
        with pytest.raises(ValueError, match="shares memory"):
            refused()
    both = np.zeros((4, 1), np.float32)
    call = Call(Spec(), scale=both, zero=both.view(np.int32))
    with pytest.raises(ValueError, match="shares memory"):
        call.quantize()
    assert (memory == 1).all()
    with pytest.raises(ValueError, match="shares memory"):
        _kernels.decode(
            source, memory[90:].view(np.int8)[:24].reshape(4, 6), both, None, 4, 6, 1, 6, 0, 6
        )


@pytest.mark.parametrize(
    ("out", "code"),
    [
        (_kernels.INT8, _kernels.INT8),
        (_kernels.FLOAT8_E5M2, _kernels.INT8),
        (_kernels.FLOAT64, _kernels.FLOAT64),
        (99, _kernels.INT8),
        (_kernels.FLOAT32, 99),
        (-1, -1),
    ],
)
def test_decode_of_dtypes_it_does_not_take(out: int, code: int) -> None:
    sizes = {_kernels.INT8: 1, _kernels.FLOAT8_E5M2: 1, _kernels.FLOAT64: 8}
    result = Guarded((4, 6), f"V{sizes.get(out, 4)}")
    codes = np.zeros((4, 6), f"V{sizes.get(code, 4)}")
    scale = np.ones((4, 1), np.float64 if out == _kernels.FLOAT64 else np.float32)
    with pytest.raises((TypeError, ValueError)):
        _kernels.decode(result.array, codes, scale, None, 4, 6, 1, 6, out, code)
    assert result.untouched()
