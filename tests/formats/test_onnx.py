"""MatMulNBits: constants against NumPy, and what ONNX Runtime computes from them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from quantization import PackedLinearLayer, QWQALinearLayer, pack_matrix, quantize_model
from quantization.checkpoint.stored_model import StoredLayer, StoredModel, stored_model
from quantization.formats import FormatError
from quantization.formats.onnx import export_layer_onnx, matmul_nbits, write_onnx
from tests.formats.foreign_oracle import matmul_nbits_numbers
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

EPS = 2.0**-24
SCHEMES = [
    *(f"w{bits}{span}{mode}" for bits in range(2, 9) for span in ("", "g32") for mode in ("", "a")),
    *("w4g16", "w4g48a", "w4g256", "w8g512a", "w4g128af", "w4af", "w1g32a", "w4t"),
    *("binary", "binaryg32", "ternary", "ternaryg64", "w4g64+dq", "w4g32a+f32"),
]
WIDTHS = {1: 2, 2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", SCHEMES)
def test_constants_stand_for_the_same_numbers(
    name: str, dtype: str, rng: np.random.Generator
) -> None:
    for shape in ((5, 640), (3, 100), (1, 1), (8, 33)):
        weight = torch.from_numpy(rng.normal(size=shape)).to(getattr(torch, dtype))
        packed = pack_matrix(weight, name)
        node = matmul_nbits(packed)
        exact = matmul_nbits_numbers(node)
        # code - zero is rounded where the zero point is a float
        rounding = 2 * EPS * np.abs(exact) if packed.scheme.zero_point == "float" else 0
        difference = np.abs(packed.dequantize("float32").numpy() - exact.astype("float32"))
        assert (difference <= rounding).all()
        blocks = -(-shape[1] // node.block_size)
        assert shape == (node.N, node.K) and node.bits == WIDTHS[packed.scheme.bits]
        assert node.B.shape == (shape[0], blocks, node.block_size * node.bits // 8)
        assert node.block_size in (16, 32, 64, 128, 256) and node.scales.dtype == np.float32
        assert node.attributes["accuracy_level"] == 1


@pytest.mark.parametrize(
    ("name", "shape", "block"),
    [
        ("w4g32", (4, 128), 32),
        ("w4g48", (4, 96), 16),
        ("w4g1024", (4, 2048), 256),
        ("w4", (4, 20), 32),
        ("w4", (4, 4096), 128),
        ("w4g64", (4, 64), 64),
    ],
)
def test_blocks_lie_within_groups(name: str, shape: Any, block: int) -> None:
    assert matmul_nbits(pack_matrix(torch.randn(shape), name)).block_size == block


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nf4", "codes of the grid 'nf4' are places in a table"),
        ("kmeans3", "the grid 'kmeans'"),
        ("mxfp4", "the grid 'mxfp4'"),
        ("w4g24", r"its groups of 24 cannot be cut into blocks of 16, 32"),
        ("w4g8", "its groups of 8"),
        ("w8g32af", "its codes of 8 bits become codes of 8, .* no float zero points; .* 'a', not"),
        ("w5af", "its codes of 5 bits become codes of 8, .* or in 4 bits or fewer"),
        ("w4+f64", "would round these of float64"),
    ],
)
def test_what_the_operator_cannot_hold_is_refused(name: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        matmul_nbits(pack_matrix(torch.randn(4, 96, dtype=torch.float64), name))


# ---- ONNX Runtime ----------------------------------------------------------------------------


def run(path: Path, x: np.ndarray) -> np.ndarray:
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        *("w2g32", "w2g64a", "w3g32a", "w4g16", "w4g32", "w4g128a", "w4", "w4a", "w4g64af"),
        *("w5g32", "w6a", "w8g32", "w8g128a", "w8", "ternaryg32", "binary", "w1g32a", "w4g64+dq"),
    ],
)
def test_onnx_runtime_computes_what_the_layer_does(
    name: str, has_bias: bool, tmp_path: Path, rng: np.random.Generator
) -> None:
    pytest.importorskip("onnx")
    for rows, cols in ((24, 160), (7, 100), (64, 256)):
        linear = torch.nn.Linear(cols, rows, bias=has_bias)
        layer = PackedLinearLayer.from_float(linear, name)
        export_layer_onnx(layer, tmp_path / "a.onnx", overwrite=True)
        for tokens in (1, 5, 40):
            x = rng.normal(size=(tokens, cols)).astype(np.float32)
            weight = layer.weight.double().numpy()
            bias = linear.bias.detach().double().numpy() if has_bias else np.zeros(rows)
            exact = x.astype(np.float64) @ weight.T + bias
            bound = np.abs(x).astype(np.float64) @ np.abs(weight).T + np.abs(bias)
            # w * scale is rounded before it is multiplied: one more eps
            bound *= (cols + 4) * EPS
            assert (np.abs(run(tmp_path / "a.onnx", x) - exact) <= bound).all()
            ours = layer(torch.from_numpy(x)).detach().numpy()
            assert (np.abs(ours - exact) <= bound).all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_float_zero_points_are_written_just_where_the_runtime_takes_them(
    bits: int, tmp_path: Path
) -> None:
    pytest.importorskip("onnx")
    layer = PackedLinearLayer(64, 32, scheme=f"w{bits}g32af")
    if bits > 4:
        with pytest.raises(FormatError, match="no float zero points"):
            export_layer_onnx(layer, tmp_path / "a.onnx")
        with pytest.raises(FormatError, match=r"hold the model \(w.g32af\): .* no float zero"):
            write_onnx(stored_model(layer), tmp_path / "a")
        assert not list(tmp_path.iterdir())
        return
    export_layer_onnx(layer, tmp_path / "a.onnx")
    x = np.random.default_rng(0).normal(size=(3, 64)).astype("float32")
    wanted = layer(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(run(tmp_path / "a.onnx", x), wanted, rtol=1e-4, atol=1e-5)


def test_the_checker_of_onnx_accepts_the_file(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    export_layer_onnx(QWQALinearLayer(64, 32), tmp_path / "a.onnx")
    model = onnx.load(tmp_path / "a.onnx")
    onnx.checker.check_model(model)
    assert [tensor.name for tensor in model.graph.initializer] == [
        f"linear.{part}" for part in ("B", "scales", "bias")
    ]
    (node,) = model.graph.node
    assert node.op_type == "MatMulNBits" and list(node.input) == [
        *("x", "linear.B", "linear.scales", "", "", "linear.bias")
    ]


def test_a_model_gives_one_file_a_layer(tmp_path: Path, rng: np.random.Generator) -> None:
    pytest.importorskip("onnx")
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Sequential(torch.nn.Linear(96, 8))
    )
    quantize_model(model, {"0": "w4g32a", "2.0": "w8"})
    write_onnx(stored_model(model), tmp_path / "a")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["0.onnx", "2.0.onnx"]
    x = rng.normal(size=(3, 64)).astype(np.float32)
    hidden = np.maximum(run(tmp_path / "a/0.onnx", x), 0)
    expected = model(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(run(tmp_path / "a/2.0.onnx", hidden), expected, rtol=1e-4, atol=1e-5)


def test_a_model_that_cannot_be_held_is_refused_whole(tmp_path: Path) -> None:
    good, bad = (pack_matrix(torch.randn(4, 64), name) for name in ("w4", "nf4"))
    layers = {"a": StoredLayer.of(good), "b": StoredLayer.of(bad)}
    with pytest.raises(FormatError, match=r"cannot hold b \(nf4g64\): codes of the grid 'nf4'"):
        write_onnx(StoredModel(layers, {}), tmp_path / "a")
    layers = {"a": StoredLayer.of(good, "embedding", padding_idx=None)}
    with pytest.raises(FormatError, match="it is an embedding"):
        write_onnx(StoredModel(layers, {}), tmp_path / "a")
    with pytest.raises(FormatError, match="its name is none of a file"):
        write_onnx(StoredModel({"../../a": StoredLayer.of(good)}, {}), tmp_path / "a")
    with pytest.raises(FormatError, match="no quantized layers"):
        write_onnx(StoredModel({}, {}), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_files_are_not_replaced_unasked(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    layer = QWQALinearLayer(64, 32)
    export_layer_onnx(layer, tmp_path / "a.onnx")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        export_layer_onnx(layer, tmp_path / "a.onnx")
    with pytest.raises(TypeError, match="expected a PackedLinearLayer or QWQALinearLayer"):
        export_layer_onnx(torch.nn.Linear(2, 2), tmp_path / "b.onnx")


def test_without_onnx_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "qwqa\[onnx\]"'):
        export_layer_onnx(QWQALinearLayer(64, 32), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())
