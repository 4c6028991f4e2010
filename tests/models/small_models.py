"""A small language model, and what can be asked of it before and after."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 32)
        self.up = nn.Linear(32, 48)
        self.down = nn.Linear(48, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(self.embed(x)).relu())


class Model(nn.Module):
    """A language model in small; ``tied`` makes its head the embedding's weight."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.body = Body()
        self.head = nn.Linear(32, 20, bias=False)
        if tied:
            self.head.weight = self.body.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


TOKENS = torch.tensor([[1, 2, 3], [19, 0, 0]])


def schemes(model: nn.Module) -> dict[str, str]:
    """What each module is: its scheme, or its class."""
    return {
        name: str(getattr(module, "scheme", type(module).__name__))
        for name, module in model.named_modules()
        if not list(module.children())
    }


def statuses(report: Any) -> dict[str, str]:
    return {candidate.name: candidate.status for candidate in report}


def snapshot(model: nn.Module) -> list[tuple[int, int, Any]]:
    """Identity of every module and tensor, and what their attributes are."""
    return [
        (id(module), id(tensor), module.__dict__.get("activation_relu_or_gelu"))
        for module in model.modules()
        for tensor in (None, *module._parameters.values(), *module._buffers.values())
    ]
