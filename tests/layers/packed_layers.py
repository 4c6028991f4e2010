"""What the tests of the packed layer share: schemes, and small layers of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn

from quantization import PackedLinearLayer

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SCHEMES = [
    *(f"w{bits}g16" for bits in range(2, 9)),
    *(f"w{bits}a" for bits in range(1, 9)),
    "w4g7a",
    "w4t",
    "w4g16+f32",
    "nf4",
    "fp4g16+dq",
    "mxfp4",
    "kmeans3",
    "kmeans2r",
    "binaryg16",
    "ternary",
    "ternaryg16+dq",
    "w3g16af",
    "w5g16a+dq",
    "w4g16af+dq",
]


def float_linear(**options: Any) -> nn.Linear:
    return nn.Linear(45, 10, **options)


def packed(scheme: str = "w4g16a", **options: Any) -> PackedLinearLayer:
    return PackedLinearLayer.from_float(float_linear(**options), scheme)


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm())


def same_state(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return set(mine) == set(theirs) and all(torch.equal(mine[key], theirs[key]) for key in mine)


def check_torch_features(layer: nn.Module, x: torch.Tensor) -> None:
    """Tracing, vmap, jvp and meta tensors do as the layer does."""
    expected = layer(x)
    assert torch.equal(torch.jit.trace(layer, x)(x), expected)
    assert torch.equal(torch.fx.symbolic_trace(nn.Sequential(layer))(x), expected)
    torch.testing.assert_close(torch.vmap(layer)(x), expected, rtol=1e-4, atol=1e-4)
    tangents = torch.randn_like(x)
    _, along = torch.func.jvp(layer, (x,), (tangents,))
    torch.testing.assert_close(along, tangents @ layer.weight.T, rtol=1e-4, atol=1e-4)
    on_meta = copy.deepcopy(layer).to("meta")(x.to("meta"))
    assert on_meta.is_meta and on_meta.shape == expected.shape
