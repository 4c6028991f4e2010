"""Calibration: the sums against plain ones, every form of input, and a model left as it was."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn

from quantization.calibration import calibrate, sums
from quantization.models.quantizer import quantize_model
from quantization.swap.experts import unfuse_experts
from tests.tiny_models import inputs_for, random_model
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


class Block(nn.Module):
    """Two layers that share an input, one that is called with a keyword, one that none calls."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(6, 8), nn.Linear(6, 8)
        self.down, self.spare = nn.Linear(8, 6), nn.Linear(6, 6)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        x = self.dropout(x * scale)
        return self.down(input=self.up(x) * self.gate(x).sigmoid())


def wanted(model: nn.Module, batches: list[dict], real: str = "attention_mask") -> dict:
    """Means of x x^T of each layer's inputs at real positions, by plain hooks."""
    rows: dict[str, list] = {}
    mask = None

    def hook(name):
        return lambda layer, args: rows.setdefault(name, []).append(args[0][mask].double())

    handles = [
        module.register_forward_pre_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    for batch in batches:
        mask = batch[real].bool()
        with torch.no_grad():
            model(**batch)
    for handle in handles:
        handle.remove()
    found = {name: torch.cat(parts) for name, parts in rows.items()}
    return {name: part.T @ part / len(part) for name, part in found.items()}


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_statistics_are_those_of_real_positions(kind: str) -> None:
    model = random_model(kind)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    ids = inputs_for(kind)["input_ids"]
    batches = [{"input_ids": ids + n, "attention_mask": mask} for n in (0, 40)]
    known = calibrate(model, batches, statistics="hessian")
    expected = wanted(model, batches)
    assert set(known) == set(expected) and not known.unseen
    for name, hessian in expected.items():
        assert known[name].count == 20
        scale = hessian.diag().sqrt()
        relative = (known[name].hessian.double() - hessian) / torch.outer(scale, scale)
        assert relative.abs().max() < 1e-6
        assert torch.allclose(known[name].moments, hessian.diag(), rtol=1e-6)
        assert torch.equal(known[name].hessian, known[name].hessian.T)


def test_layers_that_share_an_input_share_one_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    over = sums.Sum.over
    monkeypatch.setattr(
        sums.Sum, "over", classmethod(lambda cls, *args: calls.append(1) or over(*args))
    )
    known = calibrate(Block(), [torch.randn(4, 6), torch.randn(4, 6)], statistics="hessian")
    assert len(calls) == 2 * 2
    assert known["up"] is known["gate"] and known["up"] is not known["down"]
    assert known.unseen == ("spare",)


def test_an_input_that_changed_meanwhile_is_another() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.a(x)
            x *= 2
            return self.b(x)

    known = calibrate(Changing(), [(torch.ones(3, 2),)])
    assert known["a"].moments.tolist() == [1, 1]
    assert known["b"].moments.tolist() == [4, 4]


def test_what_shares_an_input_now_and_then_is_right_all_the_same() -> None:
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor, together: bool) -> torch.Tensor:
            return self.a(x) + self.b(x if together else 3 * x)

    batches = [(torch.full((2, 2), value), value < 3) for value in (1.0, 2.0, 3.0)]
    known = calibrate(Fickle(), batches, statistics="hessian")
    assert known["a"].moments[0] == pytest.approx((1 + 4 + 9) / 3)
    assert known["b"].moments[0] == pytest.approx((1 + 4 + 81) / 3)
    assert known["b"].hessian[0, 1] == pytest.approx((1 + 4 + 81) / 3)


x = torch.arange(12.0).view(2, 6)


@pytest.mark.parametrize(
    "batches",
    [x, [x], (part for part in x.split(1)), [(x, 1.0)], [[x]], {"x": x}, [{"x": x, "scale": 1}]],
    ids=["tensor", "list", "generator", "tuple", "list in list", "dict", "dicts"],
)
def test_every_form_of_batches(batches) -> None:
    known = calibrate(Block(), batches)
    assert torch.equal(known["up"].moments, x.double().square().mean(0))


def test_groups_of_layers_give_the_same() -> None:
    model = random_model("llama")
    whole = calibrate(model, "random", tokens=(2, 8), statistics=("moments", "hessian"))
    parts = calibrate(model, "random", tokens=(2, 8), statistics="hessian", layers_at_once=4)
    generated = calibrate(Block(), (part for part in x.split(1)), layers_at_once=1)
    assert list(whole) == list(parts)
    assert all(torch.equal(whole[name].hessian, parts[name].hessian) for name in whole)
    assert generated["down"].count == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    given = torch.randn(7, 6).to(dtype)
    known = calibrate(Block().to(dtype), [given], statistics="hessian")["up"]
    rows = given.double()
    assert torch.allclose(known.hessian.double(), rows.T @ rows / 7, atol=1e-6)


