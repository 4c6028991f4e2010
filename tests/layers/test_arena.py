"""Codes on huge pages: tensors like any others, in memory that goes when the last of them does."""

from __future__ import annotations

import copy
import gc
import io
import mmap
import multiprocessing as mp
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import load_model, save_model
from torch import nn

from quantization import (
    PackedLinearLayer,
    QWQALinearLayer,
    lay_out,
    pages_of,
    quantize_model,
    report,
)
from quantization.layers import arena
from quantization.layers.arena import HUGE, REGION, Arena, fits, offers_huge_pages
from tests.pages import asks_for_huge
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

SIDE = 768  # eight layers of so many features squared are more than a huge page, in 4 bits too
needs_pages = pytest.mark.skipif(not offers_huge_pages(), reason="no huge pages are offered here")


def float_net(tied: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(SIDE, SIDE) for _ in range(8)))
    if tied:
        net[7].weight = net[0].weight
    return net


def quantized(scheme: str = "w8a16", tied: bool = False) -> nn.Sequential:
    net = float_net(tied)
    quantize_model(net, scheme)
    return net


def places(model: nn.Module) -> dict[str, int]:
    """Where the codes and scales lie."""
    return {k: b.data_ptr() for k, b in model.named_buffers() if not k.endswith("bias")}


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---- the swap --------------------------------------------------------------------------------


@needs_pages
@pytest.mark.parametrize("scheme", ["w8a16", "w4g32a", "nf4g64+dq"])
def test_a_swap_lays_codes_side_by_side_on_huge_pages(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x = quantized(scheme), torch.randn(3, SIDE)
    found = sorted(places(net).values())
    total = sum(b.nbytes for k, b in net.named_buffers() if not k.endswith("bias"))
    assert all(place % 64 == 0 for place in found)
    assert found[-1] - found[0] < total + 64 * len(found)
    assert all(asks_for_huge(b) for k, b in net.named_buffers() if not k.endswith("bias"))
    monkeypatch.setenv(arena.SWITCH, "0")
    monkeypatch.setattr(arena, "_new_region", None)  # torch's own memory, which NumPy may advise
    plain = quantized(scheme)
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), plain.buffers(), strict=True))
    assert torch.equal(net(x), plain(x))


@needs_pages
def test_a_report_names_the_pages() -> None:
    net = quantized()
    told = {layer.layer: layer.pages for layer in report(net)}
    assert told == {name: pages_of(layer.int8_weights) for name, layer in net.named_children()}
    assert set(told.values()) <= {"huge", "small"}
    assert report(nn.Sequential(QWQALinearLayer(8, 8, device="meta")))["0"].pages == ""


@needs_pages
def test_what_layers_share_they_go_on_sharing() -> None:
    net = quantized(tied=True)
    lay_out(net)
    assert net[7].int8_weights is net[0].int8_weights and net[7].scales is net[0].scales
    assert net[1].int8_weights is not net[0].int8_weights


def test_small_models_other_devices_and_sent_tensors_stay() -> None:
    small = nn.Sequential(QWQALinearLayer(64, 64))
    meta = nn.Sequential(QWQALinearLayer(4096, 4096, device="meta"))
    sent = quantized().share_memory()
    for model in (small, meta, sent):
        before = [id(buffer) for buffer in model.buffers()]
        lay_out(model)
        assert before == [id(buffer) for buffer in model.buffers()]


def test_without_huge_pages_all_is_as_torch_has_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for text in ("always madvise [never]", None):
        if text is not None:
            (tmp_path / "enabled").write_text(text)
            (tmp_path / "hpage_pmd_size").write_text("2097152")
        else:
            (tmp_path / "enabled").unlink()
        monkeypatch.setattr(arena, "_KERNEL", tmp_path)
        assert not offers_huge_pages()
        assert Arena().empty((3,), torch.int8).untyped_storage().resizable()
        net = quantized()
        assert torch.isfinite(net(torch.randn(2, SIDE))).all()


