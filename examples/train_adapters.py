"""Low-rank adapters on a quantized model, trained by two processes: DDP, then FSDP2.

    python examples/train_adapters.py

Codes are buffers: they never learn, and every process holds all of them.
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

if "RANK" not in os.environ:  # not by torchrun: do what it does
    from torch.distributed import run

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run.main(["--standalone", "--nproc-per-node=2", *sys.argv])
    raise SystemExit


class Adapted(nn.Module):
    """A quantized layer, and a map of low rank that learns beside it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, 4, bias=False)
        self.up = nn.Linear(4, layer.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Both maps of ``x``."""
        return self.layer(x) + self.up(self.down(x))


dist.init_process_group("gloo")
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
quantize_model(model, "w4g32a")
model = nn.Sequential(Adapted(model[0]), model[1], Adapted(model[2]))
for wrap in (DistributedDataParallel, fully_shard):
    trained = wrap(copy.deepcopy(model))
    optimizer = torch.optim.Adam(trained.parameters(), lr=0.02)
    data = torch.Generator().manual_seed(dist.get_rank())  # each process has batches of its own
    for _ in range(30):
        x = torch.randn(16, 64, generator=data)
        loss = (trained(x) - x.roll(1, -1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if dist.get_rank() == 0:
        kept = all(map(torch.equal, model.buffers(), trained.buffers()))
        print(f"{wrap.__name__}: loss {loss.item():.4f}, codes as they were: {kept}")
dist.destroy_process_group()
