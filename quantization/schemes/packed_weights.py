"""A weight matrix in few bits: packed codes, scales, and what else leads back to its numbers.

Weight k of row n, computed in float32, with ``g = k // group``::

    w[n, k] = (v[code] - z[n, g]) * s[n, g]

Where there is an ``input_order``, that is column ``input_order[k]`` of the matrix, and not ``k``.
Where there is an ``input_scale``, it is multiplied by ``input_scale[k]``, in float32 and once more.

``v[code]`` is ``codebook[code]`` where there is a codebook; else the code itself, unsigned where
there are zero points, in two's complement where there are none. ``z`` is 0 without zero points.

``packed_weights`` uint8 ``[out, row bytes]``
    Codes of ``bits`` bits, the first in the lowest bits, each row starting on a byte: the layout
    ``dense`` of :func:`quantization.pack_weights` along dim 1. Ternary: its layout ``base3``, five
    codes a byte.
``scales`` ``[out, groups]``, ``groups = ceil(in / group)``
    Floats; or uint8 codes under ``scale_steps`` float32 ``[out]``, ``s = code * step`` (double
    quantization; bfloat16 beside fixed zero points); or, in the grid ``mxfp4``, uint8 exponents,
    ``s = 2**(u - 127)``, 255 for NaN.
    Without groups there is one a row; one for the whole matrix is repeated.
``zero_points``, in mode Asymmetric
    Integers of ``bits`` bits, packed as the codes are, uint8 ``[out, ceil(groups * bits / 8)]``; or
    floats ``[out, groups]``; or fixed point, int8 ``[out, groups]``, ``z = (i + 128) * 2**(bits -
    8)``.
``codebook``, for the grids that have one
    Levels ``[1, 2**bits]``, or ``[out, 2**bits]`` where each row has its own.
``input_order``, for schemes that have one
    int32 ``[in]``: which column of the matrix each stored one is, every column once.
``input_scale``, for schemes that have one
    Floats ``[in]``, one a stored column: what its numbers, or else its inputs, are multiplied by.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from quantization.numerics.granularity import PerGroup
from quantization.numerics.linear_quantization import dequantize_linear
from quantization.numerics.parameters import Mode, QuantizationParameters
from quantization.numerics.rules import rule_for, source_type
from quantization.numerics.weight_packing import pack_weights, unpack_weights
from quantization.ops import native
from quantization.ops.dtypes import name_of, source_of
from quantization.ops.native import Tensor
from quantization.schemes.checks import check_part, checked_shape
from quantization.schemes.column_order import (
    COLUMN_PARTS,
    checked_importance,
    column_parts,
    times_columns,
)
from quantization.schemes.grids import WEIGHED, Coded, Matrix, encode_matrix
from quantization.schemes.scheme import Scheme, scheme_of
from quantization.schemes.stored_scales import restore, restore_zeros

__all__ = ["OPERANDS", "PARTS", "PackedWeights", "layout_of", "pack_matrix"]

#: The tensors that the operators take, in their order.
OPERANDS = ("packed_weights", "scales", "scale_steps", "zero_points", "codebook")
#: The tensors of a packed matrix.
PARTS = OPERANDS + COLUMN_PARTS


@dataclass(frozen=True, eq=False, repr=False)
class PackedWeights:
    """The tensors of a packed matrix; the head of the module says what each holds.

    Attributes:
        scheme: how the matrix is stored.
        shape: ``(out_features, in_features)``.
        packed_weights: uint8 ``[out, row bytes]``.
        scales: floats or uint8, ``[out, groups]``.
        scale_steps: float32 ``[out]``, or None.
        zero_points: uint8, int8 or floats, or None.
        codebook: floats, or None.
        dtype: type of the weights, a torch dtype, NumPy dtype or name; None: that of the scales,
            or of the other floats where scales are codes, else float32. Kept as its name.
        input_order: int32 ``[in]``, or None.
        input_scale: floats ``[in]``, or None.

    All tensors are of one kind, torch or NumPy, and on one device; meta tensors will do.

    Raises:
        TypeError: if a tensor has a type that it cannot have.
        ValueError: if a tensor is missing, is one too many or has another shape than scheme and
            shape give it.

    Example:
        >>> import numpy as np
        >>> packed = pack_matrix(np.array([[-3.5, 2.0, 1.0]], "float32"), Scheme(bits=4))
        >>> packed
        PackedWeights(Scheme(bits=4), (1, 3), float32, 6 bytes)
        >>> packed.packed_weights, packed.scales.shape
        (array([[72,  2]], dtype=uint8), (1, 1))
    """

    scheme: Scheme
    shape: tuple[int, int]
    packed_weights: Any  # these are tensors, all of one kind
    scales: Any
    scale_steps: Any = None
    zero_points: Any = None
    codebook: Any = None
    dtype: Any = None
    input_order: Any = None
    input_scale: Any = None

    __hash__ = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        object.__setattr__(self, "scheme", scheme_of(self.scheme))
        object.__setattr__(self, "shape", checked_shape(self.shape))
        given = {name: getattr(self, name) for name in PARTS if getattr(self, name) is not None}
        needed = self.scheme.buffers(self.shape)
        for name in (*needed, *given):
            if (name in needed) != (name in given):
                verb = "needs" if name in needed else "has no"
                raise ValueError(f"scheme {self.scheme} {verb} {name}")
        for name, buffer in needed.items():
            check_part(name, given[name], buffer.shape, buffer.dtype)
        object.__setattr__(self, "dtype", self._settled_dtype())

    def _settled_dtype(self) -> str:
        if self.dtype is not None:
            return source_of(self.dtype, "a packed matrix").name
        for tensor in (self.scales, self.codebook, self.input_scale):
            if tensor is not None and name_of(tensor.dtype) != "uint8":
                return name_of(tensor.dtype)
        return "float32"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together.

        Example:
            >>> import numpy as np
            >>> pack_matrix(np.ones((8, 128), "float32"), Scheme.int8()).nbytes
            1056
        """
        tensors = (getattr(self, name) for name in PARTS)
        return sum(int(tensor.nbytes) for tensor in tensors if tensor is not None)

    @property
    def bits_per_weight(self) -> float:
        """Bits that a weight takes, all tensors counted; NaN for no weights.

        Example:
            >>> import numpy as np
            >>> pack_matrix(np.ones((8, 128), "float32"), Scheme.int8()).bits_per_weight
            8.25
        """
        count = self.shape[0] * self.shape[1]
        return 8 * self.nbytes / count if count else float("nan")

    def dequantize(self, dtype: Any = None) -> Any:
        """The numbers that the codes stand for, computed in float32 and rounded once.

        Args:
            dtype: of the result: float32, float64, float16 or bfloat16; None: :attr:`dtype`.

        Returns:
            ``[out, in]``, of the kind and on the device of the packed codes. A number beyond the
            largest of ``dtype`` becomes that one, not infinity.

        Raises:
            TypeError: for another dtype.

        Source: the formula at the head of the module.

        Example:
            >>> import numpy as np
            >>> pack_matrix(np.array([[-127.0, 3.2, 64.0]], "float32"), Scheme.int8()).dequantize()
            array([[-127.,    3.,   64.]], dtype=float32)
        """
        out = source_of(self.dtype if dtype is None else dtype, "the matrix to restore").name
        if native.is_meta(self.packed_weights) or 0 in self.shape:
            return native.filled(self.shape, 0, out, self.packed_weights)
        wide = "float32" if out == "float64" or self.input_scale is not None else out
        zero = self.integer_zero_points()
        params = QuantizationParameters(
            native.as_tensor_like(
                restore(self.scales, self.scale_steps), "float32", self.packed_weights
            ),
            zero,
            Mode.Symmetric if zero is None else Mode.Asymmetric,
            PerGroup(self.scheme.group(self.shape[1])),
            dtype=wide,
        )
        stored = dequantize_linear(self._values(), params)
        return self._in_order(times_columns(stored, self.input_scale, out))

    def rows(self, start: int, stop: int) -> PackedWeights:
        """Some rows of the matrix, as views of its tensors; what all rows share stays whole.

        Example:
            >>> import numpy as np
            >>> pack_matrix(np.eye(4, dtype="float32"), "w4").rows(2, 4).dequantize().argmax(1)
            array([2, 3])
        """
        parts = {name: getattr(self, name) for name in PARTS}
        for name, tensor in parts.items():
            is_of_rows = name not in COLUMN_PARTS and tensor is not None
            if is_of_rows and tensor.shape[0] == self.shape[0]:  # one codebook may be for all
                parts[name] = tensor[start:stop]
        return replace(self, shape=(stop - start, self.shape[1]), **parts)

    @property
    def codes(self) -> Any:
        """One code a weight, ``[out, in]``: int8 where they are signed, else uint8.

        Example:
            >>> import numpy as np
            >>> pack_matrix(np.array([[-3.5, 2.0, 1.0]], "float32"), Scheme(bits=4)).codes
            array([[-8,  4,  2]], dtype=int8)
        """
        is_signed = self.scheme.mode is Mode.Symmetric and not self.scheme.has_codebook
        dtype = "int8" if is_signed else "uint8"
        if native.is_meta(self.packed_weights):
            return native.filled(self.shape, 0, dtype, self.packed_weights)
        return self._in_order(self._stored_codes(dtype))

    def _stored_codes(self, dtype: str) -> Any:
        return unpack_weights(
            self.packed_weights,
            self.scheme.bits,
            dtype=dtype,
            layout=layout_of(self.scheme),
            dim=1,
            size=self.shape[1],
        )

    def _values(self) -> Any:
        """What scales multiply, after integer zero points: codes, levels or codes less zeros."""
        is_signed = self.scheme.mode is Mode.Symmetric and not self.scheme.has_codebook
        codes = self._stored_codes("int8" if is_signed else "uint8")
        if self.codebook is not None:
            book = native.to_array(native.cast(self.codebook, "float32"))
            places = native.to_array(codes)
            if book.shape[0] > 1:  # the codebooks as one, a row's places behind the row before
                places = places + np.arange(0, book.size, book.shape[1], dtype=np.int32)[:, None]
            levels = book.reshape(-1)[places]
        elif self.zero_points is not None and not self.scheme.has_integer_zeros:
            zero = restore_zeros(self.zero_points, self.scheme.bits)
            wide = np.repeat(zero, self.scheme.group(self.shape[1]), axis=1)
            levels = native.to_array(codes) - wide[:, : self.shape[1]]
        else:
            return codes
        return native.as_tensor_like(levels, "float32", codes)

    def _in_order(self, stored: Any) -> Any:
        """Numbers of stored columns ``[out, in]``, each where its column is."""
        return stored if self.input_order is None else stored[:, self.input_order.argsort()]

    def integer_zero_points(self) -> Any:
        """Zero points that are whole codes, int32 ``[out, groups]``; None where there are none.

        Example:
            >>> import numpy as np
            >>> pack_matrix(np.array([[-1.0, 2.0]], "float32"), "w2a").integer_zero_points()
            array([[1]], dtype=int32)
        """
        if not self.scheme.has_integer_zeros:
            return None
        groups = self.scheme.groups(self.shape[1])
        zero = unpack_weights(
            self.zero_points, self.scheme.bits, layout="dense", dim=1, size=groups
        )
        return native.cast(zero, "int32")

    def __repr__(self) -> str:
        return f"PackedWeights({self.scheme!r}, {self.shape}, {self.dtype}, {self.nbytes:,} bytes)"


