"""nn.MultiheadAttention whose projections are linear layers of their own, to be quantized."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from quantization.layers.weight_view import WeightView

__all__ = ["IN_PROJECTIONS", "LayeredAttention"]

_functional: Any = F  # with checks of its own that are not public

#: The layers that one matrix, ``in_proj_weight``, is cut into, in its order.
IN_PROJECTIONS = ("q_proj", "k_proj", "v_proj")

_SIZES: tuple[str, ...] = (
    "embed_dim",
    "kdim",
    "vdim",
    "num_heads",
    "head_dim",
    "dropout",
    "batch_first",
)
_SIZES += ("add_zero_attn", "_qkv_same_embed_dim")


class LayeredAttention(nn.MultiheadAttention):
    """An nn.MultiheadAttention that calls four linear layers: q_proj, k_proj, v_proj, out_proj.

    nn.MultiheadAttention hands its weights to a function and calls no layer; here they are called,
    whatever they are: nn.Linear, or layers of codes. Arguments, masks and results are those of
    :class:`torch.nn.MultiheadAttention`, nested tensors of nn.TransformerEncoder included; float
    checkpoints of it (``in_proj_weight``) load. There is no fast path.

    Args:
        attention: the module to take the place of; its weights are shared, not copied.

    Example:
        >>> attention = nn.MultiheadAttention(16, 2, batch_first=True).eval()
        >>> layered, x = LayeredAttention(attention), torch.randn(3, 5, 16)
        >>> bool((layered(x, x, x)[0] - attention(x, x, x)[0]).abs().max() < 1e-6)
        True
        >>> layered.q_proj
        Linear(in_features=16, out_features=16, bias=True)
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        nn.Module.__init__(self)
        for name in _SIZES:
            setattr(self, name, getattr(attention, name))
        joined = attention.in_proj_weight
        weights = (
            [getattr(attention, f"{name}_weight") for name in IN_PROJECTIONS]
            if joined is None
            else joined.detach().chunk(3)
        )
        bias, out = attention.in_proj_bias, attention.out_proj
        biases = (None,) * 3 if bias is None else bias.detach().chunk(3)
        for name, weight, part in zip(IN_PROJECTIONS, weights, biases, strict=True):
            self.add_module(name, _linear(weight, part, (weight if joined is None else joined)))
        self.add_module("out_proj", _linear(out.weight, out.bias, out.weight))
        self.bias_k, self.bias_v = attention.bias_k, attention.bias_v
        self.train(attention.training)

    # ---- what nn.TransformerEncoder reads ------------------------------------------------------

    @property
    def in_proj_weight(self) -> Any:  # type: ignore[override]
        """The weights of the first three layers as one matrix, to be read; None if sizes differ."""
        if not self._qkv_same_embed_dim:
            return None
        first = self._of("weight")[0]
        shape = (3 * self.embed_dim, self.embed_dim)
        return WeightView(lambda: torch.cat(self._of("weight")), shape, first.dtype, first.device)

    @property
    def in_proj_bias(self) -> Any:  # type: ignore[override]
        """Their biases as one vector, or None."""
        biases = self._of("bias")
        return None if biases[0] is None else torch.cat(biases)

    def _of(self, name: str) -> list[Any]:
        return [getattr(getattr(self, layer), name) for layer in IN_PROJECTIONS]

    # ---- the map -------------------------------------------------------------------------------

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As that of :class:`torch.nn.MultiheadAttention`."""
        if query.is_nested:
            return self._of_parts(query, key, value, need_weights, average_attn_weights)
        masks = (key_padding_mask, attn_mask)
        is_batched = _functional._mha_shape_check(query, key, value, *masks, self.num_heads)
        if not is_batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask, which is missing: pass it too")
        is_hint = is_causal and key_padding_mask is None and not need_weights
        mask = None if is_hint else self._mask(query, key_padding_mask, attn_mask)
        q, k, v = self._heads(query, key, value)
        extra = k.shape[2] - key.shape[1]  # bias_k and zeros, which no mask hides
        mask = F.pad(mask, (0, extra)) if mask is not None and extra else mask
        y, weights = self._attend(q, k, v, mask, is_hint, need_weights)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not is_batched:
            return y[0], None if weights is None else weights[0]
        return (y if self.batch_first else y.transpose(0, 1)), weights

    def _heads(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """Queries, keys and values [batch, heads, length, features of a head]."""
        batch, found = inputs[0].shape[0], []
        for name, x, bias in zip(
            IN_PROJECTIONS, inputs, (None, self.bias_k, self.bias_v), strict=True
        ):
            rows = getattr(self, name)(x)
            if bias is not None:
                rows = torch.cat([rows, bias.to(rows.dtype).expand(batch, 1, -1)], 1)
            if self.add_zero_attn and name != IN_PROJECTIONS[0]:
                rows = F.pad(rows, (0, 0, 0, 1))
            found.append(rows.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2))
        return found

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        is_causal: bool,
        need_weights: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
            return y, None
        scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
        scores = scores if mask is None else scores + mask
        weights = F.dropout(scores.softmax(-1), dropout)
        return weights.to(v.dtype) @ v, weights

    def _mask(
        self, query: torch.Tensor, padding: torch.Tensor | None, mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Both masks as numbers to be added, [batch or 1, heads or 1, queries or 1, keys]."""
        kind = query.dtype
        other = _functional._none_or_dtype(mask)
        padding = _functional._canonical_mask(padding, "key_padding_mask", other, "attn_mask", kind)
        mask = _functional._canonical_mask(mask, "attn_mask", None, "", kind, False)
        if mask is not None:
            by_head = (query.shape[0], self.num_heads)
            mask = mask.unflatten(0, by_head) if mask.dim() == 3 else mask[None, None]
        if padding is None:
            return mask
        padding = padding[:, None, None, :]
        return padding if mask is None else mask + padding

    def _of_parts(
        self, query: Any, key: Any, value: Any, need_weights: bool, average: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Self-attention of a nested tensor, which nn.TransformerEncoder makes of a padded one."""
        lengths = torch.tensor([len(part) for part in query.unbind()], device=query.device)
        rows = torch.arange(int(lengths.max()), device=query.device)
        padded = [x.to_padded_tensor(0.0) for x in (query, key, value)]
        y, weights = self(
            *(x if self.batch_first else x.transpose(0, 1) for x in padded),
            key_padding_mask=rows >= lengths[:, None],
            need_weights=need_weights,
            average_attn_weights=average,
        )
        y = y if self.batch_first else y.transpose(0, 1)
        parts = [part[:length] for part, length in zip(y, lengths.tolist(), strict=True)]
        return torch.nested.as_nested_tensor(parts), weights

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """As in nn.Module; the matrices of an nn.MultiheadAttention go to the layers."""
        for kind in ("weight", "bias"):
            joined = state_dict.pop(f"{prefix}in_proj_{kind}", None)
            parts = (None,) * 3 if joined is None else joined.chunk(3)
            for name, part in zip(IN_PROJECTIONS, parts, strict=True):
                own = state_dict.pop(f"{prefix}{name}_{kind}", part)
                if own is not None:
                    state_dict[f"{prefix}{name}.{kind}"] = own
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, like: torch.Tensor) -> nn.Linear:
    """An nn.Linear of those tensors, which are Parameters or parts of ``like``."""
    out_features, in_features = weight.shape
    layer = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, like.requires_grad)
        setattr(layer, name, tensor)
    return layer
