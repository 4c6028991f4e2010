#!/usr/bin/env bash
# quanto's quantize takes the weight of a Linear that is the model itself, or that stands there twice.
#
# quantize(nn.Linear(...)) hangs the new layer below the old one, under the empty name, and moves the
# weight there: what the caller holds is a Linear whose weight is None. A Linear that a container
# holds twice (shared weights) is replaced at its first place only; at the second stands the old one,
# without weight. quantize and freeze say nothing; the first forward pass raises a TypeError.
#
# Seen on 2026-11-30 with optimum-quanto 0.2.7, torch 2.13.0. Fails if that changes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"${PYTHON:-python3}" -m venv "$place/venv"
"$place/venv/bin/python" -m pip install -q --disable-pip-version-check torch==2.13.0 optimum-quanto==0.2.7
cd "$place"
"$place/venv/bin/python" - <<'PYTHON'
import torch
from optimum.quanto import freeze, qint4, quantize

layer, x = torch.nn.Linear(128, 128), torch.randn(2, 128)
quantize(layer, weights=qint4)
freeze(layer)
kinds = [type(module).__name__ for module in layer.modules()]
print("a Linear, quantized:", kinds, "weight:", layer.weight)
assert kinds == ["Linear", "QLinear"] and layer.weight is None

layer = torch.nn.Linear(128, 128)
model = torch.nn.Sequential(layer, layer)
quantize(model, weights=qint4)
freeze(model)
kinds = [type(module).__name__ for module in model]
print("a Linear that stands twice:", kinds, "weight of the second:", model[1].weight)
assert kinds == ["QLinear", "Linear"] and model[1].weight is None
PYTHON
