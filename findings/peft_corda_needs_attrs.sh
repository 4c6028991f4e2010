#!/usr/bin/env bash
# PEFT's CorDA cannot be imported where only PEFT's own requirements are installed.
#
# peft/tuners/lora/corda.py takes `dataclass` from `attr`, the module of the package attrs, which
# PEFT does not require. LoraConfig(init_lora_weights="corda") is accepted all the same, and what
# must be called first, preprocess_corda, is not to be had. An integration that imports that
# module for a patch breaks LoRA as a whole for users who never heard of CorDA.
#
# Seen on 2026-11-30 with peft 0.21.2, torch 2.13.0. Fails if that changes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"${PYTHON:-python3}" -m venv "$place/venv"
"$place/venv/bin/python" -m pip install -q --disable-pip-version-check torch==2.13.0 peft==0.21.2
cd "$place"
"$place/venv/bin/python" - <<'PYTHON'
import importlib.metadata as metadata

import peft

needs = " ".join(metadata.requires("peft"))
assert "attrs" not in needs, "peft requires attrs now"
peft.LoraConfig(init_lora_weights="corda")  # accepted
try:
    import peft.tuners.lora.corda
except ModuleNotFoundError as error:
    assert error.name == "attr", error
    print(f"peft {peft.__version__}: import peft.tuners.lora.corda -> {error}")
else:
    raise SystemExit("changed: the module can be imported")
PYTHON
