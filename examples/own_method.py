"""A method of one's own: (weight, scheme, statistics) -> packed weights, by name in a recipe."""

import copy

import torch
from torch import nn

from quantization import PackedWeights, pack_matrix, quantize_model, register_method, report


def clipped(weight, scheme, statistics) -> PackedWeights:
    """Large numbers are cut off at the best of a few places: the steps get smaller."""
    tries = [pack_matrix(weight.clamp(-cut, cut), scheme) for cut in weight.abs().max() * SHARES]
    return min(tries, key=lambda packed: float((packed.dequantize() - weight).square().sum()))


SHARES = torch.tensor([1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
register_method("clipped", clipped)

torch.manual_seed(0)
floats = nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 64))
for layer in (floats[0], floats[2]):
    nn.init.normal_(layer.weight)
for recipe in ("w3", "w3:clipped", "w3:lsq"):
    model = copy.deepcopy(floats)
    quantize_model(model, recipe)
    print(report(model, floats))