class Stop(BaseException):
    pass


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Stop])
def test_the_model_is_left_as_it_was(error: type[BaseException]) -> None:
    class Failing(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            super().forward(x)
            assert not self.training and not torch.is_grad_enabled()
            raise error("stopped")

    model = Failing()
    model.gate.eval()
    model.up.weight.grad = torch.ones_like(model.up.weight)
    with pytest.raises(error, match="stopped"):
        calibrate(model, [x, x])
    assert not any(module._forward_pre_hooks for module in model.modules())
    flags = [module.training for module in (model, model.up, model.gate, model.dropout)]
    assert flags == [True, True, False, True]
    assert torch.equal(model.up.weight.grad, torch.ones_like(model.up.weight))
    assert torch.is_grad_enabled()


def test_what_torch_fuses_or_compiles_is_seen() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert {"linear1", "linear2"} <= set(calibrate(encoder, [torch.randn(2, 3, 8)]))
    compiled = torch.compile(Block(), backend="eager")
    assert calibrate(compiled, [x])["_orig_mod.up"].count == 2


def test_under_inference_mode_the_statistics_are_plain_tensors() -> None:
    with torch.inference_mode():
        given = torch.randn(3, 6)
        known = calibrate(Block(), [given, given], statistics="hessian")
    assert not known["up"].moments.is_inference() and known["up"] is known["gate"]
    assert known["up"].count == 6


def test_quantized_layers_are_watched_and_excluded_ones_are_not() -> None:
    model = Block()
    quantize_model(model, "w4g3a", exclude="down")
    known = calibrate(model, [x], exclude="gate")
    assert "up" in known and "gate" not in known and "gate" not in known.unseen


def test_a_layer_of_two_names_and_experts_that_no_token_chose() -> None:
    shared = nn.Linear(6, 6)
    known = calibrate(nn.Sequential(shared, shared), [x])
    assert known["0"] is known["1"] and known["0"].count == 4
    model = random_model("mixtral")
    unfuse_experts(model)
    known = calibrate(model, [{"input_ids": torch.tensor([[5]])}])
    experts = {name for name in (*known, *known.unseen) if ".experts." in name}
    assert len(experts) == 16 and len(experts - set(known)) == 8
    name = next(name for name in known.unseen if ".experts." in name)
    with pytest.raises(KeyError, match="no input reached this layer"):
        known[name]


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"batches": "a text"}, ValueError, "'random' and 'self', and text of your own is token"),
        ({"batches": ["a text"]}, TypeError, "a batch is 'a text'; expected a tensor, a tuple"),
        ({"batches": 3}, TypeError, "batches is 3; expected an iterable"),
        ({"batches": []}, ValueError, "batches came to their end after 0: nothing was seen"),
        ({"batches": None}, ValueError, "Block could be fed with: .* pass batches="),
        ({"batches": x, "statistics": "variance"}, ValueError, "known are moments, hessian"),
        ({"batches": x, "tokens": (1, 2)}, ValueError, "tokens is for inputs that are made up"),
        ({"tokens": (0, 2)}, ValueError, r"tokens is \(0, 2\); expected \(sequences, tokens\)"),
        ({"batches": x, "layers_at_once": 0}, ValueError, "layers_at_once is 0; expected 1"),
        ({"batches": x, "exclude": "upp"}, ValueError, "matches no module"),
        ({"batches": [x, x * float("nan")]}, ValueError, "input of up holds a NaN or infinity"),
    ],
)
def test_what_cannot_be_is_refused(given: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        calibrate(Block(), **given)


def test_errors_of_the_model_tell_the_batch() -> None:
    with pytest.raises(RuntimeError) as caught:
        calibrate(Block(), [x, x[:, :4]])
    assert caught.value.__notes__ == ["in batch 2 of the calibration"]
    with pytest.raises(ValueError, match="the model is on meta"):
        calibrate(nn.Linear(6, 2, device="meta"), [x.to("meta")])
    with pytest.raises(TypeError, match="expected a model"):
        calibrate("model", [x])
    with pytest.raises(ValueError, match="ReLU has no linear layers"):
        calibrate(nn.ReLU(), [x])


def test_progress_is_told() -> None:
    told = []
    calibrate(Block(), [x, x], layers_at_once=3, progress=lambda *pair: told.append(pair))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
