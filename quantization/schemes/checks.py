"""Which fields of a scheme go together: each refusal says what was given and what is allowed."""

from __future__ import annotations

import math
from typing import Any

from quantization.numerics.granularity import Granularity, PerDimension, PerGroup
from quantization.numerics.parameters import Mode, check_granularity, check_mode
from quantization.ops import native
from quantization.ops.dtypes import index_of, name_of, source_of
from quantization.schemes.column_order import COLUMN_PARTS

__all__ = [
    "MX_GROUP",
    "PER_ROW",
    "along_rows",
    "check_part",
    "check_scheme",
    "checked_levels",
    "checked_shape",
]

GRIDS = ("integer", "nf4", "fp4", "mxfp4", "kmeans", "binary", "ternary", "table")
ZERO_POINTS = ("integer", "float", "fixed")
MX_GROUP = 32
PER_ROW = PerDimension(1)

_WIDTHS = {"nf4": (4,), "fp4": (4,), "mxfp4": (4,), "binary": (1,), "ternary": (2,)}
_ANY_WIDTH = tuple(range(1, 9))


def check_scheme(scheme: Any) -> None:
    """Raise unless grid, bits, mode, zero point, granularity and scales of a Scheme agree."""
    if scheme.grid not in GRIDS:
        raise ValueError(f"grid must be one of {', '.join(GRIDS)}, not {scheme.grid!r}")
    _check_mode(scheme)
    _check_bits(scheme)
    _check_granularity(scheme)
    _check_scales(scheme)
    _check_columns(scheme)
    _check_levels(scheme)


def along_rows(granularity: Any) -> Granularity:
    """The granularity with dim 1 for -1; raise unless its scales lie along the rows."""
    check_granularity(granularity)
    match granularity:
        case PerGroup(by, 1 | -1):
            return PerGroup(by)
        case PerDimension(1 | -1):
            return PER_ROW
    if granularity is Granularity.PerTensor:
        return granularity
    raise ValueError(
        f"a packed matrix has its scales along the rows: PerTensor, PerDimension(1) or "
        f"PerGroup(by, 1), not {granularity}; quantize_linear takes any granularity"
    )


def _check_mode(scheme: Any) -> None:
    check_mode(scheme.mode)
    if scheme.zero_point not in ZERO_POINTS:
        allowed = ", ".join(map(repr, ZERO_POINTS))
        raise ValueError(f"zero_point must be one of {allowed}, not {scheme.zero_point!r}")
    if scheme.mode is Mode.Asymmetric and scheme.grid != "integer":
        raise ValueError(f"grid {scheme.grid!r} has no zero points: use Mode.Symmetric")
    if scheme.mode is Mode.Symmetric and scheme.zero_point != "integer":
        raise ValueError(f"zero_point={scheme.zero_point!r} needs zero points: use Mode.Asymmetric")
    if scheme.zero_point == "fixed" and not scheme.double_quant:
        raise ValueError(
            "zero_point='fixed', 8 bits, stands beside scales of 8 bits: use double_quant=True, or "
            "zero_point='float'"
        )


def _check_bits(scheme: Any) -> None:
    widths = _WIDTHS.get(scheme.grid, _ANY_WIDTH)
    if scheme.bits not in widths:
        allowed = f"{widths[0]}" if len(widths) == 1 else f"{widths[0]}..{widths[-1]}"
        unit = "bit" if widths == (1,) else "bits"
        raise ValueError(
            f"grid {scheme.grid!r} has codes of {allowed} {unit}, not bits={scheme.bits}"
        )
    if scheme.grid == "integer" and scheme.bits == 1 and scheme.mode is Mode.Symmetric:
        raise ValueError(
            "a signed code of 1 bit is -1 or 0: use Scheme.binary() for -scale and scale, or "
            "Mode.Asymmetric"
        )


def _check_granularity(scheme: Any) -> None:
    if scheme.grid == "mxfp4" and scheme.granularity != PerGroup(MX_GROUP):
        raise ValueError(
            f"grid 'mxfp4' has groups of {MX_GROUP}, PerGroup({MX_GROUP}, 1), not "
            f"{scheme.granularity}; Scheme.fp4 takes other groups"
        )


def _check_scales(scheme: Any) -> None:
    if not isinstance(scheme.double_quant, bool):
        raise TypeError(f"double_quant must be True or False, not {scheme.double_quant!r}")
    if scheme.grid == "mxfp4" and (scheme.double_quant or scheme.scale_dtype):
        raise ValueError(
            "grid 'mxfp4' has scales of its own, exponents in uint8: leave scale_dtype and "
            "double_quant out"
        )
    if scheme.double_quant and scheme.scale_dtype:
        raise ValueError(
            f"double_quant makes the scales uint8 codes: leave scale_dtype="
            f"{scheme.scale_dtype!r} out"
        )
    if scheme.double_quant and not scheme.is_grouped:
        raise ValueError(
            f"double_quant shares a step among the groups of a row: use PerGroup(by, 1), not "
            f"{scheme.granularity}"
        )


def _check_columns(scheme: Any) -> None:
    for name in COLUMN_PARTS:
        if not isinstance(getattr(scheme, name), bool):
            raise TypeError(f"{name} must be True or False, not {getattr(scheme, name)!r}")
    if scheme.input_order and not scheme.is_grouped:
        raise ValueError(
            "input_order says which columns are of one group: use PerGroup(by, 1), not "
            f"{scheme.granularity}"
        )


def checked_levels(levels: Any) -> tuple[float, ...] | None:
    """Levels of a table as floats; None stays None.

    Raises:
        TypeError: for anything but numbers.
        ValueError: for a NaN or infinity, or levels that are all 0.
    """
    if levels is None:
        return None
    try:
        given = tuple(float(level) for level in levels)
    except (TypeError, ValueError):
        raise TypeError(f"levels are numbers, one a code, not {levels!r:.60}") from None
    if not all(map(math.isfinite, given)) or not any(given):
        raise ValueError(f"levels must be finite and not all 0, not {levels!r:.60}")
    return given


def _check_levels(scheme: Any) -> None:
    if (scheme.levels is None) == (scheme.grid == "table"):
        verb = "needs levels, one a code" if scheme.grid == "table" else "has no levels to give"
        raise ValueError(f"grid {scheme.grid!r} {verb}; grid 'table' is for levels of your own")
    if scheme.levels is not None and len(scheme.levels) != 2**scheme.bits:
        raise ValueError(
            f"codes of {scheme.bits} bits have {2**scheme.bits} levels, not {len(scheme.levels)}"
        )


def checked_shape(shape: Any) -> tuple[int, int]:
    """``(out_features, in_features)`` as ints, neither negative."""
    sizes = tuple(index_of(size, "a size of shape") for size in shape)
    if len(sizes) != 2 or min(sizes) < 0:
        raise ValueError(f"shape must be (out_features, in_features), not {sizes}")
    return sizes


def check_part(name: str, tensor: Any, shape: tuple[int, ...], dtype: str) -> None:
    """Raise unless a part of a packed matrix is a tensor of that shape and type."""
    if not native.is_tensor(tensor):
        raise TypeError(f"{name} must be a torch.Tensor or ndarray, not {type(tensor).__name__}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; this scheme needs {shape}")
    if dtype not in ("uint8", "int8", "int32"):
        source_of(tensor.dtype, name)
    elif name_of(tensor.dtype) != dtype:
        raise TypeError(f"{name} has dtype {name_of(tensor.dtype)}; this scheme needs {dtype}")
