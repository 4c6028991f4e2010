"""A layer of one's own in the place of nn.Linear: a subclass that the swap builds."""

import torch
from torch import nn

from quantization import QWQALinearLayer, Target, replace_linear_layers_with_w8a16, report


class Counting(QWQALinearLayer):
    """An int8 layer that knows how many rows it has seen."""

    rows = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's own product, counted."""
        self.rows += x.numel() // x.shape[-1]
        return super().forward(x)


model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
print(replace_linear_layers_with_w8a16(model, Target.Linear(Counting), []))
model(torch.randn(5, 3, 64))
print("rows seen:", [layer.rows for layer in model if isinstance(layer, Counting)])
print(report(model))