# ---- tensors like any others -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 7)])
def test_room_for_any_shape_and_type(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    room = Arena()
    with torch.inference_mode(), torch.device("meta"):
        made = room.empty(shape, dtype)
    assert (made.shape, made.dtype, made.device.type) == (shape, dtype, "cpu")
    assert made.is_contiguous() and made._base is None and not made.is_inference()
    assert made.untyped_storage().nbytes() == made.nbytes
    wanted = torch.randint(0, 2, shape).to(dtype)
    assert torch.equal(room.copy(wanted), wanted)


@needs_pages
def test_each_buffer_is_saved_and_sent_by_itself(tmp_path: Path) -> None:
    net, x = quantized("w4g32a"), torch.randn(2, SIDE)
    layer, y = net[3], net(x)
    saved = io.BytesIO()
    torch.save(layer.state_dict(), saved)
    assert len(saved.getvalue()) < layer.footprint + 10_000
    assert len(pickle.dumps(layer)) < layer.footprint + 10_000
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(x), y) and not set(places(other).values()) & set(
            places(net).values()
        )
    save_model(net, str(tmp_path / "net.safetensors"))  # refuses tensors that share memory
    again = copy.deepcopy(net)
    for buffer in again.buffers():
        buffer.zero_()
    load_model(again, str(tmp_path / "net.safetensors"))
    assert torch.equal(again(x), y)
    assert torch.equal(net.to(torch.bfloat16)[0].packed_weights, again[0].packed_weights)
    assert net[0].scales.dtype == torch.bfloat16


@needs_pages
def test_a_laid_out_model_in_other_processes() -> None:
    net, x = quantized(), torch.randn(2, SIDE)
    y = net(x)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"1" if torch.equal(net(x), y) else b"0")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 1) == b"1"
    net.share_memory()
    queue = mp.get_context("fork").SimpleQueue()
    child = os.fork()
    if child == 0:
        net[0].int8_weights[0].zero_()  # few enough for torch to do on the child's only thread
        os._exit(0)
    os.waitpid(child, 0)
    queue.close()
    assert not net[0].int8_weights[0].any()  # the same memory, not a copy


# ---- memory ----------------------------------------------------------------------------------


@needs_pages
def test_memory_goes_back_with_the_last_tensor() -> None:
    ones = torch.ones(REGION, dtype=torch.int8)
    size, before = 4 * REGION, resident()
    room = Arena()
    tensors = [room.copy(ones[: REGION // 4]) for _ in range(16)]
    large = room.copy(ones)
    full = resident()
    assert full - before >= 0.9 * (size + REGION)
    del large
    assert full - resident() >= 0.9 * REGION  # a region of its own
    del tensors[4:8], room
    gc.collect()
    assert full - resident() >= 1.9 * REGION
    del tensors
    assert resident() - before < 0.2 * size


@needs_pages
def test_pages_are_told_for_each_kind_of_memory(tmp_path: Path) -> None:
    room = Arena()
    huge = room.copy(torch.ones(2 * HUGE, dtype=torch.int8))
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, 4 * HUGE, flags=private)  # torch's may be what NumPy has advised
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    small = torch.frombuffer(memory, dtype=torch.int8).fill_(1)
    (tmp_path / "data").write_bytes(bytes(HUGE))
    mapped = torch.from_file(str(tmp_path / "data"), size=HUGE, dtype=torch.uint8)
    assert asks_for_huge(huge) and not asks_for_huge(small)
    assert [pages_of(t) for t in (small, mapped)] == ["small", "file"]
    assert pages_of(torch.empty(0)) == pages_of(huge.to("meta")) == ""


def test_half_of_what_is_left_may_be_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(arena, "_GROUP", tmp_path)
    monkeypatch.setattr(arena, "_left_in_system", lambda: 1000)
    assert fits(500) and not fits(501)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    assert fits(500)
    (tmp_path / "memory.max").write_text("900\n")
    assert fits(100) and not fits(101)
    (tmp_path / "memory.stat").write_text("file 600\ninactive_file 200\n")
    assert fits(200) and not fits(201)
    monkeypatch.setattr(arena, "_left_in_system", lambda: None)
    (tmp_path / "memory.max").unlink()
    assert not fits(1)


@pytest.mark.parametrize(("call", "wanted"), [(lay_out, "an nn.Module"), (pages_of, "a tensor")])
def test_what_is_no_model_and_no_tensor_is_named(call: Any, wanted: str) -> None:
    with pytest.raises(TypeError, match=f"takes {wanted}, not 'some'"):
        call("some")


@needs_pages
def test_layers_of_every_kind_are_moved_whole() -> None:
    layer = PackedLinearLayer(2048, 2048, scheme="w4g64a", dtype=torch.bfloat16)
    x = torch.randn(1, 2048, dtype=torch.bfloat16)
    y, bias = layer(x), layer.bias
    lay_out(layer)
    assert torch.equal(layer(x), y) and layer.bias is bias
    assert asks_for_huge(layer.scales) and asks_for_huge(layer.zero_points)
