"""Linear quantization: numbers to codes on an evenly spaced grid, and back.

=====================  ==========================================  ===========================
what                   scale                                       code
=====================  ==========================================  ===========================
integers, symmetric    ``max|x| / ((code_max - code_min) / 2)``    ``rint(x / scale)``
unsigned, symmetric    ``max|x| / code_max`` (no negative x)       ``rint(x / scale)``
integers, asymmetric   ``(high - low) / (code_max - code_min)``    ``rint(x / scale) + zero``
``int1``, binary       ``mean|x|``                                 ``x >= 0 ? +1 : -1``
floats, symmetric      ``max|x| / largest number of the type``     ``x / scale``, rounded
=====================  ==========================================  ===========================

Here ``low = min(min x, 0)``, ``high = max(max x, 0)``, ``zero = rint(code_min - low / scale)``,
all taken over a block (see :mod:`quantization.numerics.granularity`); codes are clamped to
``code_min..code_max``. ``rint`` rounds half to even, ``/`` is a true division, and the arithmetic
is done in float32 (float64 for a float64 tensor), so codes equal those of the same expression in
torch bit for bit. A block of zeros has scale 1 (binary: 0); there is no floor below which a scale
cannot go, so tiny blocks keep their precision. ``x = (code - zero) * scale`` leads back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from quantization.forks import alone
from quantization.numerics.granularity import PER_ROWS, Granularity
from quantization.numerics.parameters import Mode, QuantizationParameters, check_granularity
from quantization.numerics.rules import (
    check_fit,
    code_type,
    data_error,
    rule_for,
    source_type,
)
from quantization.ops import native
from quantization.ops.dtypes import DType, dtype_of, source_of
from quantization.ops.native import DataError, Rule, Tensor, TensorT, check_tensor

__all__ = [
    "dequantize_linear",
    "get_info",
    "get_scale_and_zero_for",
    "group",
    "per_dim_scale_and_zero_for",
    "quantize_linear",
]


def quantize_linear(
    tensor: TensorT,
    data_type: Any,
    granularity: Granularity,
    mode: Mode = Mode.Symmetric,
    *,
    narrow_range: bool | None = None,
    scale_dtype: Any = None,
    nonfinite: str = "raise",
    name: str | None = None,
) -> tuple[TensorT, QuantizationParameters]:
    """Quantize a tensor: codes, and the scales and zero points that lead back to its numbers.

    The formulas stand at the head of :mod:`quantization.linear_quantizer`.

    Args:
        tensor: float32, float64, float16 or bfloat16, a torch tensor (also on meta) or an ndarray,
            of any shape and memory layout that ``granularity`` takes. It is only read.
        data_type: type of the codes: a torch dtype, NumPy dtype or name. ``"int2"``..``"int8"`` and
            ``"int1"`` (binary, -1 and +1) are stored as int8, ``"uint1"``..``"uint8"`` as uint8,
            ``"int16"`` and float types as themselves.
        granularity: which numbers share a scale.
        mode: symmetric (zero point 0), or asymmetric (an integer zero point; integer codes only).
        narrow_range: True: codes ``-max..max``; False: ``min..max`` of the type. None: narrow when
            symmetric, full when asymmetric. Only signed integers of 2 bits or more have the choice.
        scale_dtype: a float type that scales are rounded to before any code is made; None:
            float32, float64 for a float64 tensor.
        nonfinite: ``"raise"`` refuses a NaN or infinity; ``"mark"`` gives its block the scale NaN,
            so that just this block dequantizes to NaN.
        name: what error messages call the tensor.

    Returns:
        The codes, in the shape of ``tensor``, and their parameters: ``scale`` in the shape that
        ``granularity.scale_shape`` gives, ``zero_point`` int32 in the same shape. All are of the
        kind of ``tensor`` (torch tensors on its device, or ndarrays).

    Raises:
        TypeError: for a type that is not listed above, or an ndarray whose codes NumPy has no type
            for while ml_dtypes is not installed.
        ValueError: for a shape that ``granularity`` does not take, a mode or range that the codes
            do not have, a NaN or infinity (named with its index), negative numbers under symmetric
            unsigned codes, or scales beyond ``scale_dtype``.

    Source: B. Jacob et al. (2018) for the asymmetric form; R. Krishnamoorthi (2018) for the narrow
    range and scales per channel; M. Rastegari et al., "XNOR-Net" (2016), for binary codes;
    P. Micikevicius et al., "FP8 formats for deep learning" (2022), for float codes.

    Example:
        >>> import numpy as np
        >>> x = np.array([[-1.0, 0.5, 1.27], [0.0, 2.0, 4.0]], "float32")
        >>> q, params = quantize_linear(x, "int8", Granularity.PerDimension(dim=1))
        >>> q
        array([[-100,   50,  127],
               [   0,   64,  127]], dtype=int8)
        >>> params.scale.shape, params.scale.dtype
        ((2, 1), dtype('float32'))
        >>> q, params = quantize_linear(x, "uint4", Granularity.PerGroup(2), Mode.Asymmetric)
        >>> q
        array([[ 0, 15, 15],
               [ 0, 15, 15]], dtype=uint8)
        >>> params.zero_point
        array([[10,  0],
               [ 0,  0]], dtype=int32)
    """
    source = source_type(tensor, name)
    check_granularity(granularity)
    rule = rule_for(source, data_type, mode, narrow_range, scale_dtype, nonfinite)
    grid = granularity.grid(tuple(tensor.shape))
    if not _has_numbers(tensor):
        codes = native.filled(tuple(tensor.shape), 0, rule.target.storage, tensor)
        return codes, _parameters(tensor, None, None, rule, granularity, mode)
    try:
        codes, scale, zero = native.quantize(tensor, source, grid, rule)
    except DataError as error:
        raise data_error(error, tensor, rule.target, name) from None
    return codes, _parameters(tensor, scale, zero, rule, granularity, mode)


def dequantize_linear(q: TensorT, params: QuantizationParameters) -> TensorT:
    """The numbers that codes stand for: ``(q - zero_point) * scale``, rounded once.

    Args:
        q: codes as :func:`quantize_linear` gives them; a torch tensor or an ndarray.
        params: their parameters, of either kind.

    Returns:
        A tensor of the kind, device and shape of ``q`` and of type ``params.dtype`` (None: that of
        ``params.scale``). The arithmetic is float32, float64 where that type is float64. A product
        beyond the largest number of that type becomes that number, not infinity.

    Raises:
        TypeError: if ``q`` has a type that no codes have, or ``params`` holds no parameters.
        ValueError: if ``params`` does not fit the shape of ``q``, or symmetric parameters have a
            zero point that is not 0.

    Source: the inverse of :func:`quantize_linear`; B. Jacob et al. (2018), equation 1.

    Example:
        >>> import numpy as np
        >>> x = np.array([-63.5, 0.5, 20.2], "float16")
        >>> dequantize_linear(*quantize_linear(x, "int8", Granularity.PerTensor))
        array([-63.5,   0.5,  20. ], dtype=float16)
    """
    if not isinstance(params, QuantizationParameters):
        raise TypeError(
            f"params must be the QuantizationParameters that quantize_linear returned with q, not "
            f"{type(params).__name__}"
        )
    code, shape, zero = code_type(q), tuple(q.shape), params.zero_point
    check_fit(q, params)
    given = params.scale.dtype if params.dtype is None else params.dtype
    out = source_of(given, "the tensor to restore (params.dtype)")
    if not _has_numbers(q):
        return native.filled(shape, 0, out.storage, q)
    if params.mode is Mode.Symmetric:
        if zero is not None and np.any(native.to_array(zero, "zero_point")):
            raise ValueError("params are symmetric, but zero_point is not 0: use Mode.Asymmetric")
        zero = None
    numbers = native.decode(q, params.scale, zero, code, out, params.granularity.grid(shape))
    if not _may_overflow(params.scale, code, out):
        return numbers
    with alone():
        return numbers.clip(-out.max, out.max)


def get_scale_and_zero_for(
    tensor: TensorT, dtype: Any, mode: Mode, reduce_dim: int | None = None
) -> tuple[TensorT, TensorT]:
    """Scale and zero point that :func:`quantize_linear` would use; no codes are made.

    Args:
        tensor: as for :func:`quantize_linear`.
        dtype: type of the codes.
        mode: symmetric (narrow range) or asymmetric (full range).
        reduce_dim: the dimension to reduce over; None: all of them.

    Returns:
        ``(scale, zero_point)``: shape ``()``, or that of ``tensor`` with 1 in the place of
        ``reduce_dim``; float32 (float64 for a float64 tensor) and int32.

    Raises:
        TypeError, ValueError: as :func:`quantize_linear`.

    Source: as :func:`quantize_linear`.

    Example:
        >>> import numpy as np
        >>> x = np.array([[-127.0, 3.0], [1.0, 254.0]], "float32")
        >>> scale, zero_point = get_scale_and_zero_for(x, "int8", Mode.Symmetric)
        >>> float(scale), int(zero_point)
        (2.0, 0)
    """
    granularity = (
        Granularity.PerTensor if reduce_dim is None else Granularity.PerDimension(reduce_dim)
    )
    source = source_type(tensor)
    rule = rule_for(source, dtype, mode)
    grid = granularity.grid(tuple(tensor.shape))
    scale, zero = None, None
    if _has_numbers(tensor):
        try:
            scale, zero = native.measure(tensor, source, grid, rule)
        except DataError as error:
            raise data_error(error, tensor, rule.target, None) from None
    params = _parameters(tensor, scale, zero, rule, granularity, mode)
    return params.scale, params.zero_point


def per_dim_scale_and_zero_for(
    tensor: TensorT, dtype: Any, mode: Mode, reduce_dim: int = PER_ROWS
) -> tuple[TensorT, TensorT]:
    """:func:`get_scale_and_zero_for` along one dimension, by default one scale a row.

    Args:
        tensor: as for :func:`quantize_linear`.
        dtype: type of the codes.
        mode: symmetric (narrow range) or asymmetric (full range).
        reduce_dim: the dimension to reduce over: ``PER_ROWS`` (1), ``PER_COLUMNS`` (0), or any.

    Returns:
        ``(scale, zero_point)``: the shape of ``tensor`` with 1 in the place of ``reduce_dim``;
        float32 (float64 for a float64 tensor) and int32.

    Raises:
        TypeError, ValueError: as :func:`quantize_linear`.

    Source: as :func:`quantize_linear`.

    Example:
        >>> import numpy as np
        >>> x = np.array([[0.0, 255.0], [-51.0, 0.0]], "float32")
        >>> scale, zero_point = per_dim_scale_and_zero_for(x, "uint8", Mode.Asymmetric)
        >>> scale.tolist(), zero_point.tolist()
        ([[1.0], [0.20000000298023224]], [[0], [255]])
    """
    if reduce_dim is None:
        raise TypeError("reduce_dim must be an integer; get_scale_and_zero_for reduces over all")
    return get_scale_and_zero_for(tensor, dtype, mode, reduce_dim)


def group(tensor: TensorT, by: int) -> tuple[TensorT, Callable[[TensorT], TensorT]]:
    """Cut the rows of a tensor into groups, one below the other, and the way back.

    Args:
        tensor: ``[..., C]``, such as a matrix ``[R, C]``: any type, a torch tensor or an ndarray
            with a dimension at least.
        by: numbers in a group, at least 1; C must be a multiple of it.

    Returns:
        ``(groups, ungroup)``. ``groups`` is ``[numel / by, by]``, in the order of the tensor's
        numbers, and a view of ``tensor`` if its memory layout allows one. ``ungroup`` takes any
        tensor of that shape (of another type too) and gives one of the shape of ``tensor``:
        ``ungroup(groups)`` equals ``tensor``.

    Raises:
        TypeError: if ``tensor`` is neither, ``by`` is not an integer, or ``ungroup`` is given no
            tensor.
        ValueError: if ``tensor`` has no dimension, ``by`` is below 1, C is no multiple of ``by``,
            or ``ungroup`` is given another shape than that of ``groups``.

    Source: S. Shen et al., "Q-BERT" (2020).

    Example:
        >>> import numpy as np
        >>> groups, ungroup = group(np.arange(8).reshape(2, 4), 2)
        >>> groups
        array([[0, 1],
               [2, 3],
               [4, 5],
               [6, 7]])
        >>> ungroup(groups * 10)
        array([[ 0, 10, 20, 30],
               [40, 50, 60, 70]])
    """
    check_tensor(tensor, "tensor")
    by, shape = Granularity.PerGroup(by).by, tuple(tensor.shape)
    if not shape:
        raise ValueError("group cuts the last dimension, but this tensor has none: reshape it")
    if shape[-1] % by:
        raise ValueError(
            f"a row of a tensor of shape {shape} has {shape[-1]} numbers, no multiple of by={by}: "
            "pad the rows, or choose another by; Granularity.PerGroup takes a shorter last group"
        )
    grouped = math.prod(shape) // by, by

    def ungroup(groups: TensorT) -> TensorT:
        """The groups side by side again, in the shape of the tensor that was cut."""
        check_tensor(groups, "groups")
        if tuple(groups.shape) != grouped:
            raise ValueError(f"groups have shape {tuple(groups.shape)}; {grouped} is allowed")
        return groups.reshape(shape)

    return tensor.reshape(grouped), ungroup


def get_info(dtype: Any) -> DType:
    """What a number type is: its name, bits, smallest and largest number, and where it is stored.

    Args:
        dtype: a torch dtype, NumPy dtype or name of a type that codes or tensors may have.

    Raises:
        TypeError: for any other; the message lists the allowed ones.

    Source: two's complement for integers; P. Micikevicius et al. (2022) for float8.

    Example:
        >>> info = get_info("int4")
        >>> info.bits, info.min, info.max, info.storage
        (4, -8, 7, 'int8')
        >>> get_info("float8_e4m3fn").max
        448.0
    """
    return dtype_of(dtype)


def _has_numbers(tensor: Tensor) -> bool:
    return not native.is_meta(tensor) and 0 not in tensor.shape


def _may_overflow(scale: Tensor, code: DType, out: DType) -> bool:
    """Whether the code farthest from zero, half a step beyond the tensor, may leave ``out``."""
    reach = code.max if code.is_floating_point else code.max - code.min
    wide = out.name == "float64"
    scale = native.to_array(native.cast(scale, "float64" if wide else "float32"))
    bound = out.max / reach * (1 - 2**-20)  # in float32 the bound itself is rounded
    return bool(np.any(scale >= bound))


def _parameters(
    tensor: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    rule: Rule,
    granularity: Granularity,
    mode: Mode,
) -> QuantizationParameters:
    """What the kernels measured, in the shapes and types that were promised (None: nothing)."""
    shape = granularity.scale_shape(tuple(tensor.shape))
    if scale is None:
        scale = native.filled(shape, 1, rule.scale.storage, tensor)
    if zero is None:
        zero = native.filled(shape, 0, "int32", tensor)
    scale = native.cast(scale, rule.scale.name).reshape(shape)
    dtype = tensor.dtype
    if isinstance(dtype, np.dtype) and not dtype.isnative:
        dtype = dtype.newbyteorder("=")
    return QuantizationParameters.of_checked(scale, zero.reshape(shape), mode, granularity, dtype)
