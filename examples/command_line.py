"""The command line from end to end: plan, quantize, inspect, verify, export, bench."""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file


def quantization(*arguments: object) -> None:
    print("$ quantization", *arguments)
    command = [sys.executable, "-m", "quantization", *map(str, arguments)]
    subprocess.run(command, check=True)


with tempfile.TemporaryDirectory() as place:
    source, small = Path(place) / "float", Path(place) / "small"
    source.mkdir()
    tensors = {f"layers.{i}.up_proj.weight": torch.randn(256, 128) for i in range(2)}
    save_file(tensors, source / "model.safetensors")

    quantization("plan", source, "--scheme", "w4g64a", "--rule", "layers.0=w8")
    quantization("quantize", source, small, "--scheme", "w4g64")
    quantization("inspect", small)
    quantization("verify", small)
    quantization("export", small, Path(place) / "served", "--format", "compressed-tensors")
    quantization("bench", small, "--tokens", "1")
