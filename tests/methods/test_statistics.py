"""Statistics of a layer's inputs: what they are, what they refuse, and how two runs become one."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from quantization.methods.statistics import ModelStatistics, Statistics
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_they_are_means_of_squares_and_products(dtype: torch.dtype) -> None:
    inputs = torch.randn(2, 5, 3).to(dtype)
    rows = inputs.double().reshape(-1, 3)
    known = Statistics.of(inputs, hessian=True)
    expected = sum(torch.outer(row, row) for row in rows) / 10
    assert known.count == 10 and known.in_features == 3
    assert torch.allclose(known.hessian, expected, rtol=1e-12)
    assert torch.allclose(known.moments, expected.diag(), rtol=1e-12)


def test_two_runs_become_one() -> None:
    inputs = torch.randn(12, 4)
    parts = [Statistics.of(part, hessian=True) for part in (inputs[:3], inputs[3:])]
    both, whole = parts[0].merged(parts[1]), Statistics.of(inputs, hessian=True)
    assert both.count == 12
    assert torch.allclose(both.moments, whole.moments, rtol=1e-12)
    assert torch.allclose(both.hessian, whole.hessian, rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Statistics([1.0]), TypeError, "moments is a list; expected a tensor of float64"),
        (
            lambda: Statistics(torch.ones(2)),
            TypeError,
            "moments is torch.float32; expected float64",
        ),
        (lambda: Statistics(torch.ones(2, 2).double()), ValueError, r"shape \(2, 2\) on cpu"),
        (lambda: Statistics(torch.tensor([-1.0]).double()), ValueError, "none may be negative"),
        (lambda: Statistics.of(torch.tensor([[float("nan")]])), ValueError, "NaN or infinite"),
        (lambda: Statistics.of(torch.ones(0, 2)), ValueError, "count is 0"),
        (lambda: Statistics(torch.ones(2).double(), count=2.0), TypeError, "count is 2.0"),
        (
            lambda: Statistics(torch.ones(2).double(), torch.ones(3, 3)),
            ValueError,
            r"Hessian has shape \(3, 3\) beside moments of 2 columns",
        ),
        (
            lambda: Statistics(torch.ones(1).double(), torch.full((1, 1), float("inf"))),
            ValueError,
            "Hessian holds a NaN or infinity",
        ),
        (
            lambda: Statistics.of(torch.ones(1, 2)).merged(Statistics.of(torch.ones(1, 3))),
            ValueError,
            "of 2 and of 3 columns",
        ),
        (lambda: ModelStatistics({"a": 3}), TypeError, "a has a int; expected Statistics"),
    ],
)
def test_what_cannot_be_is_refused(make, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_runs_of_a_model_are_merged_layer_by_layer() -> None:
    shared = Statistics.of(torch.ones(2, 3))
    one = ModelStatistics({"q": shared, "k": shared}, unseen=["expert"], source="text")
    other = ModelStatistics({"q": shared, "k": shared, "expert": shared}, source="more text")
    both = one.merged(other)
    assert both["q"] is both["k"] and both["q"].count == 4
    assert both["expert"] is shared and both.unseen == ()
    assert both.source == "text; more text"
    assert repr(both) == "ModelStatistics(3 layers: text; more text)"


def test_a_hessian_is_not_dropped_in_silence() -> None:
    inputs = torch.ones(2, 3)
    plain, full = Statistics.of(inputs), Statistics.of(inputs, hessian=True)
    one, other = ModelStatistics({"a": plain}), ModelStatistics({"a": full, "b": full})
    with pytest.raises(ValueError, match=r"a: only one .* has a Hessian; without_hessian\(\)"):
        one.merged(other)
    light = other.without_hessians()
    assert light["a"] is light["b"] and light["a"].hessian is None
    assert one.merged(light)["a"].count == 4
