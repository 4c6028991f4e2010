"""A whole model over several processes: which layer is shared how, and doing it."""

from __future__ import annotations

import logging
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from quantization.distributed.shares import group_of
from quantization.distributed.styles import (
    ColwiseQuantized,
    QuantizedStyle,
    RowwiseQuantized,
    SumsGradients,
)
from quantization.layers.packed_embedding import PackedEmbedding
from quantization.layers.quantized_linear import QuantizedLinear
from quantization.layers.quantized_module import QuantizedModule
from quantization.swap.conversion import adopt, memory_of, weight_of
from quantization.swap.experts import UnfusedExperts

__all__ = ["plan_of", "tensor_parallel"]

_log = logging.getLogger(__name__)

# What transformers' plans say of a layer; each has more than one name.
_JOINED = {"colwise_gather_output", "colwise_rep", "rowwise_split_input", "rowwise_rep"}
_WHOLE = {"replicate", "replicated_with_grad_allreduce"}
_KNOWN = {"colwise", "rowwise", "embedding_rowwise", *_JOINED, *_WHOLE}
_EXPERTS = "moe_tp_experts"

#: Attributes by which attention says how many features one head has.
_HEADS = ("head_dim", "head_size")


def tensor_parallel(
    model: nn.Module,
    mesh: DeviceMesh | None = None,
    plan: Mapping[str, ParallelStyle] | None = None,
) -> nn.Module:
    """Spread a model's quantized layers over the processes of a mesh, in place.

    Every process calls this with the same model, as torchrun starts them, and keeps its share of
    each layer in the plan. What is in no plan (norms, and what a recipe left in float) stays whole
    everywhere. Layers that hold the same codes hold the same shares.

    Afterwards each process computes every output of the model, as it did alone, and calls must be
    the same in all of them. A state dict is that of a process's shares: save the model before.

    Args:
        model: quantized before; on the CPU or any device that torch.distributed has a backend for.
        mesh: of one dimension; None: all processes of the default group, which is started from the
            variables of torchrun if it is not there.
        plan: dotted names, or patterns with ``*`` for parts of them, and styles, as
            ``parallelize_module`` takes them; None: :func:`plan_of` the model.

    Returns:
        ``model``.

    Raises:
        TypeError: if a style does not fit its module. Nothing is changed then.
        ValueError: if a pattern matches no module, a layer has fewer features or groups than there
            are processes, or no plan is given and the model has none. Nothing is changed then.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> from quantization import quantize_model
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8))
        >>> _ = quantize_model(model, "w4g32a")
        >>> _ = tensor_parallel(model, plan={"0": ColwiseQuantized(), "2": RowwiseQuantized()})
        >>> model(torch.randn(2, 64)).shape
        torch.Size([2, 8])
        >>> dist.destroy_process_group()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model (a torch.nn.Module instance), not {model!r:.60}")
    mesh = _all_processes(model) if mesh is None else mesh
    styles = plan_of(model, mesh.size()) if plan is None else _by_name(model, plan)
    for name, style in styles.items():
        if isinstance(style, QuantizedStyle):
            _check(style, model.get_submodule(name), name, mesh.size())
    ties = _ties(model)
    parallelize_module(model, mesh, dict(styles))
    for first, *others in ties:
        for other in others:
            adopt(first, other)
    kinds = Counter(type(style).__name__ for style in styles.values())
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    _log.info("share %d of %d: %s", mesh.get_local_rank(), mesh.size(), told)
    return model


def plan_of(model: nn.Module, count: int) -> dict[str, ParallelStyle]:
    """How a transformers model is to be shared by so many processes, layer by layer.

    It is the model's own plan (``base_model_tp_plan`` of its config), in styles for quantized
    layers. Layers between which features are shared (the projections of an attention, those of an
    MLP) are taken together: features are shared by whole heads and whole groups of the layer that
    sums over them. Where there are too few for every process to get as many (an MLP: to get any),
    the layers of that block are joined instead: each process has its share of the weights, and all
    exchange what they make of it, so that each has all heads. Layers that are in float then stay
    whole, as do those with fewer output features than there are processes.

    Args:
        model: a model of transformers, quantized before.
        count: processes.

    Returns:
        Dotted names of modules, and a style for each, as ``parallelize_module`` takes them.

    Raises:
        ValueError: if the model has no plan, or one with a style that quantized layers have not.

    Example:
        >>> from quantization import quantize_model
        >>> class MLP(nn.Module):
        ...     tp_plan = {"up": "colwise", "down": "rowwise"}
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)
        >>> model = MLP()
        >>> _ = quantize_model(model, "w4g32")
        >>> plan_of(model, 2)  # of 3 groups, one process has two
        {'up': ColwiseQuantized(unit=32, gather_output=False), 'down': RowwiseQuantized(unit=32)}
    """
    wanted = _plan_in(model)
    modules = dict(model.named_modules())
    _refuse_parameters(model, wanted)
    blocks: dict[str, dict[str, str]] = {}
    for name in modules:
        style = wanted.get(_generic(name))
        if style is not None:
            blocks.setdefault(name.rpartition(".")[0], {})[name] = style
    plan: dict[str, ParallelStyle] = {}
    for parent, styles in blocks.items():
        plan |= _plan_of_block(modules, modules[parent], styles, count)
    if not plan:
        raise ValueError(
            f"no layer of {type(model).__name__} is both quantized and in the model's plan "
            f"({', '.join(wanted)}): quantize the model first, or give a plan"
        )
    return plan


# ---- the plan of a model ---------------------------------------------------------------------


def _plan_in(model: Any) -> dict[str, str]:
    wanted = getattr(model, "tp_plan", None) or getattr(model, "_tp_plan", None)
    if not wanted:
        raise ValueError(
            f"{type(model).__name__} says nothing of how it can be shared (tp_plan): give a plan, "
            "such as {'layers.*.up': ColwiseQuantized(), 'layers.*.down': RowwiseQuantized()}"
        )
    return dict(wanted)


def _generic(name: str) -> str:
    """The name with ``*`` for numbers, as plans have it."""
    return re.sub(r"(^|(?<=\.))\d+(?=\.|$)", "*", name)


def _refuse_parameters(model: nn.Module, wanted: dict[str, str]) -> None:
    """Bare Parameters in a plan are fused experts: no layers, so they are not quantized either."""
    bare = [name for name, _ in model.named_parameters() if _generic(name) in wanted]
    if bare:
        raise ValueError(
            f"the model's plan shares the Parameter {bare[0]}, which is no layer and not "
            "quantized: call unfuse_experts(model) and quantize it before, or give a plan"
        )


def _plan_of_block(
    modules: dict[str, nn.Module], parent: nn.Module, styles: dict[str, str], count: int
) -> dict[str, ParallelStyle]:
    """Styles for those children of one module that the plan names."""
    plan: dict[str, ParallelStyle] = {}
    inner = [name for name, style in styles.items() if style == "colwise"]
    outer = [name for name, style in styles.items() if style == "rowwise"]
    unit = _unit_between(parent, [modules[n] for n in inner], [modules[n] for n in outer], count)
    for name, style in styles.items():
        module = modules[name]
        if style == _EXPERTS and isinstance(module, UnfusedExperts):
            plan |= _joined(
                {f"{name}.{key}": child for key, child in module.named_modules()}, count
            )
        elif style not in _KNOWN:
            raise ValueError(
                f"the model's plan has the style {style!r} for {name}, and quantized layers have "
                f"only {', '.join(sorted(_KNOWN))}: give a plan"
            )
        elif style == "embedding_rowwise":
            if isinstance(module, PackedEmbedding) and module.num_embeddings >= count:
                plan[name] = RowwiseQuantized()
        elif style == "replicated_with_grad_allreduce" and unit is not None:
            plan[name] = SumsGradients()
        elif style in _JOINED or (style in ("colwise", "rowwise") and unit is None):
            plan |= _joined({name: module}, count)
        elif style == "colwise":
            plan[name] = ColwiseQuantized(unit=unit)
        elif style == "rowwise":
            plan[name] = RowwiseQuantized(unit=unit)
    return plan


def _joined(modules: dict[str, nn.Module], count: int) -> dict[str, ParallelStyle]:
    """Each a share of the weights, and all of the output: for those that have enough of it."""
    return {
        name: ColwiseQuantized(gather_output=True)
        for name, module in modules.items()
        if isinstance(module, QuantizedLinear) and module.out_features >= count
    }


def _unit_between(parent: nn.Module, inner: list[Any], outer: list[Any], count: int) -> int | None:
    """Features that must stay together between layers that make and layers that sum them.

    None: they cannot be shared, as processes would get parts of heads or groups, or nothing.
    """
    if not inner or not outer:
        return None
    widths = {layer.out_features for layer in inner} | {layer.in_features for layer in outer}
    group = math.lcm(*(group_of(layer) for layer in outer))
    head = next((size for name in _HEADS if (size := getattr(parent, name, None))), 1)
    is_even = all(width % (count * head) == 0 for width in widths)
    if is_even and all(layer.in_features // count % group == 0 for layer in outer):
        return 1
    if head == 1 and len(widths) == 1 and -(-widths.pop() // group) >= count:
        return group
    return None


# ---- doing it --------------------------------------------------------------------------------


def _all_processes(model: nn.Module) -> DeviceMesh:
    tensors = [*model.parameters(), *model.buffers()]
    device = tensors[0].device.type if tensors else "cpu"
    if dist.is_initialized():
        count = dist.get_world_size()
    elif "WORLD_SIZE" in os.environ:
        count = int(os.environ["WORLD_SIZE"])
    else:
        raise ValueError(
            "there is one process and no process group: start several by torchrun, or give a mesh"
        )
    return init_device_mesh(device, (count,))


def _by_name(model: nn.Module, plan: Mapping[str, ParallelStyle]) -> dict[str, ParallelStyle]:
    """The plan with the names of modules for patterns."""
    names = [name for name, _ in model.named_modules()]
    found: dict[str, ParallelStyle] = {}
    for pattern, style in plan.items():
        if not isinstance(style, ParallelStyle):
            raise TypeError(f"the style of {pattern!r} is {style!r:.60}; expected a ParallelStyle")
        matching = [name for name in names if _matches(name, pattern)]
        if not matching:
            raise ValueError(f"the plan's pattern {pattern!r} matches no module")
        found |= dict.fromkeys(matching, style)
    return found


def _matches(name: str, pattern: str) -> bool:
    parts, patterns = name.split("."), pattern.split(".")
    pairs = zip(parts, patterns, strict=False)
    return len(parts) == len(patterns) and all(fnmatchcase(*pair) for pair in pairs)


def _check(style: QuantizedStyle, module: nn.Module, name: str, count: int) -> None:
    try:
        style.check(module, count)
    except (TypeError, ValueError) as error:
        error.add_note(f"while planning {name}; the model was not changed")
        raise


def _ties(model: nn.Module) -> list[list[nn.Module]]:
    """Quantized layers that hold the same codes."""
    holders: dict[Any, list[nn.Module]] = {}
    for module in model.modules():
        if isinstance(module, QuantizedModule):
            codes = weight_of(module)
            holders.setdefault((*memory_of(codes), codes.shape), []).append(module)
    return [modules for modules in holders.values() if len(modules) > 1]
