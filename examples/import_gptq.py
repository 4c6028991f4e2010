"""Read a GPTQ checkpoint into layers that run on this CPU, without making a float weight."""

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from quantization import pack_weights
from quantization.checkpoint.restore import restore_model
from quantization.formats.gptq import read_gptq


def make_one(folder: Path) -> None:
    """A checkpoint of one layer of 4 bits in groups of 32, as GPTQ's programs store it."""
    codes = torch.randint(0, 16, (64, 32))
    zeros = torch.full((2, 32), 8)
    tensors = {
        "0.qweight": pack_weights(codes, 4, "int32", layout="dense", dim=0),
        "0.qzeros": pack_weights(zeros, 4, "int32", layout="dense", dim=1),
        "0.scales": torch.rand(2, 32, dtype=torch.float16) / 8,
        "0.bias": torch.zeros(32, dtype=torch.float16),
    }
    save_file(tensors, folder / "model.safetensors")
    settings = {"bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"}
    (folder / "quantize_config.json").write_text(json.dumps(settings))


with tempfile.TemporaryDirectory() as place:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(place)
    if len(sys.argv) == 1:
        make_one(folder)
    stored = read_gptq(folder)
    for name, layer in stored.layers.items():
        print(name, layer.scheme, layer.shape, layer.dtype)
    if len(sys.argv) == 1:
        model = restore_model(stored, nn.Sequential(nn.Linear(64, 32)))
        print(model, model(torch.randn(3, 64)).shape)
