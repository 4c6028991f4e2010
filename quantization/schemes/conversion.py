"""From one scheme to another without the float weight, where no number has to change."""

from __future__ import annotations

from dataclasses import replace

import torch

from quantization.numerics.granularity import Granularity
from quantization.numerics.parameters import Mode
from quantization.numerics.weight_packing import pack_weights
from quantization.ops.dtypes import name_of
from quantization.schemes.column_order import column_parts
from quantization.schemes.layer_weights import pack_as
from quantization.schemes.packed_weights import PackedWeights
from quantization.schemes.scheme import Scheme

_LOW, _HIGH = -128, 127


def repack(packed: PackedWeights, scheme: Scheme) -> PackedWeights:
    """The same weight under another scheme: exact where its codes fit, else quantized anew.

    Args:
        packed: of torch tensors.
        scheme: the other scheme.

    Returns:
        ``packed`` itself under its own scheme; otherwise new tensors, of the same dtype.

    Example:
        >>> from quantization.schemes.packed_weights import pack_matrix
        >>> packed = pack_matrix(torch.randn(4, 64), "w3g32")
        >>> exact = repack(packed, Scheme.parse("w5g16"))
        >>> torch.equal(exact.dequantize(), packed.dequantize())
        True
    """
    if scheme == packed.scheme:
        return packed
    with torch.inference_mode(False), torch.no_grad():
        exact = _exactly(packed, scheme)
        if exact is not None:
            return exact
        dtype = getattr(torch, packed.dtype)
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        return pack_as(packed.dequantize(wide), scheme, dtype, nonfinite="mark")


