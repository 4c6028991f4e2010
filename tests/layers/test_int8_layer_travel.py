"""How the quantized layer travels: casts, copies, checkpoints, threads and processes."""

from __future__ import annotations

import copy
import hashlib
import io
import math
import os
import pickle
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn

from quantization.linear_layer import (
    QWQALinearLayer,
)
from tests.layers.int8_calls import float_linear, relative
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

# ---- dtypes and copies -----------------------------------------------------------------------


def test_moves_never_touch_the_codes() -> None:
    layer = QWQALinearLayer.from_float(float_linear())
    codes, x = layer.int8_weights.clone(), torch.randn(3, 24)
    wanted = layer(x)
    for move, dtype in (
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.half(), torch.float16),
        (lambda m: m.double(), torch.float64),
    ):
        moved = move(copy.deepcopy(layer))
        assert torch.equal(moved.int8_weights, codes)
        assert moved.scales.dtype == moved.bias.dtype == moved.weight.dtype == dtype
        assert relative(moved(x.to(dtype)), wanted) < 0.01
    assert layer.to("meta").int8_weights.is_meta


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "share_memory", "module"])
def test_copies_compute_the_same(way: str, tmp_path: Path) -> None:
    layer = QWQALinearLayer.from_float(float_linear()).eval()
    x = torch.randn(3, 24)
    wanted = layer(x)
    if way == "deepcopy":
        other = copy.deepcopy(layer)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    elif way == "torch.save":
        torch.save(layer.state_dict(), tmp_path / "state.pt")
        other = QWQALinearLayer(24, 10)
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    elif way == "share_memory":
        other = layer.share_memory()
        assert other.int8_weights.is_shared()
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert torch.equal(other(x), wanted)


def test_safetensors_round_trip(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    layer = QWQALinearLayer.from_float(float_linear(dtype=torch.bfloat16))
    safetensors.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = QWQALinearLayer(24, 10, dtype=torch.bfloat16)
    other.load_state_dict(safetensors.load_file(tmp_path / "layer.safetensors"))
    x = torch.randn(3, 24, dtype=torch.bfloat16)
    assert torch.equal(other(x), layer(x))


def test_forward_changes_no_buffer() -> None:
    layer = QWQALinearLayer.from_float(float_linear())
    before = {key: (v.data_ptr(), v.clone()) for key, v in layer.state_dict().items()}
    layer(torch.randn(7, 24))
    after = layer.state_dict()
    assert all(
        after[k].data_ptr() == p and torch.equal(after[k], v) for k, (p, v) in before.items()
    )
    assert set(after) == set(before)


# ---- loading ---------------------------------------------------------------------------------


def loaded(state: dict[str, Any], **options: Any) -> tuple[QWQALinearLayer, Any]:
    layer = QWQALinearLayer(24, 10)
    return layer, layer.load_state_dict(state, **options)


@pytest.mark.parametrize("assign", [False, True])
def test_a_float_checkpoint_is_quantized(assign: bool) -> None:
    linear = float_linear()
    state = linear.state_dict()
    layer, result = loaded(state, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    wanted = QWQALinearLayer.from_float(linear)
    assert torch.equal(layer.int8_weights, wanted.int8_weights)
    assert torch.equal(layer.scales, wanted.scales) and torch.equal(layer.bias, wanted.bias)
    assert set(state) == {"weight", "bias"}  # the caller's dict is the caller's


def test_a_float_checkpoint_of_another_dtype() -> None:
    linear = float_linear(dtype=torch.bfloat16)
    kept, _ = loaded(linear.state_dict())
    assert kept.scales.dtype == torch.float32
    taken, _ = loaded(linear.state_dict(), assign=True)
    assert taken.scales.dtype == taken.bias.dtype == torch.bfloat16


def test_assign_brings_a_meta_layer_to_life() -> None:
    source = QWQALinearLayer.from_float(float_linear())
    for state in (source.state_dict(), float_linear().state_dict()):
        layer = QWQALinearLayer(24, 10, device="meta")
        layer.load_state_dict(state, assign=True)
        assert torch.isfinite(layer(torch.randn(2, 24))).all()
    with pytest.warns(UserWarning, match="no-op"):
        QWQALinearLayer(24, 10, device="meta").load_state_dict(source.state_dict())


def test_parameters_of_a_float_checkpoint_stay_behind() -> None:
    layer, _ = loaded(float_linear().state_dict(keep_vars=True), assign=True)
    assert not list(layer.parameters())


def test_missing_and_unexpected_keys_are_those_of_nn_linear() -> None:
    bias = torch.zeros(10)
    for state in ({"bias": bias}, {"weight": torch.ones(10, 24)}, {}):
        mine, plain = QWQALinearLayer(24, 10), nn.Linear(24, 10)
        got = mine.load_state_dict(state, strict=False)
        asked = plain.load_state_dict(state, strict=False)
        native = {"int8_weights": "weight", "scales": "weight"}
        assert {native.get(key, key) for key in got.missing_keys} == set(asked.missing_keys)
        if asked.missing_keys:
            with pytest.raises(RuntimeError, match="Missing key"):
                mine.load_state_dict(state)
    state = float_linear().state_dict() | {"extra": bias}
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "extra"'):
        loaded(state)
    assert loaded(state, strict=False)[1].unexpected_keys == ["extra"]
    without = QWQALinearLayer(24, 10, bias=False)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "bias"'):
        without.load_state_dict(float_linear().state_dict())


INT8 = torch.ones(10, 24, dtype=torch.int8)
SCALES = torch.ones(10)
BIAS = {"bias": torch.zeros(10)}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": torch.zeros(10, 23)}, r"size mismatch for fc.weight.*\(10, 23\).*\(10, 24\)"),
        ({"weight": INT8}, "fc.weight has dtype int8"),
        ({"weight": torch.full((10, 24), math.nan)}, "fc.weight.*nan"),
        ({"int8_weights": torch.ones(10, 24), "scales": SCALES}, "float32; codes are int8"),
        ({"int8_weights": INT8, "scales": SCALES.long()}, "fc.scales has dtype int64"),
        ({"int8_weights": INT8[:3], "scales": SCALES}, "size mismatch for fc.int8_weights"),
        ({"int8_weights": INT8, "scales": SCALES[:3]}, "size mismatch for fc.scales"),
        ({"int8_weights": INT8, "scales": SCALES[:, None]}, "size mismatch for fc.scales"),
        ({"int8_weights": INT8}, "without fc.scales"),
        ({"scales": SCALES}, "without fc.int8_weights"),
        ({"int8_weights": INT8, "scales": SCALES, "weight": SCALES}, "keep one of them"),
        ({"int8_weights": INT8, "scales": SCALES, "bias": INT8[:, 0]}, "fc.bias has dtype int8"),
        ({"int8_weights": "codes", "scales": SCALES}, "fc.int8_weights is a str"),
    ],
)
def test_a_checkpoint_that_does_not_fit(
    state: dict[str, Any], message: str, strict: bool, assign: bool
) -> None:
    model = nn.ModuleDict({"fc": QWQALinearLayer(24, 10)})
    before = copy.deepcopy(model.state_dict())
    full = {f"fc.{key}": value for key, value in (BIAS | state).items()}
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(full, strict=strict, assign=assign)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


