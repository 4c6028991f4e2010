"""A column of one's own in a report: any number of a layer, beside those that are there."""

import copy

import torch
from torch import nn

from quantization import quantize_model, report

torch.manual_seed(0)
floats = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.Linear(256, 10))
model = copy.deepcopy(floats)
quantize_model(model, {"2": "nf4", "*": "w4g32a"})

x, damage = torch.randn(64, 256), {}
with torch.no_grad():
    for row in report(model):
        wanted, made = (net.get_submodule(row.layer)(x) for net in (floats, model))
        damage[row.layer] = float((made - wanted).norm() / wanted.norm())

rows = [record | {"output error": damage[record["layer"]]} for record in report(model).to_records()]
for row in sorted(rows, key=lambda row: row["output error"], reverse=True):
    print(f"{row['layer']:3} {row['scheme']:8} {row['output error']:.4f}")
