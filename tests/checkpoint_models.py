"""Models for the tests of checkpoints: one that has every kind of layer, tied and shared."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from quantization import QWQALinearLayer, Target, quantize_model, replace_linear_layers_with_w8a16

#: A scheme of each grid, layout and kind of scale.
SCHEMES = (
    "w1a", "w2g32", "w3g33a", "w4g64af", "w5", "w6t", "w7g48", "w8g32a", "nf4", "fp4g32+dq",
    "mxfp4", "kmeans3", "kmeans2r", "binaryg32", "ternary", "ternaryg64", "w4g32a+f16", "w4g16+dq",
)  # fmt: skip


class Block(nn.Module):
    """A layer, a norm, a plain Parameter, a buffer that is saved and one that is not."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.inner = nn.Linear(size, size)
        self.norm = nn.LayerNorm(size)
        self.gain = nn.Parameter(torch.rand(size))
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("ramp", torch.arange(size) / size, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(self.inner(x)) * self.gain * self.ramp


class Net(nn.Module):
    """An embedding tied to its head, and blocks of which one is used twice."""

    def __init__(self, size: int = 96, words: int = 50) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, size, padding_idx=0)
        block = Block(size)
        self.blocks = nn.ModuleList([block, Block(size), block])
        self.head = nn.Linear(size, words, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> Net:
    """A net of seeded numbers, in eval mode."""
    torch.manual_seed(seed)
    return Net().to(dtype).eval()


def quantized_net(
    recipe: object, seed: int = 0, dtype: torch.dtype = torch.float32, embed: bool = False
) -> Net:
    """By a scheme, or ``"w8a16"`` for int8 layers; ``embed``: the tied pair too."""
    model = net(seed, dtype)
    if recipe == "w8a16":
        replace_linear_layers_with_w8a16(model, Target.Linear(QWQALinearLayer), ["head"])
    else:
        rules = {"embed": recipe, "head": recipe, "*": recipe} if embed else {"*": recipe}
        quantize_model(model, rules)
    return model


TOKENS = torch.tensor([[1, 2, 3, 0, 49]])


def state_equal(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models have the same tensors, bit for bit, of the same dtypes."""
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(
        mine[key].dtype == theirs[key].dtype
        and mine[key].shape == theirs[key].shape
        and bytes_of(mine[key]) == bytes_of(theirs[key])
        for key in mine
    )


def bytes_of(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of every file."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def float_folder(
    folder: Path,
    shards: int = 1,
    size: int = 96,
    layers: int = 4,
    dtype=torch.float32,
    seed: int = 1,
) -> Path:
    """A float checkpoint without a config: names tell the layers."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {"model.embed_tokens.weight": torch.randn(50, size, generator=generator)}
    for i in range(layers):
        name = f"model.layers.{i}"
        tensors[f"{name}.q_proj.weight"] = torch.randn(size, size, generator=generator)
        tensors[f"{name}.q_proj.bias"] = torch.randn(size, generator=generator)
        tensors[f"{name}.up_proj.weight"] = torch.randn(2 * size, size, generator=generator)
        tensors[f"{name}.norm.weight"] = torch.rand(size, generator=generator)
    tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    import json

    keys, weight_map = list(tensors), {}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        mine = keys[i::shards]
        save_file({key: tensors[key] for key in mine}, folder / name)
        weight_map |= dict.fromkeys(mine, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


# VmHWM and not ru_maxrss: that one a child inherits from the process that started it.
PEAK = """
import json, re, sys
from quantization import quantize_checkpoint
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
source, target, small = sys.argv[1:4]
recipe, options = json.loads(sys.argv[4])
quantize_checkpoint(small, target + "-warm", "w4")
before = peak()
quantize_checkpoint(source, target, recipe, **options)
print(peak() - before)
"""


def peak_of_streaming(source: Path, target: Path, small: Path, recipe: Any, **options: Any) -> int:
    """Bytes by which the peak of a fresh process grows, after it streamed a small folder."""
    arguments = [*map(str, (source, target, small)), json.dumps([recipe, options])]
    run = subprocess.run(
        [sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return int(run.stdout)
