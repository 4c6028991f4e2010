"""Models that are odd: tensors of any kind, wrappers, classes and code of a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from torch import nn

from quantization import load_quantized, quantize_checkpoint, quantize_model, save_quantized
from tests.checkpoint_models import float_folder
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

# ---- models ----------------------------------------------------------------------------------


class Odd(nn.Module):
    """A layer beside one tensor of the user's own."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 4)
        self.register_buffer(name, tensor)


def complex_pair() -> torch.Tensor:
    return torch.tensor([1 + 2j, 3 + 4j])


@pytest.mark.parametrize(
    "tensor",
    [
        complex_pair(),
        complex_pair().conj(),
        complex_pair().conj().imag,
        torch.arange(12.0).view(3, 4).t(),
        torch.ones(3, 1).expand(3, 4),
        torch.tensor(7),
        torch.empty(0, 3),
        torch.tensor([True, False]),
        torch.tensor([1, 2], dtype=torch.uint16),
        torch.ones(4).to(torch.float8_e8m0fnu),
    ],
    ids=lambda tensor: f"{tensor.dtype}, {tuple(tensor.shape)}",
)
def test_tensors_of_any_kind_come_back(tensor: torch.Tensor, tmp_path: Path) -> None:
    save_quantized(Odd("own", tensor), tmp_path / "saved")
    again = load_quantized(tmp_path / "saved", Odd("own", torch.empty_like(tensor)), verify=True)
    assert again.own.dtype is tensor.dtype and again.own.tolist() == tensor.tolist()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Odd("__metadata__", torch.ones(1)), "'__metadata__' cannot be the key of a tensor"),
        (Odd("a\nb", torch.ones(1)), r"'a\\nb' cannot be the key of a tensor"),
        (Odd("\ud800", torch.ones(1)), "cannot be the key of a tensor"),
        (Odd("own", torch.ones(1, dtype=torch.complex128)), "no dtype complex128, as own has"),
        (Odd("own", torch.ones(2, device="meta")), "own is on meta: it has no numbers"),
        (Odd("own", torch.eye(2).to_sparse()), "own is torch.sparse_coo; only dense tensors"),
        (
            nn.Sequential(torch.ao.nn.quantized.Linear(4, 4)),
            r"0 \(Linear\) puts more into a state dict",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_could_not_be_read_again_is_not_written(
    model: nn.Module, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        save_quantized(model, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_wrappers_of_torch_are_left_away(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(32, 4))
    quantize_model(model, "w4")
    for wrap in (torch.compile, nn.DataParallel):
        save_quantized(wrap(model), tmp_path / "saved", overwrite=True)
        given = wrap(nn.Sequential(nn.Linear(32, 4)))
        assert load_quantized(tmp_path / "saved", given) is given
        plain = load_quantized(tmp_path / "saved", nn.Sequential(nn.Linear(32, 4)))
        for key, tensor in model.state_dict().items():
            assert torch.equal(plain.state_dict()[key], tensor)


def test_the_class_of_a_model_is_what_it_is_now(tmp_path: Path) -> None:
    """Not what its config says: nothing, or the class that was loaded."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    fresh = transformers.BertForMaskedLM(config)
    assert not fresh.config.architectures
    save_quantized(fresh, tmp_path / "fresh")
    assert type(load_quantized(tmp_path / "fresh")) is transformers.BertForMaskedLM
    fresh.save_pretrained(tmp_path / "float")
    part = transformers.BertModel.from_pretrained(tmp_path / "float", add_pooling_layer=False)
    save_quantized(torch.compile(part), tmp_path / "part")
    plain = json.loads((tmp_path / "part/config.json").read_text())
    assert plain["architectures"] == ["BertModel"]


@pytest.mark.parametrize("name", ["pipeline", "AutoModel", "BertConfig", "NoSuchModel"])
def test_a_config_cannot_name_what_is_no_model(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    source = float_folder(tmp_path / "float")
    plain = {"model_type": "bert", "architectures": [name], "num_hidden_layers": 1}
    (source / "config.json").write_text(json.dumps(plain))
    with pytest.raises(ValueError, match=f"is of the class {name}"):
        quantize_checkpoint(source, tmp_path / "new", "w4")


def test_code_of_a_folder_is_neither_run_nor_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    source = float_folder(tmp_path / "float")
    (source / "own.py").write_text("raise SystemExit('was run')")
    plain = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (source / "config.json").write_text(json.dumps(plain))
    with pytest.raises(ValueError, match="trust_remote_code"):
        quantize_checkpoint(source, tmp_path / "new", "w4")
