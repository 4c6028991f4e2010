"""Small models to replace layers of, and what can be asked of them before and after."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn

from quantization.linear_layer import (
    QWQALinearLayer,
    Target,
)

TARGET = Target.Linear(QWQALinearLayer)


def mlp() -> nn.Module:
    block = nn.ModuleDict({"up": nn.Linear(16, 32), "down": nn.Linear(32, 16, bias=False)})
    return nn.ModuleDict({"block": block, "act": nn.ReLU(), "head": nn.Linear(16, 4)})


def statuses(report: Any) -> dict[str, str]:
    return {candidate.name: candidate.status for candidate in report}


def snapshot(model: nn.Module) -> list[tuple[int, int, Any]]:
    """Identity of every module and tensor, and what their attributes are."""
    return [
        (id(module), id(tensor), module.__dict__.get("activation_relu_or_gelu"))
        for module in model.modules()
        for tensor in (None, *module._parameters.values(), *module._buffers.values())
    ]
