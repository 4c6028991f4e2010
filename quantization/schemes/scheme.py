"""Scheme: how a weight matrix is stored in few bits, as one immutable value.

===========  ====  ===============================================  ==============================
grid         bits  a weight is                                      source
===========  ====  ===============================================  ==============================
``integer``  1..8  ``code * scale`` or ``(code - zero) * scale``    B. Jacob et al. (2018)
``nf4``      4     one of 16 normal quantiles ``* scale``           QLoRA, T. Dettmers (2023)
``fp4``      4     one of 15 floats ``* scale``                     bitsandbytes
``mxfp4``    4     an E2M1 float ``* 2**exponent``, groups of 32    OCP MX formats 1.0 (2023)
``kmeans``   1..8  one of ``2**bits`` fitted levels ``* scale``     Deep Compression, S. Han (2016)
``binary``   1     ``-scale`` or ``scale``                          XNOR-Net, M. Rastegari (2016)
``ternary``  2     ``-scale``, 0 or ``scale`` (1.6 bits stored)     TWN, F. Li (2016)
``table``    1..8  one of ``2**bits`` levels given ``* scale``      :func:`register_grid`
===========  ====  ===============================================  ==============================

What is stored where is written at the head of :mod:`quantization.schemes.packed_weights`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Self

from quantization.numerics.granularity import Granularity, PerDimension, PerGroup
from quantization.numerics.parameters import Mode
from quantization.ops.dtypes import SOURCES, index_of, source_of
from quantization.schemes.checks import (
    MX_GROUP,
    PER_ROW,
    along_rows,
    check_scheme,
    checked_levels,
    checked_shape,
)
from quantization.schemes.names import fields_from, name_of_scheme, parse_name, plain_of

__all__ = ["Buffer", "Scheme", "scheme_of"]

TERNARY_CODES = 5  # in a byte


class Buffer(NamedTuple):
    """Shape and type of one tensor of a packed matrix."""

    shape: tuple[int, int] | tuple[int]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        size = {"uint8": 1, "int8": 1, "int32": 4}.get(self.dtype) or SOURCES[self.dtype].itemsize
        return math.prod(self.shape) * size


@dataclass(frozen=True, repr=False)
class Scheme:
    """How a weight matrix is stored: an immutable, hashable value that works in ``match``.

    Attributes:
        bits: width of a stored code: 1..8 for the grids ``integer`` (symmetric: 2..8) and
            ``kmeans``, 4 for ``nf4``, ``fp4`` and ``mxfp4``, 1 for ``binary``, 2 for ``ternary``
            (of which five share a byte).
        granularity: which weights share a scale: PerTensor, PerDimension(1), one a row of the
            matrix, or PerGroup(by, 1), whose last group may be shorter. For ``kmeans`` it also
            says who shares a codebook: a row has its own under PerDimension(1), else there is one.
        mode: Symmetric; Asymmetric, with zero points, for the grid ``integer`` only.
        grid: what numbers a code may stand for; the table at the head of the module.
        zero_point: ``"integer"``: a whole code, so that the weight 0 stays exact; ``"float"``: not
            rounded, so that the range of the weights is met; ``"fixed"``: between codes too, in 8
            bits of fixed point, for double quantization. Read in mode Asymmetric only.
        scale_dtype: name of the type of the scales; None: the type of the weights. ``mxfp4``
            scales are exponents (uint8) and double quantized ones codes (uint8): None there.
        double_quant: whether the scales of a row of groups are uint8 codes under one step: float32,
            or bfloat16 beside fixed zero points.
        input_order: whether the columns are stored in an order of their own, so that a group need
            not be neighbours (GPTQ's act-order). What is quantized here keeps the order it has.
        input_scale: whether each column has a multiplier (SINQ, AWQ): inputs are multiplied by it,
            and codes stand for the column divided by it. Rounding to nearest leaves it at 1.
        levels: of the grid ``table``, one a code; None for the others.

    Raises:
        TypeError: for a field of the wrong type.
        ValueError: for fields that do not go together; the message says which do.

    Source: the table at the head of the module; double quantization: QLoRA, T. Dettmers (2023).

    Example:
        >>> scheme = Scheme(bits=4, granularity=Granularity.PerGroup(64), mode=Mode.Asymmetric)
        >>> scheme
        Scheme(bits=4, granularity=Granularity.PerGroup(by=64, dim=1), mode=Mode.Asymmetric)
        >>> str(scheme), Scheme.parse("w4g64a") == scheme
        ('w4g64a', True)
        >>> match Scheme.nf4():
        ...     case Scheme(grid="nf4", granularity=Granularity.PerGroup(by)):
        ...         print("normal floats in groups of", by)
        normal floats in groups of 64
        >>> Scheme(bits=3, grid="nf4")
        Traceback (most recent call last):
        ...
        ValueError: grid 'nf4' has codes of 4 bits, not bits=3
    """

    bits: int
    granularity: Granularity = PER_ROW
    mode: Mode = Mode.Symmetric
    grid: str = "integer"
    zero_point: str = "integer"
    scale_dtype: str | None = None
    double_quant: bool = False
    input_order: bool = False
    input_scale: bool = False
    levels: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", index_of(self.bits, "bits"))
        object.__setattr__(self, "granularity", along_rows(self.granularity))
        if self.scale_dtype is not None:
            object.__setattr__(self, "scale_dtype", source_of(self.scale_dtype, "a scale").name)
        object.__setattr__(self, "levels", checked_levels(self.levels))
        check_scheme(self)

    # ---- constructors ------------------------------------------------------------------------

    @classmethod
    def int8(cls) -> Self:
        """Codes -127..127 and one scale a row: the scheme of the int8 layer.

        Example:
            >>> Scheme.int8()
            Scheme(bits=8)
        """
        return cls(8)

    @classmethod
    def nf4(cls, group: int | None = 64) -> Self:
        """The 4-bit NormalFloat of QLoRA, by default in groups of 64; None: one scale a row.

        Example:
            >>> str(Scheme.nf4())
            'nf4g64'
        """
        return cls(4, _groups_of(group), grid="nf4")

    @classmethod
    def fp4(cls, group: int | None = 64) -> Self:
        """The 4-bit float of bitsandbytes, by default in groups of 64; None: one scale a row.

        Example:
            >>> str(Scheme.fp4(group=128))
            'fp4g128'
        """
        return cls(4, _groups_of(group), grid="fp4")

    @classmethod
    def mxfp4(cls) -> Self:
        """The 4-bit float of the OCP MX specification: groups of 32, scales powers of two.

        Example:
            >>> Scheme.mxfp4().bits_per_weight((64, 64))  # 4 + 8 / 32, and the table of 16 levels
            4.375
        """
        return cls(4, PerGroup(MX_GROUP), grid="mxfp4")

    @classmethod
    def kmeans(cls, bits: int, per_row: bool = False) -> Self:
        """``2**bits`` levels fitted to the weights: one codebook, or one a row.

        Example:
            >>> str(Scheme.kmeans(3)), str(Scheme.kmeans(3, per_row=True))
            ('kmeans3', 'kmeans3r')
        """
        return cls(bits, PER_ROW if per_row else Granularity.PerTensor, grid="kmeans")

    @classmethod
    def binary(cls, group: int | None = None) -> Self:
        """One bit a weight, the sign of one scale a group; None: a row.

        Example:
            >>> str(Scheme.binary(group=32))
            'binaryg32'
        """
        return cls(1, _groups_of(group), grid="binary")

    @classmethod
    def ternary(cls, group: int | None = None) -> Self:
        """-1, 0 or 1 times one scale a group; None: a row. Five weights share a byte.

        Example:
            >>> Scheme.ternary().row_bytes(10)
            2
        """
        return cls(2, _groups_of(group), grid="ternary")

    # ---- names and plain values --------------------------------------------------------------

    @classmethod
    def parse(cls, text: str) -> Self:
        """The scheme of a short name, as ``str(scheme)`` gives it.

        ``w<bits>``, ``nf4``, ``fp4``, ``mxfp4``, ``kmeans<bits>``, ``binary``, ``ternary`` or
        ``int8``; then ``g<size>`` for groups, ``r`` for rows or ``t`` for the tensor (left out:
        rows, groups of 64 for ``nf4`` and ``fp4``, the tensor for ``kmeans``); then ``a`` for
        asymmetric, ``af`` with float zero points, ``s`` or nothing for symmetric; then options:
        ``+dq``, double quantization (``af+dq``: of zero points too, 8 bits in fixed point;
        ``af+dqs``: of the scales alone), ``+f32``, ``+f64``, ``+f16`` or ``+bf16``, the type of the
        scales, ``+order``, columns in an order of their own, and ``+cols``, a multiplier a column.

        Raises:
            TypeError: if ``text`` is no string.
            ValueError: if it names no scheme; the message says why.

        Example:
            >>> Scheme.parse("w3g128s")
            Scheme(bits=3, granularity=Granularity.PerGroup(by=128, dim=1))
            >>> Scheme.parse("nf4+dq") == Scheme(4, Granularity.PerGroup(64), grid="nf4",
            ...                                  double_quant=True)
            True
        """
        return cls(**parse_name(text))

    def __str__(self) -> str:
        return name_of_scheme(self)

    def __repr__(self) -> str:
        given = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if getattr(self, field.name) != field.default
        ]
        return f"Scheme({', '.join(given)})"

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values (numbers, strings, None), fit for JSON.

        ``input_order``, ``input_scale`` and ``levels`` are there only where they say something:
        readers that do not know them read the rest.

        Example:
            >>> Scheme.nf4().to_dict()["granularity"]
            {'kind': 'group', 'by': 64}
        """
        return plain_of({field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """The scheme that :meth:`to_dict` wrote; fields that are not there have their defaults.

        Raises:
            TypeError: if ``plain`` is no mapping, or a value has the wrong type.
            ValueError: for an unknown field or value, or fields that do not go together.

        Example:
            >>> Scheme.from_dict(Scheme.ternary(group=128).to_dict()) == Scheme.ternary(group=128)
            True
        """
        return cls(**fields_from(plain, [field.name for field in fields(cls)]))

    # ---- sizes -------------------------------------------------------------------------------

    def group(self, in_features: int) -> int:
        """Weights of a row of that length that share a scale, at least 1.

        Example:
            >>> Scheme.nf4().group(576), Scheme.int8().group(576)
            (64, 576)
        """
        length = max(in_features, 1)
        if isinstance(self.granularity, PerGroup):
            return min(self.granularity.by, length)
        return length

    def groups(self, in_features: int) -> int:
        """Scales of a row of that length: ``ceil(in_features / group)``; without groups 1.

        Example:
            >>> Scheme.nf4().groups(100)
            2
        """
        return -(-in_features // self.group(in_features)) if self.is_grouped else 1

    def row_bytes(self, in_features: int) -> int:
        """Bytes of the packed codes of one row.

        Example:
            >>> Scheme.parse("w3").row_bytes(10)
            4
        """
        if self.grid == "ternary":
            return -(-in_features // TERNARY_CODES)
        return -(-in_features * self.bits // 8)

    def kernel_numbers(self, in_features: int) -> tuple[int, int, int, int]:
        """What decides about the kernel: bits (0: base 3), group, kind of zeros, a codebook or not.

        Example:
            >>> Scheme.parse("w4g64a").kernel_numbers(1000)
            (4, 64, 1, 0)
        """
        bits = 0 if self.grid == "ternary" else self.bits
        zeros = 0
        if self.mode is Mode.Asymmetric:
            zeros = 1 if self.zero_point == "integer" else 2
        return bits, self.group(in_features), zeros, int(self.has_codebook)

    @property
    def is_grouped(self) -> bool:
        """Whether a row may have several scales."""
        return isinstance(self.granularity, PerGroup)

    @property
    def steps_dtype(self) -> str:
        """Type of the steps of double quantization."""
        return "bfloat16" if self.zero_point == "fixed" else "float32"

    @property
    def has_integer_zeros(self) -> bool:
        """Whether zero points are whole codes, packed as codes are."""
        return self.mode is Mode.Asymmetric and self.zero_point == "integer"

    @property
    def has_codebook(self) -> bool:
        """Whether codes are places in a table of levels."""
        return self.grid not in ("integer", "ternary")

    def buffers(self, shape: tuple[int, int], dtype: Any = "float32") -> dict[str, Buffer]:
        """Shape and type of each tensor that a packed matrix of that shape has.

        Args:
            shape: ``(out_features, in_features)`` of the matrix.
            dtype: of its weights: float32, float64, float16 or bfloat16.

        Example:
            >>> for name, buffer in Scheme.parse("w4g64a").buffers((8, 100), "bfloat16").items():
            ...     print(name, buffer.shape, buffer.dtype)
            packed_weights (8, 50) uint8
            scales (8, 2) bfloat16
            zero_points (8, 1) uint8
        """
        rows, cols = checked_shape(shape)
        layer, groups = source_of(dtype, "a packed matrix").name, self.groups(cols)
        has_small_scales = self.double_quant or self.grid == "mxfp4"
        scale_dtype = "uint8" if has_small_scales else self.scale_dtype or layer
        made = {
            "packed_weights": Buffer((rows, self.row_bytes(cols)), "uint8"),
            "scales": Buffer((rows, groups), scale_dtype),
        }
        if self.double_quant:
            made["scale_steps"] = Buffer((rows,), self.steps_dtype)
        if self.mode is Mode.Asymmetric and self.zero_point == "fixed":
            made["zero_points"] = Buffer((rows, groups), "int8")
        elif self.mode is Mode.Asymmetric and self.zero_point == "float":
            made["zero_points"] = Buffer((rows, groups), layer)
        elif self.mode is Mode.Asymmetric:
            made["zero_points"] = Buffer((rows, -(-groups * self.bits // 8)), "uint8")
        if self.input_order:
            made["input_order"] = Buffer((cols,), "int32")
        if self.input_scale:
            made["input_scale"] = Buffer((cols,), layer)
        if self.has_codebook:
            per_row = self.grid == "kmeans" and isinstance(self.granularity, PerDimension)
            made["codebook"] = Buffer((rows if per_row else 1, 2**self.bits), layer)
        return made

    def nbytes(self, shape: tuple[int, int], dtype: Any = "float32") -> int:
        """Bytes of a packed matrix of that shape, all its tensors together.

        Example:
            >>> Scheme.parse("w4g64a").nbytes((8, 128), "bfloat16")  # codes, scales, zero points
            552
        """
        return sum(buffer.nbytes for buffer in self.buffers(shape, dtype).values())

    def bits_per_weight(self, shape: tuple[int, int], dtype: Any = "float32") -> float:
        """Bits that a weight of such a matrix takes, all tensors counted; NaN for no weights.

        Example:
            >>> Scheme.parse("w4g64").bits_per_weight((8, 128), "bfloat16")
            4.25
        """
        count = math.prod(checked_shape(shape))
        return 8 * self.nbytes(shape, dtype) / count if count else math.nan


def scheme_of(value: Any) -> Scheme:
    """A Scheme, given as such or by its short name.

    Raises:
        TypeError, ValueError: if it is neither.
    """
    if isinstance(value, str):
        return Scheme.parse(value)
    if not isinstance(value, Scheme):
        raise TypeError(f"scheme must be a Scheme or its short name, not {value!r:.60}")
    return value


def _groups_of(group: int | None) -> Granularity:
    return PER_ROW if group is None else PerGroup(group)
