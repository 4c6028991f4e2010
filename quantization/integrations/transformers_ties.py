"""Tied weights of transformers models: what may still be tied once some are codes.

transformers lists which Parameters are one (``{"lm_head.weight": "model.embed_tokens.weight"}``),
and ties them anew at any time. A quantized layer has no such Parameter. So pairs with a quantized
end are taken off the list; two quantized layers of one weight hold the same codes without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from torch import nn
from transformers import PreTrainedModel

from quantization.layers.quantized_module import QuantizedModule
from quantization.swap.conversion import memory_of
from quantization.swap.walker import walk

__all__ = ["parameter_of", "restrict_ties", "share_tensors", "tie_parameters"]


def restrict_ties(model: nn.Module) -> None:
    """Let transformers tie only what can be tied, now and whenever it ties anew.

    Layers that are float again are put back on the list if they share a Parameter.

    Args:
        model: whatever it is; only models of transformers are touched.

    Example:
        >>> restrict_ties(nn.Linear(8, 8))
    """
    for module in {id(site.module): site.module for site in walk(model)}.values():
        if isinstance(module, PreTrainedModel) and hasattr(module, "all_tied_weights_keys"):
            _restrict(module)


def _restrict(model: PreTrainedModel) -> None:
    listed = dict(model.all_tied_weights_keys)
    kept = {t: s for t, s in listed.items() if _is_float(model, t) and _is_float(model, s)}
    if len(kept) < len(listed):
        model.all_tied_weights_keys = kept
        _list(model, kept)
    elif "_tied_weights_keys" in model.__dict__ and not _has_quantized(model):
        del model._tied_weights_keys  # that of the class shows again
        fresh = model.get_expanded_tied_weights_keys(all_submodels=True)
        kept |= {t: s for t, s in fresh.items() if _is_one(model, t, s)}
        model.all_tied_weights_keys = kept
        if kept != fresh:
            _list(model, kept)


def _list(model: PreTrainedModel, kept: Mapping[str, str]) -> None:
    """What the model ties when it is told to tie anew; some classes compute that each time."""
    with suppress(AttributeError):
        model._tied_weights_keys = dict(kept)


def _has_quantized(model: nn.Module) -> bool:
    return any(isinstance(module, QuantizedModule) for module in model.modules())


def _is_float(model: nn.Module, key: str) -> bool:
    return parameter_of(model, key) is not None


def parameter_of(model: nn.Module, key: str) -> nn.Parameter | None:
    """The Parameter of that name, or None; no layer is asked to compute its weight.

    Example:
        >>> parameter_of(nn.Sequential(nn.Linear(2, 3)), "0.weight").shape
        torch.Size([3, 2])
    """
    owner, _, name = key.rpartition(".")
    try:
        return model.get_submodule(owner)._parameters.get(name)
    except AttributeError:
        return None


def _is_one(model: nn.Module, *pair: str) -> bool:
    first, second = (parameter_of(model, key) for key in pair)
    return first is not None and second is not None and memory_of(first) == memory_of(second)


def tie_parameters(model: PreTrainedModel) -> None:
    """Tie what transformers would, where it is told not to (while it builds a model on meta)."""
    for target, source in model.all_tied_weights_keys.items():
        parent, _, name = target.rpartition(".")
        setattr(model.get_submodule(parent), name, model.get_parameter(source))


def share_tensors(model: nn.Module, ties: Mapping[str, str]) -> None:
    """Give buffers the tensors that they are to share.

    Args:
        model: it has all of them.
        ties: keys of a state dict: of a buffer -> of a Parameter or buffer.

    Raises:
        ValueError: if a tensor to share is on the disk, from where it cannot be.

    Example:
        >>> from quantization import QWQALinearLayer
        >>> model = nn.Sequential(QWQALinearLayer(8, 8), QWQALinearLayer(8, 8))
        >>> share_tensors(model, {"1.int8_weights": "0.int8_weights"})
        >>> model[1].int8_weights is model[0].int8_weights
        True
    """
    for key, first in ties.items():
        (name, _, part), (owner, _, source) = key.rpartition("."), first.rpartition(".")
        target, giver = model.get_submodule(name), model.get_submodule(owner)
        tensor = (giver._parameters | giver._buffers)[source]
        if tensor is None or tensor.is_meta:
            raise ValueError(
                f"{key} is to share {first}, which is offloaded: keep {owner} in memory by the "
                "device_map, or leave offload_buffers out"
            )
        old = target._buffers[part]
        shared = tensor if not isinstance(tensor, nn.Parameter) else tensor.detach()
        moved = old is not None and not old.is_meta and old.device != shared.device
        target._buffers[part] = shared.to(old.device) if moved else shared
