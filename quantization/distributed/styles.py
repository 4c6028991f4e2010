"""Styles for torch's ``parallelize_module``: how the processes of a mesh share a quantized layer.

torch's own styles make DTensors of Parameters. Quantized layers have none: their codes are buffers,
whose bytes do not lie along the features of the weight, and which no operator of DTensor knows how
to multiply. So each process gets a share that is a layer of its own
(:func:`quantization.distributed.shard`), and hooks see to what is exchanged, as in torch's styles.
Layers that a recipe left in float (nn.Linear) may stand in the same plan.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle

from quantization.distributed.collectives import Ranks, add_up, gather, with_summed_gradient
from quantization.distributed.shares import EmbeddingShare, shard, share_bounds, why_whole
from quantization.layers.packed_embedding import PackedEmbedding
from quantization.layers.quantized_module import QuantizedModule
from quantization.ops import torch_ops

__all__ = ["ColwiseQuantized", "QuantizedStyle", "RowwiseQuantized", "SumsGradients"]


class QuantizedStyle(ParallelStyle):
    """What both styles have in common: a layer becomes its share, in place, with hooks around it.

    Args:
        unit: features that stay together: those of a group of the layer that the outputs go to,
            where shares are not all equal.
    """

    def __init__(self, *, unit: int = 1) -> None:
        super().__init__()
        self.unit = unit

    def check(self, module: nn.Module, count: int) -> None:
        """Whether a module has so many shares, before any is made.

        Raises:
            TypeError: for a module of a kind that has none.
            ValueError: if there are too few features or groups.
        """
        reason = why_whole(module)
        if reason is not None:
            raise TypeError(reason)
        share_bounds(module, self._dim(module), count, self.unit)

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        ranks = Ranks.of(device_mesh)
        self.check(module, ranks.count)
        dim = self._dim(module)
        sizes = [b - a for a, b in share_bounds(module, dim, ranks.count, self.unit)]
        _adopt_share(module, shard(module, dim, ranks.index, ranks.count, unit=self.unit))
        self._connect(module, sizes, ranks)
        return module

    def _dim(self, module: nn.Module) -> int:
        """Which dimension of the weight is shared."""
        raise NotImplementedError

    def _connect(self, module: nn.Module, sizes: list[int], ranks: Ranks) -> None:
        """Hang up the hooks."""
        raise NotImplementedError

    def __repr__(self) -> str:
        options = {name: value for name, value in vars(self).items() if name != "src_data_rank"}
        told = ", ".join(f"{name}={value}" for name, value in options.items())
        return f"{type(self).__name__}({told})"


class ColwiseQuantized(QuantizedStyle):
    """Each process has some of the output features of a linear layer.

    The input is the same in all of them. The output is this process's part, for a layer in the
    style :class:`RowwiseQuantized` to take in; or, with ``gather_output``, that of all, which has
    the bits of the whole layer's.

    Args:
        gather_output: whether the processes exchange their parts.
        unit: as in :class:`QuantizedStyle`.

    Example:
        >>> ColwiseQuantized(gather_output=True)
        ColwiseQuantized(unit=1, gather_output=True)
    """

    def __init__(self, *, gather_output: bool = False, unit: int = 1) -> None:
        super().__init__(unit=unit)
        self.gather_output = gather_output

    def _dim(self, module: nn.Module) -> int:
        if isinstance(module, PackedEmbedding):
            raise TypeError("an embedding is shared by rows: use RowwiseQuantized")
        return 0

    def _connect(self, module: nn.Module, sizes: list[int], ranks: Ranks) -> None:
        module.register_forward_pre_hook(partial(_sum_input_gradient, ranks=ranks))
        if self.gather_output:
            module.register_forward_hook(partial(_join, sizes=sizes, ranks=ranks))


class RowwiseQuantized(QuantizedStyle):
    """Each process has some of the input features of a linear layer, or rows of an embedding.

    A linear layer takes this process's part of the input, as layers in the style
    :class:`ColwiseQuantized` give it; an embedding takes the same numbers everywhere. The output is
    the sum of all parts. Those travel in float32 (float64 for float64 activations), so that the
    result is rounded to its type once, as that of the whole layer is. A bias is with the first
    process, and added once. Embeddings give the bits of the whole one.

    Args:
        unit: as in :class:`QuantizedStyle`.

    Example:
        >>> RowwiseQuantized()
        RowwiseQuantized(unit=1)
    """

    def _dim(self, module: nn.Module) -> int:
        return 0 if isinstance(module, PackedEmbedding) else 1

    def _connect(self, module: nn.Module, sizes: list[int], ranks: Ranks) -> None:
        if isinstance(module, PackedEmbedding):
            module.register_forward_hook(partial(_add_rows, ranks=ranks))
            return
        if isinstance(module, QuantizedModule):
            module.register_forward_pre_hook(_ask_for_wide_output, with_kwargs=True)
        module.register_forward_hook(partial(_add_parts, ranks=ranks))


class SumsGradients(ParallelStyle):
    """Parameters that all processes have whole, where each sees only its own share of the features.

    Such as the norms of single heads between layers in the style :class:`ColwiseQuantized` and one
    in the style :class:`RowwiseQuantized`. Their gradients are summed over the processes.

    Example:
        >>> type(SumsGradients()).__name__
        'SumsGradients'
    """

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        ranks = Ranks.of(device_mesh)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(partial(_sum_gradient, ranks=ranks))
        return module


# ---- a layer becomes its share ---------------------------------------------------------------


def _adopt_share(module: Any, share: Any) -> None:
    """``module``, which others hold on to, with all that ``share`` has."""
    if not isinstance(module, QuantizedModule):
        module.weight, module.bias = share.weight, share.bias
        module.in_features, module.out_features = share.in_features, share.out_features
        return
    if isinstance(share, EmbeddingShare):
        module.__class__ = EmbeddingShare
        module.first_row, module.all_rows = share.first_row, share.all_rows
        module.padding_idx = None
    parts = {name: share._buffers[name] for name in share._weight_names()}
    module._set_buffers(parts, share._weight_shape())
    if not isinstance(share, EmbeddingShare):
        module.bias = share.bias


# ---- hooks -----------------------------------------------------------------------------------


def _sum_input_gradient(module: nn.Module, args: tuple, ranks: Ranks) -> tuple:
    x, *rest = args
    return with_summed_gradient(x, ranks), *rest


def _join(
    module: nn.Module, args: tuple, output: torch.Tensor, sizes: list[int], ranks: Ranks
) -> torch.Tensor:
    return gather(output, sizes, ranks)


def _ask_for_wide_output(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return args, kwargs | {"out_dtype": _wide(args[0].dtype)}


def _add_parts(module: nn.Module, args: tuple, output: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    total = add_up(output.to(_wide(output.dtype)), ranks)
    return total.to(torch_ops.output_dtype(args[0]))


def _add_rows(module: nn.Module, args: tuple, output: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    return add_up(output.to(_wide(output.dtype)), ranks).to(output.dtype)


def _sum_gradient(parameter: nn.Parameter, ranks: Ranks) -> None:
    parameter.grad = add_up(parameter.grad, ranks)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32
