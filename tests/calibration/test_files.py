"""Statistics as a file: the same numbers again, broken files refused, killed runs gone on with."""

from __future__ import annotations

import sys

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file
from torch import nn

from quantization.calibration import calibrate, load_statistics, save_statistics, unfinished
from quantization.checkpoint.disk.json_files import CheckpointError
from quantization.methods.statistics import ModelStatistics, Statistics
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

calibration = sys.modules["quantization.calibration.calibrate"]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(20, 6), nn.Linear(6, 8), nn.Linear(8, 4))


def same(one: ModelStatistics, other: ModelStatistics) -> bool:
    return list(one) == list(other) and all(
        torch.equal(one[name].moments, other[name].moments)
        and torch.equal(one[name].hessian, other[name].hessian)
        and one[name].count == other[name].count
        for name in one
    )


def test_what_is_saved_is_read(tmp_path) -> None:
    shared = Statistics.of(torch.randn(5, 3), hessian=True)
    plain = Statistics.of(torch.randn(2, 4))
    known = ModelStatistics({"q": shared, "k": shared, "": plain}, unseen=["e"], source="text")
    save_statistics(known, tmp_path / "known.safetensors")
    read = load_statistics(tmp_path / "known.safetensors")
    assert read.shares == known.shares and read.unseen == ("e",) and read.source == "text"
    query = read["q"]
    assert query is read["k"] and torch.equal(query.hessian, shared.hessian)
    assert read[""].hessian is None and torch.equal(read[""].moments, plain.moments)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_statistics(known, tmp_path / "known.safetensors")
    save_statistics(read, tmp_path / "known.safetensors", overwrite=True)
    assert torch.equal(load_statistics(tmp_path / "known.safetensors")["q"].moments, shared.moments)


@pytest.mark.parametrize(
    "head",
    [
        {},
        {"layers": "[]"},
        {"layers": '{"a": "b"}'},
        {"counts": '{"a": "many"}'},
        {"counts": '{"a": 1, "b": 1}'},
        {"counts": "1"},
        {"unseen": "{"},
    ],
    ids=str,
)
def test_broken_files_are_refused(tmp_path, head: dict[str, str]) -> None:
    path = tmp_path / "known.safetensors"
    good = {"format": "statistics of layer inputs, version 1", "layers": '{"a": "a"}'}
    good |= {"counts": '{"a": 1}', "unseen": "[]", "source": ""}
    save_file({"a.moments": torch.ones(2).double()}, path, metadata=good | head if head else None)
    with pytest.raises(CheckpointError, match=r"known\.safetensors"):
        load_statistics(path)["a"]


class Kill(BaseException):
    pass


def killing(batches: list, number: int):
    for count, batch in enumerate(batches):
        if count == number:
            raise Kill
        yield batch


@pytest.mark.parametrize("killed_at", [0, 1, 3, 5, 7])
def test_a_killed_run_goes_on(tmp_path, monkeypatch, killed_at: int) -> None:
    monkeypatch.setattr(unfinished, "EVERY", 0)
    batches = [(torch.randint(20, (3, 5)),) for _ in range(4)]
    whole = calibrate(model(), batches, statistics="hessian")
    path = tmp_path / "known.safetensors"
    calls = []

    def run(stop: int | None) -> ModelStatistics:
        net = model()

        def count(*_):
            if stop is not None and len(calls) == stop:
                raise Kill
            calls.append(1)

        net.register_forward_pre_hook(count)
        return calibrate(net, batches, statistics="hessian", layers_at_once=1, file=path)

    with pytest.raises(Kill):
        run(killed_at)
    known = run(None)
    assert len(calls) == 8
    assert same(known, whole) and same(load_statistics(path), whole)
    assert [file.name for file in tmp_path.iterdir()] == ["known.safetensors"]
    assert same(
        calibrate(model(), batches, statistics="hessian", layers_at_once=1, file=path), whole
    )
    assert len(calls) == 8


def test_only_the_same_work_is_gone_on_with(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(unfinished, "EVERY", 0)
    batches = [(torch.randint(20, (3, 5)),) for _ in range(3)]
    path = tmp_path / "known.safetensors"
    with pytest.raises(Kill):
        calibrate(model(), killing(batches, 2), file=path)
    with pytest.raises(FileExistsError, match=r"\.known\.safetensors\.partial is left of"):
        calibrate(model(), batches, statistics="hessian", file=path)
    other = [batches[1], *batches[1:]]
    with pytest.raises(ValueError, match="first 2 batches are not those of the run that"):
        calibrate(model(), other, file=path)
    with pytest.raises(ValueError, match="end after 1, and the interrupted run had seen 2"):
        calibrate(model(), batches[:1], file=path)
    calibrate(model(), batches, file=path)
    changed = model()
    changed[1].weight.data[0, 0] += 1
    with pytest.raises(FileExistsError, match="holds statistics of another model"):
        calibrate(changed, batches, file=path)


def test_made_up_inputs_are_kept_over_a_kill(tmp_path, monkeypatch) -> None:
    def run(file) -> ModelStatistics:
        return calibrate(net, "self", tokens=(4, 6), statistics="hessian", file=file)

    net = nn.Sequential(*model()[:2], nn.Linear(8, 20))
    whole = run(None)
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "call", lambda *_: (_ for _ in ()).throw(Kill()))
        with pytest.raises(Kill):
            run(tmp_path / "known.safetensors")
    monkeypatch.setattr(calibration, "made_up", None)
    assert same(run(tmp_path / "known.safetensors"), whole)
    assert load_statistics(tmp_path / "known.safetensors").source == whole.source
