"""Run by torchrun: quantized layers in models that torch's own wrappers train, beside one process.

Quantized weights do not learn; what does here are low-rank adapters beside them and a bias.
"""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from quantization import PackedEmbedding, PackedLinearLayer, QWQALinearLayer
from tests.distributed.launch import run_checks

WORDS, WIDTH = 20, 32


class Adapted(nn.Module):
    """A frozen layer and a low-rank map that learns."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, 4, bias=False)
        self.up = nn.Linear(4, layer.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.up(self.down(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = PackedEmbedding(WORDS, WIDTH, scheme="w8")
        self.first = Adapted(PackedLinearLayer(WIDTH, 48, scheme="w4g16a"))
        self.second = Adapted(QWQALinearLayer(48, WIDTH))
        self.second.layer.bias = nn.Parameter(self.second.layer.bias.clone())

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(self.words(words)).relu())


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, WORDS, (4, 6), generator=generator) for _ in range(count)]


def trained(model: nn.Module, own: slice) -> list[float]:
    """Losses of a few steps, each process with its part of the batch."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for words in batches(3):
        loss = model(words[own]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def own_part() -> slice:
    each = 4 // dist.get_world_size()
    return slice(dist.get_rank() * each, (dist.get_rank() + 1) * each)


def mean_over_ranks(losses: list[float]) -> torch.Tensor:
    total = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(total)
    return total / dist.get_world_size()


def codes_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.named_buffers()}


def check_ddp_trains_what_learns() -> None:
    model = Model()
    alone, before = copy.deepcopy(model), codes_of(model)
    wanted = trained(alone, slice(None))
    for options in ({}, {"broadcast_buffers": False}, {"static_graph": True}):
        copied = copy.deepcopy(model)
        losses = mean_over_ranks(trained(DistributedDataParallel(copied, **options), own_part()))
        torch.testing.assert_close(losses, torch.tensor(wanted, dtype=torch.float64))
        for name, parameter in copied.named_parameters():
            torch.testing.assert_close(parameter, alone.get_parameter(name), rtol=1e-4, atol=1e-6)
        assert all(torch.equal(tensor, before[name]) for name, tensor in copied.named_buffers())


def check_ddp_sends_the_codes_of_the_first_process() -> None:
    model = Model()
    before = codes_of(model)
    if dist.get_rank() != 0:
        model.first.layer.packed_weights.zero_()
        model.second.layer.int8_weights.zero_()
    DistributedDataParallel(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_buffers())


def check_fsdp2_shards_parameters_and_replicates_codes() -> None:
    model = Model()
    alone, before = copy.deepcopy(model), codes_of(model)
    wanted = trained(alone, slice(None))
    for part in (model.first, model.second):
        fully_shard(part)
    fully_shard(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    for name, tensor in model.named_buffers():  # whole in every process
        assert not isinstance(tensor, DTensor) and torch.equal(tensor, before[name])
    losses = mean_over_ranks(trained(model, own_part()))
    torch.testing.assert_close(losses, torch.tensor(wanted, dtype=torch.float64))
    for name, parameter in model.named_parameters():
        full = parameter.full_tensor()
        torch.testing.assert_close(full, alone.get_parameter(name), rtol=1e-4, atol=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_buffers())


def check_fsdp2_in_mixed_precision() -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model = Model()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for part in (model.first, model.second):
        fully_shard(part, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    y = model(batches(1)[0][own_part()])
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    assert all(
        p.grad is not None and p.grad.to_local().isfinite().all() for p in model.parameters()
    )


def check_fsdp2_compiles() -> None:
    model = Model()
    rows = batches(1)[0]
    wanted = model(rows).detach()
    fully_shard(model)
    model.compile(backend="aot_eager")
    y = model(rows)
    torch.testing.assert_close(y.detach(), wanted)
    y.sum().backward()


CHECKS = {
    name.removeprefix("check_"): f for name, f in globals().items() if name.startswith("check_")
}

if __name__ == "__main__":
    run_checks(CHECKS)
