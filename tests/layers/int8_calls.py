"""What the tests of the int8 layer share."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def float_linear(**options: Any) -> nn.Linear:
    return nn.Linear(24, 10, **options)


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm())
