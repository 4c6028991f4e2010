"""A layer's weight packed: what modules ask of it, and its floats in the layer's own dtype."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from quantization.forks import alone
from quantization.ops.dtypes import name_of
from quantization.schemes.packed_weights import PARTS, PackedWeights, pack_matrix
from quantization.schemes.scheme import Scheme

__all__ = ["check_weight", "layer_floats", "pack_as"]


def check_weight(weights: Any, name: str) -> torch.Tensor:
    """``weights``, if it is a matrix; its dtype is left to what quantizes it.

    Raises:
        TypeError: if it is no tensor.
        ValueError: if it has not two dimensions.
    """
    if not isinstance(weights, torch.Tensor):
        raise TypeError(f"{name} is a {type(weights).__name__}; expected a float torch.Tensor")
    if weights.ndim != 2:
        raise ValueError(
            f"{name} has shape {tuple(weights.shape)}; expected [out_features, in_features]"
        )
    return weights.detach()


def pack_as(
    weights: Any,
    scheme: Scheme,
    dtype: torch.dtype,
    *,
    pack: Callable[..., PackedWeights] = pack_matrix,
    name: str = "weights",
    **options: Any,
) -> PackedWeights:
    """A layer's weight packed, by ``pack(weight, scheme, name=, **options)``, in the layer's dtype.

    The scales are rounded to the layer's dtype before the codes are made; other floats after it.

    Example:
        >>> pack_as(torch.ones(2, 3), Scheme(4), torch.bfloat16).scales.dtype
        torch.bfloat16
    """
    weights = check_weight(weights, name)
    options["name"] = name
    with torch.inference_mode(False), torch.no_grad(), alone():
        if weights.dtype == dtype:
            return pack(weights, scheme, **options)
        made_for = scheme
        if "scales" in layer_floats(scheme):
            made_for = dataclasses.replace(scheme, scale_dtype=name_of(dtype))
        packed = pack(weights, made_for, **options)
        parts = {part: getattr(packed, part) for part in PARTS}
        for part in layer_floats(scheme):
            parts[part] = parts[part].to(dtype)
        return PackedWeights(scheme, packed.shape, **parts, dtype=dtype)


def layer_floats(scheme: Scheme) -> tuple[str, ...]:
    """Names of the float tensors that have the layer's dtype, whatever it is cast to.

    Example:
        >>> layer_floats(Scheme.nf4()), layer_floats(Scheme.parse("nf4+f32"))
        (('scales', 'codebook'), ('codebook',))
    """
    wide, narrow = (scheme.buffers((1, 1), dtype) for dtype in ("float64", "float32"))
    return tuple(name for name in wide if wide[name] != narrow[name])
