"""Quantize a float checkpoint of any size, tensor by tensor, without loading the model."""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from quantization import quantize_checkpoint

with tempfile.TemporaryDirectory() as place:
    source = Path(place) / "float"
    source.mkdir()
    tensors = {f"layers.{i}.up_proj.weight": torch.randn(512, 256) for i in range(4)}
    tensors["embed_tokens.weight"] = torch.randn(1000, 256)
    save_file(tensors, source / "model.safetensors")

    rules = {"embed_tokens": "w8", "*": "w4g64a"}
    report = quantize_checkpoint(source, Path(place) / "small", rules, max_shard_bytes=200_000)
    print(report)
    print(sorted(path.name for path in (Path(place) / "small").iterdir()))
