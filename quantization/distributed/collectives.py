"""What the ranks of a group exchange around a sharded layer, with the gradients that belong to it.

Each rank computes the same loss of the same numbers. So what comes out of a sum over the ranks has
the same gradient on every one of them, which goes back to each as it is; and what goes into shares
of a layer has a gradient that is spread over the ranks, and is summed on the way back. (M. Shoeybi
et al., "Megatron-LM", 2019, section 3.) The collectives are torch's functional ones, which
torch.compile takes into its graph.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

__all__ = ["Ranks", "add_up", "gather", "with_summed_gradient"]


class Ranks(NamedTuple):
    """A group of processes, as one of them sees it.

    Attributes:
        group: name of the process group.
        index: this one's place in it.
        count: how many there are.
    """

    group: str
    index: int
    count: int

    @classmethod
    def of(cls, mesh: Any) -> Ranks:
        """Those of a device mesh.

        Raises:
            ValueError: if it has more than one dimension.
        """
        if mesh.ndim != 1:
            names = mesh.mesh_dim_names or "no names"
            raise ValueError(
                f"the mesh has {mesh.ndim} dimensions ({names}); take one of them: mesh['tp']"
            )
        return cls(mesh.get_group().group_name, mesh.get_local_rank(), mesh.size())


def add_up(x: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """The sum of what all ranks have, of one shape, on each of them."""
    return _Sum.apply(x, ranks.group) if _needs_gradient(x) else _sum(x, ranks.group)


def with_summed_gradient(x: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """``x``, whose gradient will be the sum of those of all ranks."""
    return _SumOfGradients.apply(x, ranks.group) if _needs_gradient(x) else x


def gather(x: torch.Tensor, sizes: list[int], ranks: Ranks) -> torch.Tensor:
    """What all ranks have, side by side along the last dimension.

    Args:
        x: ``[..., sizes[ranks.index]]``.
        sizes: last sizes of all ranks.
        ranks: the group.

    Returns:
        ``[..., sum(sizes)]``.
    """
    return _Gather.apply(x, sizes, ranks) if _needs_gradient(x) else _gathered(x, sizes, ranks)


def _needs_gradient(x: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _sum(x: torch.Tensor, group: str) -> torch.Tensor:
    operators = torch.ops._c10d_functional
    return operators.wait_tensor(operators.all_reduce(x.contiguous(), "sum", group))


def _gathered(x: torch.Tensor, sizes: list[int], ranks: Ranks) -> torch.Tensor:
    operators, widest = torch.ops._c10d_functional, max(sizes)
    if x.shape[-1] < widest:  # all send as much
        x = F.pad(x, (0, widest - x.shape[-1]))
    sent = x.unsqueeze(0).contiguous()
    stack = operators.wait_tensor(operators.all_gather_into_tensor(sent, ranks.count, ranks.group))
    return torch.cat([stack[i, ..., :size] for i, size in enumerate(sizes)], -1)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        return _sum(x, group)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _SumOfGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return _sum(grad, ctx.group), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, sizes, ranks):
        ctx.start, ctx.size = sum(sizes[: ranks.index]), sizes[ranks.index]
        return _gathered(x, sizes, ranks)

    @staticmethod
    def backward(ctx, grad):
        return grad.narrow(-1, ctx.start, ctx.size), None, None
