"""Save a quantized model, and open it again: bits are read in place, from the mapped file."""

import tempfile

import torch
from torch import nn

from quantization import load_quantized, quantize_model, save_quantized


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 100))


model = build()
quantize_model(model, {"2": "w8", "*": "w4g64a"})
with tempfile.TemporaryDirectory() as place:
    save_quantized(model, f"{place}/small")
    with torch.device("meta"):  # shapes are enough: every number comes from the file
        empty = build()
    again = load_quantized(f"{place}/small", empty, verify=True)

x = torch.randn(3, 512)
print("same bits:", torch.equal(again(x), model(x)))
print(again)
