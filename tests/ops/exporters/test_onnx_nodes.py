"""Whole models through torch's ONNX exporter: the nodes, and what ONNX Runtime makes of them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn

from quantization import quantize_model
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

pytestmark = pytest.mark.filterwarnings("ignore")

# scheme -> nodes that the two layers become
NODES = {
    "w8a16": {"DequantizeLinear": 2},
    "w4g16": {"MatMulNBits": 2},
    "w4g32a": {"MatMulNBits": 2},
    "w4g32af": {"MatMulNBits": 2},
    "w4": {"MatMulNBits": 2},
    "w4a": {"MatMulNBits": 2},
    "w4g48a": {"MatMulNBits": 2},  # cut into blocks of 16
    "w4g32a+dq": {"MatMulNBits": 2},
    "w2g16a": {"MatMulNBits": 2},
    "w8g32": {"MatMulNBits": 2},
    "w8g48a": {"MatMulNBits": 2},
    "w8g32af": {},
    "w4g8": {},
    "w3g32a": {},
    "nf4g32": {},
    "mxfp4": {},
    "ternary": {},
    "kmeans4r": {},
}


@pytest.fixture(scope="module", autouse=True)
def _needed() -> None:
    for package in ("onnxscript", "onnx", "onnxruntime"):
        pytest.importorskip(package)


def model_of(scheme: Any, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(100, 48, bias=False), nn.LayerNorm(48), nn.ReLU(), nn.Linear(48, 7)
    )
    quantize_model(model.eval(), scheme, **options)
    return model


def exported(model: nn.Module, *inputs: torch.Tensor, **options: Any) -> Any:
    return torch.onnx.export(model, inputs, dynamo=True, verbose=False, **options)


def nodes(program: Any) -> dict[str, int]:
    names = [node.op_type for node in program.model.graph]
    return {
        name: names.count(name) for name in ("DequantizeLinear", "MatMulNBits") if name in names
    }


def run(program: Any, *inputs: torch.Tensor) -> torch.Tensor:
    import onnxruntime

    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    feed = dict(zip(names, (np.asarray(each) for each in inputs), strict=True))
    return torch.from_numpy(session.run(None, feed)[0])


def assert_close(got: torch.Tensor, model: nn.Module, *inputs: torch.Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(got, model(*inputs), rtol=1e-4, atol=1e-5)


def test_layers_become_nodes_that_run_with_sizes_not_known_yet() -> None:
    model = nn.Sequential(nn.Embedding(30, 100), model_of({"0": "w8a16", "3": "w4g16a"}))
    quantize_model(model, {"0": "w4g16a", "*": None})  # its LayerNorm can be trained
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    words = torch.randint(0, 30, (2, 3))
    program = exported(model, words, dynamic_shapes=({0: batch, 1: length},))
    assert nodes(program) == {"DequantizeLinear": 1, "MatMulNBits": 1}
    other = torch.randint(0, 30, (5, 4))
    assert_close(run(program, other), model, other)


@pytest.mark.deep
@pytest.mark.parametrize("scheme", NODES)
def test_every_scheme_becomes_nodes_that_run(scheme: str) -> None:
    model, x = model_of(scheme), torch.randn(5, 100)
    program = exported(model, x)
    assert nodes(program) == NODES[scheme]
    assert_close(run(program, x), model, x)


@pytest.mark.deep
@pytest.mark.parametrize("scheme", ["w8a16", "w4g32a"])
def test_other_dtypes_and_a_row_without_a_batch(scheme: str) -> None:
    for dtype in (torch.float16, torch.float64):
        model, x = model_of(scheme).to(dtype), torch.randn(100, dtype=dtype)
        got = run(exported(model, x), x)
        with torch.no_grad():
            wanted = model(x)
        assert got.dtype == dtype
        torch.testing.assert_close(got, wanted, rtol=3e-3, atol=3e-3)


@pytest.mark.deep
def test_a_program_that_was_exported_before() -> None:
    model, x = model_of("w4g32a"), torch.randn(5, 100)
    program = torch.onnx.export(torch.export.export(model, (x,)), dynamo=True, verbose=False)
    assert nodes(program) == NODES["w4g32a"]
    assert_close(run(program, x), model, x)


def test_the_old_exporter_names_the_new_one() -> None:
    model, x = model_of("w4g32a"), torch.randn(5, 100)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="dynamo=True"):
            torch.onnx.export(model, (x,), io.BytesIO(), dynamo=False)
