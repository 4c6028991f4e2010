#!/usr/bin/env bash
# hqq's default solver takes `kappa` and does not use it.
#
# The half-quadratic method lets beta grow by the factor kappa in every round, and opt_params of
# hqq holds kappa = 1.01. The solver that is used by default, optimize_weights_proximal_legacy,
# reads the number and never multiplies: beta stays what it was, and a kappa of 1.01 or of 100
# gives the same codes, scales and zero points bit for bit. Who implements the paper to compare
# with the package gets other numbers.
#
# Seen on 2026-11-30 with hqq 0.2.8.post1, torch 2.13.0. Fails if that changes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"${PYTHON:-python3}" -m venv "$place/venv"
"$place/venv/bin/python" -m pip install -q --disable-pip-version-check torch==2.13.0 hqq==0.2.8.post1
cd "$place"
"$place/venv/bin/python" - <<'PYTHON'
import torch
from hqq.core.optimize import optimize_weights_proximal_legacy as solve

torch.manual_seed(0)
weight, scale = torch.randn(64, 64), torch.full((64, 1), 7 / 3)
zero = torch.full((64, 1), 7.5)
made = []
for beta, kappa in ((10.0, 1.01), (10.0, 100.0), (10.1, 1.01)):
    options = {"lp_norm": 0.7, "beta": beta, "kappa": kappa, "iters": 20}
    made.append(solve(weight, scale, zero, [0, 15], axis=1, opt_params=options))
same = [all(torch.equal(a, b) for a, b in zip(made[0], other)) for other in made[1:]]
print("the same as under kappa 1.01: kappa 100:", same[0], "- beta 10.1 in the place of 10:", same[1])
assert same == [True, False]
PYTHON
