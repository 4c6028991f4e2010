"""quantized_forward on ndarrays and torch tensors: kinds, layouts, bad input."""

from __future__ import annotations

import doctest
import subprocess
import sys

import numpy as np
import pytest

from quantization.ops import linear
from quantization.ops.linear import quantized_forward
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

OUT, IN = 5, 7
RNG = np.random.default_rng(0)
WEIGHTS = RNG.integers(-128, 128, (OUT, IN)).astype(np.int8)
SCALES = RNG.uniform(0.01, 0.1, OUT).astype(np.float32)
BIAS = RNG.standard_normal(OUT).astype(np.float32)
X = RNG.standard_normal((3, IN)).astype(np.float32)


def expected(x: np.ndarray) -> np.ndarray:
    weights = WEIGHTS.astype(np.float64) * SCALES.astype(np.float64)[:, None]
    return x.astype(np.float64) @ weights.T + BIAS


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_values_keep_the_dtype_of_the_input(isa: str, dtype: str) -> None:
    x = X.astype(dtype)
    y = quantized_forward(WEIGHTS, x, SCALES, BIAS)
    assert y.dtype == x.dtype
    tolerance = 4 * np.finfo(dtype).eps if dtype == "float16" else 1e-5
    np.testing.assert_allclose(y, expected(x), rtol=tolerance, atol=tolerance)


def misaligned(array: np.ndarray) -> np.ndarray:
    memory = np.zeros(array.nbytes + 1, np.uint8)
    copy = memory[1:].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def frozen(array: np.ndarray) -> np.ndarray:
    copy = array.copy()
    copy.flags.writeable = False
    return copy


@pytest.mark.parametrize(
    "layout",
    [
        np.asfortranarray,
        lambda a: np.flip(np.flip(a).copy()),
        lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
        lambda a: a.astype(a.dtype.newbyteorder()),
        misaligned,
        frozen,
    ],
    ids=["fortran", "negative strides", "strided", "other byte order", "misaligned", "read-only"],
)
def test_any_memory_layout(layout) -> None:
    given = [layout(array) for array in (WEIGHTS, X, SCALES, BIAS)]
    plain = quantized_forward(WEIGHTS, X, SCALES, BIAS)
    assert np.array_equal(quantized_forward(*given), plain)


@pytest.mark.parametrize("shape", [(IN,), (0, IN), (2, 0, IN), (1, 1, 2, IN)])
def test_batches_of_any_rank(shape: tuple[int, ...]) -> None:
    x = RNG.standard_normal(shape).astype(np.float32)
    y = quantized_forward(WEIGHTS, x, SCALES, BIAS)
    assert y.shape == (*shape[:-1], OUT)
    np.testing.assert_allclose(y, expected(x), rtol=1e-5, atol=1e-5)


def test_layers_without_outputs_or_inputs() -> None:
    assert quantized_forward(WEIGHTS[:0], X, SCALES[:0]).shape == (3, 0)
    assert np.array_equal(quantized_forward(WEIGHTS[:, :0], X[:, :0], SCALES, BIAS), [BIAS] * 3)
    assert not quantized_forward(WEIGHTS[:, :0], X[:, :0], SCALES).any()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"weights": None}, TypeError, "weights must be a torch.Tensor or numpy.ndarray, not None"),
        ({"input": [[1.0]]}, TypeError, "input must be a torch.Tensor or numpy.ndarray, not list"),
        ({"scales": 0.5}, TypeError, "scales must be a torch.Tensor or numpy.ndarray, not float"),
        ({"bias": 1.0}, TypeError, "bias must be a torch.Tensor or numpy.ndarray, not float"),
        ({"weights": WEIGHTS.view("u1")}, TypeError, "weights have dtype uint8; only int8"),
        ({"weights": WEIGHTS[0]}, ValueError, r"weights have shape \(7,\); expected \[out"),
        ({"input": X.astype(int)}, TypeError, "input has dtype int64; allowed are float32"),
        ({"input": X[:, 1:]}, ValueError, r"shape \(3, 6\); its last dimension must be .* = 7"),
        ({"input": np.ones((), "f4")}, ValueError, r"input has shape \(\); its last dimension"),
        ({"scales": SCALES[1:]}, ValueError, r"scales has shape \(4,\); expected .* = \(5,\)"),
        ({"scales": SCALES[:, None]}, ValueError, r"scales has shape \(5, 1\); expected"),
        ({"scales": SCALES.astype("i4")}, TypeError, "scales has dtype int32; allowed are"),
        ({"bias": BIAS[:2]}, ValueError, r"bias has shape \(2,\); expected .* = \(5,\)"),
        ({"bias": BIAS.astype(bool)}, TypeError, "bias has dtype bool; allowed are"),
    ],
)
def test_refusals(change: dict, error: type[Exception], text: str) -> None:
    given = {"weights": WEIGHTS, "input": X, "scales": SCALES, "bias": BIAS} | change
    with pytest.raises(error, match=text):
        quantized_forward(**given)


def test_torch_tensors_and_no_mixture() -> None:
    torch = pytest.importorskip("torch")
    weights, x, scales, bias = map(torch.from_numpy, (WEIGHTS, X, SCALES, BIAS))
    y = quantized_forward(weights, x, scales, bias)
    assert np.array_equal(y.numpy(), quantized_forward(WEIGHTS, X, SCALES, BIAS))
    with pytest.raises(TypeError, match="weights is a ndarray, but input a Tensor: pass torch"):
        quantized_forward(WEIGHTS, x, scales, bias)
    with pytest.raises(TypeError, match="bias is a Tensor, but input a ndarray: pass torch"):
        quantized_forward(WEIGHTS, X, SCALES, bias)
    with pytest.raises(RuntimeError, match="some tensors are on the meta device"):
        quantized_forward(weights.to("meta"), x, scales, bias)


def test_torch_is_not_imported() -> None:
    code = """
import sys
import numpy as np
from quantization import quantized_forward
y = quantized_forward(np.ones((2, 3), np.int8), np.ones((1, 3)), np.ones(2))
assert y.tolist() == [[3.0, 3.0]]
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_examples() -> None:
    assert doctest.testmod(linear).failed == 0
