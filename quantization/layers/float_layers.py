"""Float layers: which of them can be quantized, why others cannot, and their tensors.

This file knows torch.nn and nothing else of the package.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

#: Subclasses of nn.Linear that are known to compute ``x W^T + bias`` and nothing else, by dotted
#: name. A class of your own belongs here, or in ``plain_linear=`` of a call.
PLAIN_LINEAR: set[str | type[nn.Module]] = {
    "transformers.models.falcon.modeling_falcon.FalconLinear",
    "transformers.models.esm.modeling_esmfold.EsmFoldLinear",
}

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# ---- linear layers ---------------------------------------------------------------------------


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is a linear layer in the manner of GPT-2: ``weight`` is [in, out], ``nf`` is out.

    Told by its looks, so that transformers need not be installed.
    """
    return type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int)


def looks_linear(module: nn.Module) -> bool:
    """Whether a user would call it a linear layer, so that a report must speak of it.

    Example:
        >>> looks_linear(nn.LazyLinear(3)), looks_linear(nn.Embedding(3, 2))
        (True, False)
    """
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return True
    if is_script(module):
        return any(getattr(inner, "original_name", "") == "Linear" for inner in module.modules())
    sizes = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    weight = module._parameters.get("weight")
    return weight is not None and tuple(weight.shape) == sizes


def is_script(module: nn.Module) -> bool:
    """Whether it is compiled by TorchScript, so that nothing in it can be changed."""
    return isinstance(module, torch.jit.ScriptModule)