def pack_matrix(
    weight: Tensor,
    scheme: Scheme | str,
    *,
    importance: Tensor | None = None,
    nonfinite: str = "raise",
    name: str = "weight",
) -> PackedWeights:
    """Quantize a matrix under a scheme, and pack its codes.

    Scales are rounded to their stored type before any code is made, and codes are made for the
    numbers that :meth:`PackedWeights.dequantize` gives back.

    Integers are those of :func:`quantization.quantize_linear`; symmetric ones use the full range of
    their width, but -127..127 in 8 bits, as the int8 layer does. Float zero points are those of the
    asymmetric rule before they are rounded. For ``nf4``, ``fp4`` and ``kmeans`` the scale is the
    largest magnitude of the group, and the nearest level is taken, of two that are as near the
    lower code; the levels of ``kmeans`` are those of least squared error. ``mxfp4``: see
    :func:`quantization.schemes.stored_scales.as_exponents`. ``binary``: the scale is the mean
    magnitude. ``ternary``: scale and threshold of least squared error. Of these a group of zeros
    has the scale 0 (``mxfp4``: 1), and so has every such group under double quantization.

    Args:
        weight: ``[out, in]``, float32, float64, float16 or bfloat16, a torch tensor (also on meta:
            only shapes are made) or an ndarray. Either size may be 0. It is only read.
        scheme: a :class:`quantization.Scheme`, or its short name.
        importance: ``[in]``, not negative: how much the squared error of each column counts, such
            as the mean square of that input. For the grids ``kmeans``, ``binary`` and ``ternary``;
            where a group (``kmeans``: a codebook) has no importance at all, all its weights count.
        nonfinite: ``"raise"`` refuses a NaN or infinity; ``"mark"`` gives its group the scale NaN,
            so that just this group dequantizes to NaN (under double quantization: its row).
        name: what error messages call the matrix.

    Raises:
        TypeError: for a weight or scheme of the wrong type.
        ValueError: for another number of dimensions, a NaN or infinity (named with its index),
            scales beyond their type, or importance that does not fit.

    Source: the table at the head of :mod:`quantization.schemes.scheme`.

    Example:
        >>> import torch
        >>> weight = torch.linspace(-1, 1, 200).view(2, 100)
        >>> packed = pack_matrix(weight, "w4g64a")
        >>> packed.scales.shape, packed.packed_weights.shape
        (torch.Size([2, 2]), torch.Size([2, 50]))
        >>> bool((packed.dequantize() - weight).abs().max() <= packed.scales.max() / 2)
        True
    """
    scheme = scheme_of(scheme)
    if importance is not None and scheme.grid not in WEIGHED:
        raise ValueError(
            f"scheme {scheme} makes no choice that importance could weigh, only the grids "
            f"{', '.join(WEIGHED)} do: leave it out, or use a method that fits scales, such as lsq"
        )
    matrix = open_matrix(weight, scheme, importance, nonfinite, name)
    if matrix.is_blank:
        return blank(weight, scheme)
    return packed_of_codes(encode_matrix(matrix), matrix)


