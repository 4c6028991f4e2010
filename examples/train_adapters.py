"""Low-rank adapters on a quantized model, trained by two processes: DDP, then FSDP2.

    python examples/train_adapters.py
    torchrun --nproc-per-node 2 examples/train_adapters.py

The codes are buffers: they never learn, and every process holds all of them. What is averaged over
the processes (DDP) or spread over them (FSDP2) is what learns.
"""

import copy
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from quantization import quantize_model

WIDTH, RANK, STEPS = 64, 4, 30


class Adapted(nn.Module):
    """A quantized layer, and a map of low rank that learns beside it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Both maps of ``x``."""
        return self.layer(x) + self.up(self.down(x))


def train(model: nn.Module) -> float:
    """The last loss, averaged over the processes; each sees a part of every batch of its own."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    data = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(STEPS):
        x = torch.randn(16, WIDTH, generator=data)
        loss = (model(x) - x.roll(1, -1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    return float(mean) / dist.get_world_size()


def main() -> None:
    """Build, quantize, adapt and train."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 128), nn.GELU(), nn.Linear(128, WIDTH))
    quantize_model(model, "w4g32a")
    model = nn.Sequential(Adapted(model[0]), model[1], Adapted(model[2]))
    codes = [buffer.clone() for buffer in model.buffers()]
    for name, wrap in (("DDP", DistributedDataParallel), ("FSDP2", fully_shard)):
        wrapped = wrap(copy.deepcopy(model))
        loss = train(wrapped)
        kept = all(map(torch.equal, codes, wrapped.buffers()))
        if dist.get_rank() == 0:
            print(f"{name}: loss {loss:.4f} after {STEPS} steps, codes as they were: {kept}")
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:
        main()
    else:  # what torchrun does
        from torch.distributed import run

        os.environ.setdefault("OMP_NUM_THREADS", "1")
        run.main(["--standalone", "--nproc-per-node=2", *sys.argv])