def _exactly(packed: PackedWeights, scheme: Scheme) -> PackedWeights | None:
    """The weight under a scheme of symmetric codes that hold it as it is; None if they do not."""
    if packed.input_scale is not None and not scheme.input_scale:
        return None
    if scheme.input_order or scheme.input_scale:
        return _exactly_in_columns(packed, scheme)
    is_plain = scheme.grid == "integer" and scheme.mode is Mode.Symmetric
    if not is_plain or scheme.double_quant or scheme.scale_dtype not in (None, packed.dtype):
        return None
    spans = scheme.granularity, packed.scheme.granularity
    if spans[0] is Granularity.PerTensor and spans[0] != spans[1]:
        return None  # rows have scales of their own
    cols = packed.shape[1]
    old, new = packed.scheme.group(cols), scheme.group(cols)
    if packed.input_order is not None and packed.scheme.groups(cols) > 1:
        return None  # neighbours have other scales
    if packed.scheme.groups(cols) > 1 and old % new:  # a new group with two old scales
        return None
    levels, scales, half = whole_levels(packed), _scales_of(packed), 1 << (scheme.bits - 1)
    if levels is None or levels.is_meta or scales is None or not _within(levels, -half, half - 1):
        return None
    starts = torch.arange(scheme.groups(cols), device=scales.device) * new
    codes = pack_weights(levels.to(torch.int8), scheme.bits, layout="dense", dim=1)
    spread = scales.index_select(1, starts // old)
    return PackedWeights(scheme, packed.shape, codes, spread, dtype=packed.dtype)


def _exactly_in_columns(packed: PackedWeights, scheme: Scheme) -> PackedWeights | None:
    """The same for a scheme with an order or multipliers: those that are there are kept."""
    kept = column_parts(packed.packed_weights.new_empty(packed.shape), scheme, packed.dtype)
    order, multipliers = packed.input_order, packed.input_scale
    old, new = (replace(each, input_scale=False) for each in (packed.scheme, scheme))
    if scheme.input_order and order is not None:
        kept["input_order"], order = order, None
        old = replace(old, input_order=False)
    if multipliers is not None:
        kept["input_scale"] = multipliers if order is None else multipliers[order.argsort()]
    bare = replace(packed, scheme=old, input_order=order, input_scale=None)
    made = _exactly(bare, replace(new, input_order=False))
    return None if made is None else replace(made, scheme=scheme, **kept)


def int8_parts(packed: PackedWeights) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 ``[out, in]`` and scales ``[out]`` of exactly the same weight.

    Under ``Scheme.int8()`` they are views of the tensors that are there.

    Raises:
        ValueError: if there are none; the message says why.

    Example:
        >>> from quantization.schemes.packed_weights import pack_matrix
        >>> codes, scales = int8_parts(pack_matrix(torch.tensor([[15.0, 2.0]]), "w4a"))
        >>> codes.tolist(), scales.tolist()
        ([[15, 2]], [1.0])
    """
    with torch.inference_mode(False), torch.no_grad():
        return _int8_parts(packed)


def _int8_parts(packed: PackedWeights) -> tuple[torch.Tensor, torch.Tensor]:
    scheme, cols = packed.scheme, packed.shape[1]
    if packed.input_scale is not None:
        raise ValueError(
            f"scheme {scheme} has a multiplier for each column, and int8 layers have none: no "
            "exact int8 layer; QWQALinearLayer.from_float(layer.dequantize()) rounds"
        )
    if scheme == Scheme.int8() and name_of(packed.scales.dtype) == packed.dtype:
        return packed.packed_weights.view(torch.int8), packed.scales.squeeze(1)
    if scheme.groups(cols) > 1:
        raise ValueError(
            f"scheme {scheme} gives a row {scheme.groups(cols)} scales, and int8 layers have one: "
            "no exact int8 layer; QWQALinearLayer.from_float(layer.dequantize()) rounds"
        )
    levels, scales = whole_levels(packed), _scales_of(packed)
    if levels is None or scales is None or not _within(levels, _LOW, _HIGH):
        raise ValueError(
            f"codes of scheme {scheme} do not stand for whole numbers of {_LOW}..{_HIGH} times a "
            "scale: no exact int8 layer; QWQALinearLayer.from_float(layer.dequantize()) rounds"
        )
    return levels.to(torch.int8), scales.reshape(-1)


def whole_levels(packed: PackedWeights) -> torch.Tensor | None:
    """What the scales multiply, int16 ``[out, in]``; None where that is not whole numbers.

    Example:
        >>> from quantization.schemes.packed_weights import pack_matrix
        >>> whole_levels(pack_matrix(torch.tensor([[3.0, 1.0, 2.0]]), "w2a")).tolist()
        [[3, 1, 2]]
    """
    scheme, (rows, cols) = packed.scheme, packed.shape
    is_asymmetric = scheme.mode is Mode.Asymmetric
    if scheme.grid not in ("integer", "binary", "ternary"):
        return None
    if is_asymmetric and not scheme.has_integer_zeros:
        return None
    if packed.packed_weights.is_meta:
        return torch.empty((rows, cols), dtype=torch.int16, device="meta")
    codes: torch.Tensor = packed.codes.to(torch.int16)
    if scheme.grid == "binary":
        return 2 * codes - 1
    if is_asymmetric:
        zeros: torch.Tensor = packed.integer_zero_points().to(torch.int16)
        place = torch.arange(cols, device=codes.device) // scheme.group(cols)
        codes = codes - zeros.index_select(1, place)
    return codes


def _within(levels: torch.Tensor, low: int, high: int) -> bool:
    """Whether all numbers are of that range; where there are none, they are."""
    if levels.is_meta or not levels.numel():
        return True
    return low <= int(levels.min()) and int(levels.max()) <= high


def _scales_of(packed: PackedWeights) -> torch.Tensor | None:
    """The scales as floats of the weight's dtype; None where that would round them."""
    scales, dtype = packed.scales, getattr(torch, packed.dtype)
    if packed.scale_steps is not None:
        scales = scales.float() * packed.scale_steps.unsqueeze(1)
    cast: torch.Tensor = scales.to(dtype)
    is_same = scales.is_meta or torch.equal(cast.to(scales.dtype).nan_to_num(), scales.nan_to_num())
    return cast if is_same else None
