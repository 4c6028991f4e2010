#!/usr/bin/env bash
# transformers turns integer and boolean buffers into float32 under `_keep_in_fp32_modules_strict`.
#
# The names in that list are those of modules that stay in float32 when a model is loaded in
# bfloat16 or float16. Every tensor of them is cast, whatever it was: an int64 table of indices
# comes back as float32, and 2^24 + 1 in it as 2^24, without a word. Loaded in float32, or with no
# dtype, it stays what it was. Who keeps codes, permutations or masks of such a module as buffers
# must cast them back or keep them away from the list.
#
# Seen on 2026-11-30 with transformers 5.24.0, torch 2.13.0. Fails if that changes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"${PYTHON:-python3}" -m venv "$place/venv"
"$place/venv/bin/python" -m pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.24.0
cd "$place"
"$place/venv/bin/python" - <<'PYTHON'
import tempfile

import torch
import transformers
from torch import nn

transformers.logging.disable_progress_bar()


class Config(transformers.PretrainedConfig):
    model_type = "with-a-table"


class Model(transformers.PreTrainedModel):
    config_class = Config
    _keep_in_fp32_modules_strict = ["lookup"]

    def __init__(self, config):
        super().__init__(config)
        self.body, self.lookup = nn.Linear(4, 4), nn.Module()
        self.lookup.register_buffer("order", torch.tensor([3, 2**24 + 1, 0]))
        self.lookup.register_buffer("mask", torch.tensor([True, False]))
        self.post_init()

    def _init_weights(self, module):
        pass


with tempfile.TemporaryDirectory() as folder:
    Model(Config()).save_pretrained(folder)
    plain = Model.from_pretrained(folder, dtype=torch.float32).lookup
    assert plain.order.tolist() == [3, 2**24 + 1, 0] and plain.mask.dtype is torch.bool
    half = Model.from_pretrained(folder, dtype=torch.bfloat16).lookup
    print("int64 buffer:", half.order.dtype, half.order.tolist(), "boolean buffer:", half.mask.dtype)
    assert half.order.dtype is torch.float32 and half.order.tolist() == [3, 2**24, 0]
    assert half.mask.dtype is torch.float32
PYTHON
