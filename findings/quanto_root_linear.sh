#!/usr/bin/env bash
# quanto's freeze takes the weight of a Linear that is the model itself.
#
# quantize(nn.Linear(...)) hangs the new layer below the old one, under the empty name: the model
# still computes in float with its old weight, and says nothing. freeze() then moves the weight
# away, and what is left is a Linear whose weight is None. A Linear inside of a container is
# replaced as it should be.
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

torch.manual_seed(0)
layer, x = torch.nn.Linear(128, 128), torch.randn(2, 128)
wanted = layer(x)
quantize(layer, weights=qint4)
kinds = [type(module).__name__ for module in layer.modules()]
print("after quantize:", kinds, "equal to float:", torch.equal(layer(x), wanted))
assert kinds == ["Linear", "QLinear"] and torch.equal(layer(x), wanted)
freeze(layer)
print("after freeze: weight is", layer.weight)
assert layer.weight is None
PYTHON
