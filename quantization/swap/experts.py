"""Fused experts: mixtures that keep the weights of all experts in one Parameter, [experts, ...].

No linear layer is in there to be replaced, and most of such a model's weights are. Here they are
found, for reports, and, where their forward is known, made linear layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from quantization.layers.quantized_module import QuantizedModule
from quantization.swap import walker
from quantization.swap.conversion import memory_of
from quantization.swap.engine import Layer, swap, tensors_of
from quantization.swap.report import ReplacementReport
from quantization.swap.walker import Site

__all__ = ["UnfusedExperts", "unfuse_experts"]

#: What transformers' decorator use_experts_implementation leaves on a module of fused experts.
_MARKS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_apply_gate")


def unfuse_experts(model: nn.Module) -> ReplacementReport:
    """Give every expert of a model's fused experts linear layers of its own, in place.

    Known are the experts of transformers (5 and later): modules with the attributes that its
    ``use_experts_implementation`` gives them, as in Mixtral, Qwen's mixtures, DeepSeek, OLMoE and
    GPT-OSS. Their weights are not copied: each layer's weight is a view of its part. Others are
    reported as left. Then :func:`quantization.quantize_model` finds the layers, under names such
    as ``experts.3.down_proj``.

    Args:
        model: the model. If it is itself a module of experts, ``report.model`` is the new one.

    Returns:
        A report of every module that has bare Parameters of three dimensions. On any error the
        model is as it was.

    Raises:
        TypeError: if ``model`` is no nn.Module.

    Example:
        >>> unfuse_experts(nn.Sequential(nn.Linear(2, 2)))  # doctest: +SKIP
        ReplacementReport by unfuse_experts: 0 of 0 modules of fused experts replaced
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model (a torch.nn.Module instance), not {model!r:.60}")
    sites = list(walker.walk(model))
    bare, layers = bare_experts(sites), {}
    for site in sites:
        if id(site.module) in layers:
            layers[id(site.module)].names.append(site.name)
        elif id(site.module) in bare:
            reason = why_fused(site.module)
            status = "left" if reason else "replaced"
            layers[id(site.module)] = Layer(
                site.module, [site.name], status, reason or "", make=_unfused
            )
    noun = "modules of fused experts"
    return swap(sites, list(layers.values()), QuantizedModule, noun=noun, caller="unfuse_experts")


def bare_experts(sites: list[Site]) -> dict[int, list[str]]:
    """Ids of modules -> names of their float Parameters [experts, rows, cols].

    Modules of torch itself (convolutions, bilinear maps) are none.

    Example:
        >>> bare_experts(list(walker.walk(nn.Conv1d(4, 4, 4))))
        {}
    """
    found: dict[int, list[str]] = {}
    for site in sites:
        if type(site.module).__module__.startswith("torch.nn."):
            continue
        names = [
            name
            for name, parameter in site.module._parameters.items()
            if parameter is not None
            and not nn.parameter.is_lazy(parameter)
            and parameter.ndim == 3
            and parameter.is_floating_point()
            and min(parameter.shape) > 1  # [1, positions, features] is a table of positions
        ]
        if names:
            found[id(site.module)] = names
    return found


def left_experts(layers: list[Layer], sites: list[Site]) -> None:
    """Say of each bare Parameter among the layers what share of the model it is, and the remedy."""
    if not any(layer.parameter for layer in layers):
        return
    sizes = {
        memory_of(tensor): tensor.numel()
        for _, tensor, owner in tensors_of(sites)
        if isinstance(tensor, nn.Parameter)
    }
    for layer in layers:
        if layer.parameter:
            parameter = layer.module._parameters[layer.parameter]
            share = parameter.numel() / sum(sizes.values())
            remedy = why_fused(layer.module) or "unfuse_experts(model) makes linear layers of them"
            layer.reason = (
                f"a bare Parameter of {parameter.shape[0]} experts, {share:.1%} of the model's "
                f"parameters: {remedy}"
            )


def why_fused(module: nn.Module) -> str | None:
    """Why experts cannot be unfused, in words; else None.

    Example:
        >>> why_fused(nn.Identity())
        'the forward of Identity is not known to unfuse_experts'
    """
    kind = type(module).__name__
    if not all(hasattr(module, mark) for mark in _MARKS):
        return f"the forward of {kind} is not known to unfuse_experts"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance (by an offloading hook, say)"
    if getattr(module, "_is_expert_parallel", False):
        return f"the experts of {kind} are spread over processes"
    names = set(_projections(module))
    names |= {f"{name}_bias" for name in names} if module.has_bias else set()
    if set(module._parameters) != names:
        return f"{kind} has other Parameters than {', '.join(sorted(names))}"
    return None


def _projections(module: Any) -> tuple[str, str]:
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


class UnfusedExperts(nn.Module):
    """Experts with linear layers of their own, in the place of a module of fused ones.

    Children ``"0"``, ``"1"``, ... hold ``gate_up_proj`` (``up_proj`` where there is no gate) and
    ``down_proj``. The gate is that of the fused module's class.

    Args:
        fused: a module that :func:`why_fused` has nothing against.

    Example:
        >>> issubclass(UnfusedExperts, nn.Module)
        True
    """

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.kind = type(fused)
        for name, value in fused.__dict__.items():
            if name not in self.__dict__ and name != "_compiled_call_impl":
                self.__dict__[name] = value
        self.projections = _projections(fused)
        for name, child in fused._modules.items():
            self.add_module(name, child)
        self.num_experts = fused._parameters[self.projections[0]].shape[0]
        for index in range(self.num_experts):
            layers = {name: _expert_layer(fused, name, index) for name in self.projections}
            self.add_module(str(index), nn.ModuleDict(layers))
        self.train(fused.training)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The sum over each token's experts of what they make of it, times their weights.

        Args:
            hidden_states: ``[tokens, features]``.
            top_k_index: ``[tokens, k]``, numbers of experts; those beyond the last are no expert.
            top_k_weights: ``[tokens, k]``.

        Returns:
            ``[tokens, features]`` in the dtype of ``hidden_states``.
        """
        out = torch.zeros_like(hidden_states)
        for index in top_k_index.unique().tolist():
            if not 0 <= index < self.num_experts:
                continue
            tokens, places = torch.where(top_k_index == index)
            expert = self._modules[str(index)]
            up, down = (expert[name] for name in self.projections)
            hidden = up(hidden_states[tokens])
            hidden = self.kind._apply_gate(self, hidden) if self.has_gate else self.act_fn(hidden)
            result = down(hidden)
            if self.has_post_expert_norm:
                result = self.post_expert_norm(result)
            weighted = result * top_k_weights[tokens, places, None]
            out.index_add_(0, tokens, weighted.to(out.dtype))
        return out


def _unfused(old: nn.Module, name: str) -> nn.Module:
    return UnfusedExperts(old)


def _expert_layer(fused: Any, name: str, index: int) -> nn.Linear:
    """The linear layer of one projection of one expert; its weight is a view of the fused one."""
    source = fused._parameters[name]
    weight = source.detach()[index]
    weight = weight.t() if fused.is_transposed else weight
    layer = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=source.requires_grad)
    if fused.has_bias:
        bias = fused._parameters[f"{name}_bias"]
        layer.bias = nn.Parameter(bias.detach()[index], requires_grad=bias.requires_grad)
    return layer
