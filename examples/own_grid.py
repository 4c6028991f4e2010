"""A grid of one's own: levels by name, in plans, reports and explanations, saved and loaded."""

import tempfile

import numpy as np
import torch
from torch import nn

from quantization import (
    explain,
    load_quantized,
    plan,
    quantize_model,
    register_grid,
    report,
    save_quantized,
)

register_grid("cubic", lambda bits: np.linspace(-1, 1, 2**bits) ** 3)  # dense about zero

torch.manual_seed(0)
floats = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
model.load_state_dict(floats.state_dict())
recipe = {"0": "cubic4g32:lsq", "*": "cubic3g32"}
print(plan(model, recipe))
quantize_model(model, recipe)
print(report(model, floats))
print(explain(model[0], 3, 5))

with tempfile.TemporaryDirectory() as place:  # the scheme holds its levels: no code is needed
    save_quantized(model, f"{place}/small")
    again = load_quantized(f"{place}/small", floats)
    x = torch.randn(2, 256)
    print("same bits:", torch.equal(again(x), model(x)))