def open_matrix(
    weight: Tensor,
    scheme: Scheme,
    importance: Tensor | None = None,
    nonfinite: str = "raise",
    name: str = "weight",
) -> Matrix:
    """A weight matrix and how it is to be coded, checked.

    Raises:
        TypeError, ValueError: as :func:`pack_matrix` raises them, but for numbers not finite.
    """
    source = source_type(weight, name)
    if weight.ndim != 2:
        raise ValueError(
            f"{name} has shape {tuple(weight.shape)}; expected [out_features, in_features]"
        )
    rule_for(source, "int8", Mode.Symmetric, None, scheme.scale_dtype, nonfinite)  # or raise
    weights = checked_importance(importance, weight.shape[1])
    return Matrix(weight, source, scheme, weights, nonfinite, name)


def packed_of_codes(coded: Coded, matrix: Matrix) -> PackedWeights:
    """A matrix packed: its codes and what decodes them; what all rows share is repeated."""
    scheme, shape = matrix.scheme, tuple(matrix.weight.shape)
    zero = None if coded.zero_points is None else _for_each_row(coded.zero_points, shape[0])
    if zero is not None and name_of(zero.dtype) == "uint8":
        zero = pack_weights(zero, scheme.bits, layout="dense", dim=1)
    return PackedWeights(
        scheme,
        shape,
        pack_weights(coded.codes, scheme.bits, layout=layout_of(scheme), dim=1),
        _for_each_row(coded.scales.scales, shape[0]),
        coded.scales.steps,
        zero,
        coded.codebook,
        matrix.source.name,
        **column_parts(coded.codes, scheme, matrix.source.name),
    )


def layout_of(scheme: Scheme) -> str:
    """The layout of :func:`quantization.pack_weights`, along dim 1, that codes are packed in."""
    return "base3" if scheme.grid == "ternary" else "dense"


def _for_each_row(values: Tensor, rows: int) -> Tensor:
    if values.shape[0] == rows:
        return values
    return values.repeat(rows, 1) if native.is_torch(values) else np.repeat(values, rows, axis=0)


def blank(weight: Tensor, scheme: Scheme) -> PackedWeights:
    """What a matrix without numbers packs to: zeros, or shapes only."""
    shape, dtype = tuple(weight.shape), name_of(weight.dtype)
    parts = {
        name: native.filled(buffer.shape, int(name == "scales"), buffer.dtype, weight)
        for name, buffer in scheme.buffers(shape, dtype).items()
    }
    parts |= column_parts(weight, scheme, dtype)
    return PackedWeights(scheme, shape, **parts, dtype=dtype)