# ---- processes, threads and determinism ------------------------------------------------------


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    layer = QWQALinearLayer(200, 150)
    x = torch.randn(9, 200)
    y = layer(x)
    assert all(torch.equal(layer(x[i : i + 1])[0], y[i]) for i in range(9))


def test_threads_of_python_may_share_a_layer() -> None:
    layer = QWQALinearLayer(200, 150)
    x = torch.randn(8, 200)
    wanted = layer(x)
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda _: layer(x), range(120)))
    assert all(torch.equal(result, wanted) for result in results)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_can_run_the_layer() -> None:
    """torch's own parallel operators hang there; the child compares by NumPy for that reason."""
    layer = QWQALinearLayer(512, 512)
    x = torch.randn(64, 512).bfloat16()
    wanted = layer(x).view(torch.int16).numpy().copy()
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        os._exit(0 if (layer(x).view(torch.int16).numpy() == wanted).all() else 1)
    assert os.waitpid(child, 0)[1] == 0


def digest(layer: QWQALinearLayer) -> dict[str, str]:
    return {
        name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in layer.state_dict().items()
    }


def test_no_use_of_a_layer_changes_its_buffers(tmp_path: Path) -> None:
    """Forward in every form, training, saving, copying, compiling: the same bytes as before."""
    layer = QWQALinearLayer.from_float(float_linear(dtype=torch.bfloat16))
    before = digest(layer)
    for tokens in (1, 5, 40):
        layer(torch.randn(tokens, 24, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    assert digest(copy.deepcopy(layer)) == before
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compiled(torch.randn(3, 24, dtype=torch.bfloat16))
    assert digest(layer) == before
    again = QWQALinearLayer(24, 10, dtype=torch.bfloat16)
    again.load_state_dict(torch.load(tmp_path / "layer.pt"))
    assert digest(again) == before


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_forward_keeps_no_float_copy_of_the_weight() -> None:
    layer = QWQALinearLayer(4096, 4096)  # 16 MiB of codes, 64 MiB as floats

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    with torch.no_grad():
        for tokens in (1, 40):
            layer(torch.randn(tokens, 4096))
        before = resident()
        for tokens in (1, 40, 40, 1):
            layer(torch.randn(tokens, 4096))
    assert resident() - before < 4 << 20


def test_the_kernel_is_told_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", logger="quantization"):
        layer = QWQALinearLayer.from_float(float_linear(), name="head.weight")
    assert str(layer.kernel(128)) in caplog.text
    assert caplog.messages[0].startswith("head.weight [10, 24]: ")
    assert layer.kernel(dtype=torch.float16).dtype == "float16"
