"""What the arguments of a quantization mean to the kernels: checked, named, and turned into a Rule.

Each refusal says what was given, what is allowed and the remedy.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantization.numerics.parameters import (
    Mode,
    QuantizationParameters,
    check_mode,
    check_parameters,
)
from quantization.ops import native
from quantization.ops.dtypes import SOURCES, TARGETS, DType, name_of, source_of, target_of
from quantization.ops.native import DataError, Rule, Tensor, check_tensor

__all__ = ["check_fit", "code_type", "data_error", "rule_for", "source_type"]

_ZERO_POINTS = ("int32", "int16", "int8", "uint8")


def source_type(tensor: Any, name: str | None = None) -> DType:
    """Type of a tensor to be quantized; TypeError unless it is a float tensor or array."""
    check_tensor(tensor, name or "tensor")
    return source_of(tensor.dtype, name or "tensor")


def code_type(q: Any) -> DType:
    """Type of codes; TypeError if codes are never stored so."""
    check_tensor(q, "q")
    code = TARGETS.get(name_of(q.dtype))
    if code is None or code.storage != code.name:
        allowed = ", ".join(name for name, dtype in TARGETS.items() if dtype.storage == name)
        raise TypeError(
            f"q has dtype {name_of(q.dtype)}; codes are stored as {allowed}: pass q as "
            "quantize_linear returned it"
        )
    return code


def rule_for(
    source: DType,
    data_type: Any,
    mode: Mode,
    narrow_range: bool | None = None,
    scale_dtype: Any = None,
    nonfinite: str = "raise",
) -> Rule:
    """How numbers of type ``source`` become codes of ``data_type``."""
    target = target_of(data_type)
    check_mode(mode)
    if nonfinite not in ("raise", "mark"):
        raise ValueError(f"nonfinite must be 'raise' or 'mark', not {nonfinite!r}")
    low, high = _code_range(target, mode, narrow_range)
    return Rule(
        target,
        _kernel_mode(target, mode),
        low,
        high,
        _scale_type(source, scale_dtype),
        nonfinite == "mark",
    )


def _kernel_mode(target: DType, mode: Mode) -> int:
    if mode is Mode.Asymmetric:
        if target.is_floating_point:
            raise ValueError(
                f"{target} codes are symmetric: use Mode.Symmetric, or an integer type for a zero "
                "point"
            )
        if target.name == "int1":
            raise ValueError(
                "int1 codes are -1 and +1, which leaves no zero point: use Mode.Symmetric, or "
                "uint1 for Mode.Asymmetric"
            )
        return native.ASYMMETRIC
    return native.BINARY if target.name == "int1" else native.SYMMETRIC


def _code_range(target: DType, mode: Mode, narrow_range: bool | None) -> tuple[float, float]:
    if narrow_range is not None and not isinstance(narrow_range, bool | np.bool_):
        raise TypeError(f"narrow_range must be True, False or None, not {narrow_range!r}")
    if target.min == -target.max:  # float types and int1 have no number to leave out
        if narrow_range is not None:
            raise ValueError(
                f"{target} codes have one range, {target.min:g}..{target.max:g}: leave "
                "narrow_range out"
            )
        return target.min, target.max
    if not target.is_signed:
        if narrow_range:
            raise ValueError(
                f"{target} codes have one range, 0..{target.max}: leave narrow_range out, or use a "
                "signed type"
            )
        return target.min, target.max
    if narrow_range is None:
        narrow_range = mode is Mode.Symmetric
    return (-target.max if narrow_range else target.min), target.max


def _scale_type(source: DType, scale_dtype: Any) -> DType:
    """Type that scales are rounded to; the default is the type of the arithmetic."""
    compute = SOURCES["float64" if source.name == "float64" else "float32"]
    if scale_dtype is None:
        return compute
    scale = source_of(scale_dtype, "a scale (scale_dtype)")
    if scale.bits > compute.bits:
        raise TypeError(
            f"scale_dtype is {scale}, but scales of a {source} tensor are computed in {compute}: "
            f"leave scale_dtype out, or quantize a {scale} tensor"
        )
    return scale


def data_error(error: DataError, tensor: Tensor, target: DType, name: str | None) -> ValueError:
    """The kernels' complaint about one number, with the tensor's name, the index and a remedy."""
    index = tuple(int(at) for at in np.unravel_index(error.args[1], tuple(tensor.shape)))
    culprit = tensor.detach()[index] if native.is_torch(tensor) else tensor[index]
    found = f"{name or 'tensor'} has {float(culprit):g} at index {index}"
    if np.isfinite(float(culprit)):
        return ValueError(
            f"{found}, but symmetric {target} codes have no sign: use Mode.Asymmetric, or the "
            f"signed type {target.name[1:]}"
        )
    return ValueError(
        f"{found}, but only finite numbers can be quantized: repair the tensor, or let "
        "quantize_linear mark the block with nonfinite='mark'"
    )


def check_fit(q: Tensor, params: QuantizationParameters) -> None:
    """Raise unless parameters are whole, and their tensors of the shape that the codes need."""
    check_parameters(params)
    scale, zero, granularity = params.scale, params.zero_point, params.granularity
    check_tensor(scale, "params.scale")
    source_of(scale.dtype, "params.scale")
    needed = granularity.scale_shape(tuple(q.shape))
    _check_shape("scale", scale, needed, q, granularity)
    if zero is None and params.mode is Mode.Symmetric:
        return
    check_tensor(zero, "params.zero_point")
    if name_of(zero.dtype) not in _ZERO_POINTS:
        raise TypeError(
            f"params.zero_point has dtype {name_of(zero.dtype)}; allowed are "
            f"{', '.join(_ZERO_POINTS)}: convert it first"
        )
    _check_shape("zero_point", zero, needed, q, granularity)


def _check_shape(
    what: str, value: Tensor, needed: tuple[int, ...], q: Tensor, granularity: Any
) -> None:
    if tuple(value.shape) != needed:
        raise ValueError(
            f"params.{what} has shape {tuple(value.shape)}, but codes of shape {tuple(q.shape)} "
            f"under {granularity} need {needed}: pass the params that quantize_linear returned "
            "with these codes"
        )