def float_parts(linear: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight [out_features, in_features] and bias [out_features] or None, detached, not copied.

    Raises:
        TypeError: if it is not a linear layer that can be converted; the message says why.

    Example:
        >>> weight, bias = float_parts(nn.Linear(2, 3, bias=False))
        >>> weight.shape, bias
        (torch.Size([3, 2]), None)
    """
    reason = why_left(linear)
    if reason is not None:
        raise TypeError(f"{type(linear).__name__} cannot be converted: {reason}")
    layer: Any = linear
    weight: torch.Tensor = layer.weight.detach()
    bias = None if layer.bias is None else layer.bias.detach()
    return (weight.t() if is_conv1d(linear) else weight), bias


def is_plain_linear(module: nn.Module, more: Collection[str | type[nn.Module]] = ()) -> bool:
    """Whether it is nn.Linear, or a subclass that is known to compute the same.

    Args:
        module: any.
        more: classes that are known too, or their names, dotted or bare.

    Example:
        >>> class Mine(nn.Linear): ...
        >>> is_plain_linear(Mine(2, 3)), is_plain_linear(Mine(2, 3), [Mine])
        (False, True)
        >>> is_plain_linear(Mine(2, 3), ["Mine"])
        True
    """
    cls = type(module)
    if cls is nn.Linear:
        return True
    names = {cls, f"{cls.__module__}.{cls.__qualname__}"}
    known = not names.isdisjoint(PLAIN_LINEAR) or not (names | {cls.__name__}).isdisjoint(more)
    return known and isinstance(module, nn.Linear)


def plain_classes(plain_linear: Any) -> tuple[str | type[nn.Module], ...]:
    """One class or several, or their names, as a tuple.

    Raises:
        TypeError: for anything else.

    Example:
        >>> plain_classes("FalconLinear")
        ('FalconLinear',)
    """
    single = isinstance(plain_linear, str) or not isinstance(plain_linear, Iterable)
    classes = (plain_linear,) if single else tuple(plain_linear)
    for one in classes:
        if not isinstance(one, str) and not (isinstance(one, type) and issubclass(one, nn.Linear)):
            raise TypeError(f"plain_linear has {one!r:.60}; give subclasses of nn.Linear, or names")
    return classes


def as_linear(module: nn.Module) -> nn.Module:
    """An nn.Linear of the Parameters of a subclass of it; any other module as it is.

    Example:
        >>> class Mine(nn.Linear): ...
        >>> as_linear(Mine(2, 3))
        Linear(in_features=2, out_features=3, bias=True)
    """
    if type(module) is nn.Linear or not isinstance(module, nn.Linear):
        return module
    sizes = (module.in_features, module.out_features)
    linear = nn.Linear(*sizes, bias=module.bias is not None, device="meta")
    linear.weight, linear.bias = module.weight, module.bias
    return linear.train(module.training)


def why_left(module: Any, plain_linear: Collection[str | type[nn.Module]] = ()) -> str | None:
    """Why a module cannot be converted, in words, with the remedy where there is one; else None.

    Args:
        module: any.
        plain_linear: as ``more`` of :func:`is_plain_linear`.

    Example:
        >>> why_left(nn.Linear(2, 3))
        >>> why_left(nn.LazyLinear(3))
        'lazy: it has no weight yet; run the model once on an input first'
    """
    reason = _why_class(module, plain_linear)
    reasons = (why(module) for why in (_why_rewritten, _why_extras, _why_weight))
    return reason or next(filter(None, reasons), None)


def _why_class(module: Any, plain_linear: Collection[str | type[nn.Module]] = ()) -> str | None:
    if not isinstance(module, nn.Module):
        return f"{module!r} is not a torch.nn.Module"
    if is_script(module):
        return "TorchScript: its layers are compiled already; replace them before it is scripted"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return "lazy: it has no weight yet; run the model once on an input first"
    if parametrize.is_parametrized(module):
        parametrized: Any = module.parametrizations
        names = ", ".join(parametrized)
        return (
            f"parametrized ({names}): its tensors are computed anew at each call; "
            "torch.nn.utils.parametrize.remove_parametrizations makes them plain"
        )
    if type(module) is nn.modules.linear.NonDynamicallyQuantizableLinear:
        return "nn.MultiheadAttention reads this weight itself and never calls the layer"
    if is_plain_linear(module, plain_linear) or is_conv1d(module):
        return None
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if isinstance(module, nn.Linear):
        return (
            f"{kind} is a subclass of nn.Linear: its forward may do more than a matrix product; "
            f"if it does not, say so by plain_linear={type(module).__name__}"
        )
    return f"{kind} is not nn.Linear"


def _tensors_of(module: nn.Module) -> tuple[str, ...]:
    return ("weight",) if isinstance(module, nn.Embedding) else ("weight", "bias")


def _why_rewritten(module: nn.Module) -> str | None:
    """Whether something writes the weight before each call, or stands in for forward."""
    for name in _tensors_of(module):
        if name in module._parameters:
            continue
        if f"{name}_mask" in module._buffers:
            return f"pruned ({name}): torch.nn.utils.prune.remove(layer, {name!r}) makes it plain"
        if f"{name}_g" in module._parameters:
            return f"weight_norm ({name}): torch.nn.utils.remove_weight_norm makes it plain"
        if f"{name}_orig" in module._parameters:
            return f"spectral_norm ({name}): torch.nn.utils.remove_spectral_norm makes it plain"
        return f"its {name} is not a Parameter"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance (by an offloading hook, say)"
    return None


_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def _why_extras(module: nn.Module) -> str | None:
    extras = {*module._parameters, *module._buffers, *module._modules} - {"weight", "bias"}
    if extras:
        return f"it holds more than a weight and a bias: {', '.join(sorted(extras))}"
    if any(getattr(module, hooks) for hooks in _STATE_HOOKS):
        return "it has hooks on its state dict, which are written for a float weight"
    return None


def _why_weight(module: Any) -> str | None:
    for name in _tensors_of(module):
        value = module._parameters[name]
        if value is None:
            if name == "weight":
                return "it has no weight"
            continue
        if type(value) is not nn.Parameter:
            return f"its {name} is a {type(value).__name__}, a tensor with a behaviour of its own"
        if value.dtype not in _FLOATS or value.layout is not torch.strided:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _FLOATS)
            return f"its {name} is {value.dtype} ({value.layout}); dense {allowed} can be converted"
    weight, bias = module.weight, getattr(module, "bias", None)
    if weight.ndim != 2:
        return f"its weight has shape {tuple(weight.shape)}, not two dimensions"
    if isinstance(module, nn.Embedding):
        return None
    out_features = module.nf if is_conv1d(module) else module.out_features
    if weight.shape[1 if is_conv1d(module) else 0] != out_features:
        return f"its weight has shape {tuple(weight.shape)}, but it has {out_features} outputs"
    if bias is not None and tuple(bias.shape) != (out_features,):
        return f"its bias has shape {tuple(bias.shape)}, expected ({out_features},)"
    return None


# ---- embeddings ------------------------------------------------------------------------------


def embedding_table(embedding: nn.Module) -> torch.Tensor:
    """The weight [num_embeddings, embedding_dim] of an embedding, detached, not copied.

    Raises:
        TypeError: if it is no embedding that can be converted; the message says why.

    Example:
        >>> embedding_table(nn.Embedding(5, 2)).shape
        torch.Size([5, 2])
    """
    reason = why_embedding_left(embedding)
    if reason is not None:
        raise TypeError(f"{type(embedding).__name__} cannot be converted: {reason}")
    weight: Any = embedding.weight
    table: torch.Tensor = weight.detach()
    return table


def why_embedding_left(module: Any) -> str | None:
    """Why an embedding cannot be converted, in words; else None.

    Example:
        >>> why_embedding_left(nn.Embedding(5, 2))
        >>> why_embedding_left(nn.Embedding(5, 2, max_norm=1.0))
        'max_norm: its calls shrink rows of the weight'
    """
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if not isinstance(module, nn.Embedding):
        return f"{kind} is not nn.Embedding"
    if parametrize.is_parametrized(module):
        return _why_class(module)
    if type(module) is not nn.Embedding:
        return f"{kind} is a subclass of nn.Embedding: its forward may do more than a look-up"
    if module.max_norm is not None:
        return "max_norm: its calls shrink rows of the weight"
    reasons = (reason(module) for reason in (_why_rewritten, _why_extras, _why_weight))
    return next(filter(None, reasons), None)
