"""A loaded model reads its file in place, mapped and never written, or once into its own memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from torch import nn

from quantization import (
    PackedLinearLayer,
    QWQALinearLayer,
    load_quantized,
    pages_of,
    quantize_model,
    save_quantized,
)
from quantization.checkpoint import verify_checkpoint
from quantization.layers.arena import offers_huge_pages
from tests.checkpoint_models import (
    files_of,
    net,
    quantized_net,
    state_equal,
)
from tests.pages import asks_for_huge
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


@pytest.mark.parametrize("mmap", [True, False])
def test_files_that_are_read_whole_may_change_later(mmap: bool, tmp_path: Path) -> None:
    model = quantized_net("w4g32a")
    save_quantized(model, tmp_path / "saved")
    again = load_quantized(tmp_path / "saved", net(), mmap=mmap)
    state = again.state_dict()
    copies = {key: tensor.clone() for key, tensor in state.items()}
    file = tmp_path / "saved/model.safetensors"
    with file.open("r+b") as raw:  # of the same length: a shorter one would end this process
        raw.seek(-200, os.SEEK_END)
        raw.write(b"\xa5" * 200)
    changed = [key for key, tensor in again.state_dict().items()
               if not torch.equal(tensor.nan_to_num(), copies[key].nan_to_num())]  # fmt: skip
    assert bool(changed) == mmap


def large() -> nn.Sequential:
    """More than a huge page in 8 bits, with a float layer that has no bias."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(1024, 2048), nn.Linear(2048, 512), nn.Linear(512, 64, False))


@pytest.mark.parametrize("scheme", ["w8a16", "w8g32a"])
def test_each_way_of_pages_gives_the_same_model(scheme: str, tmp_path: Path) -> None:
    model = large()
    quantize_model(model, {"2": None, "*": scheme})
    save_quantized(model, tmp_path / "saved")
    for pages in ("file", "memory", None):
        again = load_quantized(tmp_path / "saved", large(), pages=pages)
        assert state_equal(again, model)
        assert isinstance(again[2].weight, nn.Parameter) and again[2].weight.requires_grad
        if offers_huge_pages():
            for tensor in again.state_dict().values():
                assert asks_for_huge(tensor) or (pages == "file" and pages_of(tensor) == "file")
        if pages == "memory":
            assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_a_model_that_does_not_fit_twice_stays_in_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_quantized(large(), tmp_path / "saved")
    monkeypatch.setattr("quantization.checkpoint.reading.fits", lambda nbytes: nbytes < 1 << 20)
    again = load_quantized(tmp_path / "saved", large())
    assert pages_of(again[0].weight) in ("file", "")


def test_what_pages_may_be(tmp_path: Path) -> None:
    save_quantized(net(), tmp_path / "saved")
    with pytest.raises(ValueError, match="pages is 'huge'; it is one of 'file', 'memory', or None"):
        load_quantized(tmp_path / "saved", net(), pages="huge")
    with pytest.raises(ValueError, match="say different things"):
        load_quantized(tmp_path / "saved", net(), pages="memory", mmap=True)
    load_quantized(tmp_path / "saved", net(), pages="memory", mmap=False)


# ---- in place --------------------------------------------------------------------------------


def test_tensors_are_views_of_the_mapped_file(tmp_path: Path) -> None:
    model = quantized_net("w4g32a")
    save_quantized(model, tmp_path / "saved")
    again = load_quantized(tmp_path / "saved", net())
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    places = [line.split()[0] for line in maps.read_text().splitlines() if "saved/model" in line]
    spans = [tuple(int(part, 16) for part in place.split("-")) for place in places]
    for key, tensor in again.state_dict().items():
        assert any(low <= tensor.data_ptr() < high for low, high in spans), key


def test_writing_to_a_loaded_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    save_quantized(quantized_net("w4g32a"), tmp_path / "saved")
    before = files_of(tmp_path / "saved")
    again = load_quantized(tmp_path / "saved", net())
    with torch.no_grad():
        for tensor in again.state_dict().values():
            tensor.zero_()
    assert files_of(tmp_path / "saved") == before
    verify_checkpoint(tmp_path / "saved")


def test_saving_over_the_folder_that_is_mapped(tmp_path: Path) -> None:
    model = quantized_net("w4g32a")
    save_quantized(model, tmp_path / "saved")
    again = load_quantized(tmp_path / "saved", net())
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_quantized(again, tmp_path / "saved")
    save_quantized(again, tmp_path / "saved", overwrite=True)
    assert state_equal(again, model)
    assert state_equal(load_quantized(tmp_path / "saved", net()), model)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


RESIDENT = """
import sys, time, torch
from quantization import load_quantized
from torch import nn
def resident():
    fields = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
    return int(fields["VmRSS"].split()[0]) * 1024
folder, layers = sys.argv[1], int(sys.argv[2])
with torch.device("meta"):
    small = nn.Sequential(nn.Linear(64, 64))
    model = nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(layers)))
load_quantized(sys.argv[3], small)  # what is imported on first use
before, start = resident(), time.perf_counter()
load_quantized(folder, model, pages="file")
took = time.perf_counter() - start
print(took, resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_loading_takes_what_headers_take(tmp_path: Path) -> None:
    layers = 16
    big = nn.Sequential(*(PackedLinearLayer(4096, 4096, False, "w8", device="meta")
                          for _ in range(layers)))  # fmt: skip
    big = big.to_empty(device="cpu")
    save_quantized(big, tmp_path / "big")
    small = nn.Sequential(PackedLinearLayer(64, 64, True, "w8"))
    save_quantized(small, tmp_path / "small")
    arguments = [str(tmp_path / "big"), str(layers), str(tmp_path / "small")]
    run = subprocess.run(
        [sys.executable, "-c", RESIDENT, *arguments], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    seconds, grown = map(float, run.stdout.split())
    assert grown < 50e6 < layers * 4096 * 4096, f"{grown:.0f} bytes became resident"
    assert seconds < 5, "a bound for a busy machine; benchmarks have the figure"


SHARED = """
import sys, torch
from quantization import QWQALinearLayer, load_quantized
layer = load_quantized(sys.argv[1], torch.nn.Linear(2048, 2048), pages="file")
layer(torch.ones(1, 2048))
sums, inside = {}, False
for line in open("/proc/self/smaps"):
    if "-" in line.split()[0]:
        inside = "big/model.safetensors" in line
    elif inside and line.split()[-1] == "kB":
        name, size = line.split()[:2]
        sums[name] = sums.get(name, 0) + int(size)
print(sums["Shared_Clean:"], sums["Private_Dirty:"])
"""


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc")
def test_processes_share_the_pages(tmp_path: Path) -> None:
    save_quantized(QWQALinearLayer(2048, 2048), tmp_path / "big")
    mine = load_quantized(tmp_path / "big", nn.Linear(2048, 2048), pages="file")
    mine(torch.ones(1, 2048))
    run = subprocess.run(
        [sys.executable, "-c", SHARED, str(tmp_path / "big")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    shared, dirty = map(int, run.stdout.split())
    assert shared >= 2048 * 2048 // 1024 and dirty == 0
