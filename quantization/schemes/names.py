"""Schemes as text: short names such as ``w4g64a`` (grammar: Scheme.parse), and plain values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from quantization.console.near import did_you_mean
from quantization.numerics.granularity import Granularity, PerDimension, PerGroup
from quantization.numerics.parameters import Mode
from quantization.schemes.codebooks import own_grids, own_levels
from quantization.schemes.column_order import COLUMN_PARTS

__all__ = ["fields_from", "name_of_scheme", "parse_name", "plain_of"]

_NAME = re.compile(
    r"(?P<base>w|kmeans|int(?=8)|nf(?=4)|fp(?=4)|mxfp(?=4)|binary|ternary)(?P<bits>[1-9]\d*)?"
    r"(?:g(?P<group>\d+)|(?P<row>r)|(?P<tensor>t))?"
    r"(?P<mode>af|a|s)?"
    r"(?P<options>(?:\+\w+)*)"
)
_LISTED = re.compile(r"table\(([^)]*)\)")
_GRIDS = {"w": "integer", "int": "integer", "nf": "nf4", "fp": "fp4", "mxfp": "mxfp4"}
_WIDTHS = {"binary": 1, "ternary": 2}
_SPANS = {
    "nf4": PerGroup(64),
    "fp4": PerGroup(64),
    "mxfp4": PerGroup(32),
    "kmeans": Granularity.PerTensor,
}
_SCALE_TYPES = {"f32": "float32", "f64": "float64", "f16": "float16", "bf16": "bfloat16"}
_SHORT = {name: short for short, name in _SCALE_TYPES.items()}
_DOUBLE_QUANT = "dq"
_COLUMNS = {"order": "input_order", "cols": "input_scale"}  # options and what they set
_SAID_TWICE = {"order": "the order of the columns", "cols": "that columns have multipliers"}
_SCALES_ONLY = "dqs"  # beside float zero points that stay floats


def parse_name(text: Any) -> dict[str, Any]:
    """The fields of the scheme of that name.

    Raises:
        TypeError: if ``text`` is no string.
        ValueError: if it is no such name.

    Example:
        >>> parse_name("kmeans3r")
        {'bits': 3, 'grid': 'kmeans', 'granularity': Granularity.PerDimension(dim=1)}
    """
    if not isinstance(text, str):
        raise TypeError(f"the name of a scheme is a string, not {type(text).__name__}")
    levels, spelled = _levels_of(text)
    match = _NAME.fullmatch(spelled)
    bits = match and (match["bits"] or _WIDTHS.get(match["base"]))
    if not match or not bits or (match["bits"] and match["base"] in _WIDTHS):
        raise ValueError(
            f"{text!r} names no scheme; names are such as w4g64a, w8, w3g128, nf4g64, fp4g64, "
            "mxfp4, kmeans4, kmeans4r, binaryg32, ternary, with +dq for double quantization and "
            f"+f16 for the type of the scales{_near(text)}"
        )
    grid = _GRIDS.get(match["base"], match["base"])
    values = {"bits": int(bits), "grid": grid, "granularity": _span(match, grid)}
    if levels is not None:
        values |= {"bits": (len(levels) - 1).bit_length(), "grid": "table", "levels": levels}
    if match["mode"] in ("a", "af"):
        values["mode"] = Mode.Asymmetric
    if match["mode"] == "af":
        values["zero_point"] = "float"
    for option in match["options"].split("+")[1:]:
        values |= _option(text, option, values)
    return values


def _levels_of(text: str) -> tuple[tuple[float, ...] | None, str]:
    """The levels of a table that a name begins with, and the name with ``w1`` in their place."""
    listed = _LISTED.match(text)
    if listed:
        try:
            levels = tuple(float(level) for level in listed[1].split(","))
        except ValueError:
            raise ValueError(f"{text!r:.80} lists levels that are no numbers") from None
        return levels, "w1" + text[listed.end() :]
    for name in sorted(own_grids(), key=len, reverse=True):
        found = re.match(rf"{name}(\d*)(?=[grt+]|$)", text)
        if found:
            return own_levels(name, int(found[1]) if found[1] else None), "w1" + text[found.end() :]
    return None, text


def _span(match: re.Match[str], grid: str) -> Granularity:
    if match["group"]:
        return PerGroup(int(match["group"]))
    if match["tensor"]:
        return Granularity.PerTensor
    return PerDimension(1) if match["row"] else _SPANS.get(grid, PerDimension(1))


def _option(text: str, option: str, values: dict[str, Any]) -> dict[str, Any]:
    flags = {_DOUBLE_QUANT: "double_quant", **_COLUMNS}
    has_floats = values.get("zero_point") == "float"
    if has_floats:
        flags[_SCALES_ONLY] = "double_quant"
    found: dict[str, Any] = {"scale_dtype": _SCALE_TYPES.get(option)}
    if option in flags:
        found = {flags[option]: True}
    if None in found.values():
        allowed = ", ".join(f"+{name}" for name in (*flags, *_SCALE_TYPES))
        raise ValueError(f"{text!r} has the option +{option}; allowed are {allowed}")
    if found.keys() & values.keys():
        what = _SAID_TWICE.get(option, "what the scales are")
        raise ValueError(f"{text!r} says twice {what}")
    if option == _DOUBLE_QUANT and has_floats:
        found["zero_point"] = "fixed"
    return found


def _near(text: str) -> str:
    """A hint at the scheme that other libraries call so, or at a name that is spelled alike."""
    said = re.fullmatch(
        r"(u?)(?:int|i|q|w|bits?)?[-_]?([1-8])(?:[-_]?bits?|b|_[\dkKsSmM_]+)?(g\d+)?", text
    )
    if said:
        return f"; did you mean 'w{said[2]}{said[3] or ''}{'a' * bool(said[1])}'?"
    names = ("w4", "w8", "w4g64a", "nf4", "fp4", "mxfp4", "kmeans4", "binary", "ternary", "int8")
    return did_you_mean(text.lower(), names)


def name_of_scheme(scheme: Any) -> str:
    """The short name of a Scheme, which :func:`parse_name` reads.

    Example:
        >>> from quantization.schemes.scheme import Scheme
        >>> name_of_scheme(Scheme(bits=5, mode=Mode.Asymmetric, zero_point="float"))
        'w5af'
    """
    base = {"integer": f"w{scheme.bits}", "kmeans": f"kmeans{scheme.bits}"}.get(
        scheme.grid, scheme.grid
    )
    if scheme.levels is not None:
        base = f"table({','.join(repr(level).removesuffix('.0') for level in scheme.levels)})"
    mode = ""
    if scheme.mode is Mode.Asymmetric:
        mode = "a" if scheme.zero_point == "integer" else "af"
    options = f"+{_DOUBLE_QUANT}" if scheme.double_quant else ""
    if options and scheme.zero_point == "float":
        options = f"+{_SCALES_ONLY}"
    if scheme.scale_dtype:
        options += f"+{_SHORT[scheme.scale_dtype]}"
    options += "".join(f"+{name}" for name, field in _COLUMNS.items() if getattr(scheme, field))
    return f"{base}{_span_name(scheme)}{mode}{options}"


def _span_name(scheme: Any) -> str:
    if isinstance(scheme.granularity, PerGroup):
        return "" if scheme.grid == "mxfp4" else f"g{scheme.granularity.by}"
    if scheme.granularity == _SPANS.get(scheme.grid, PerDimension(1)):
        return ""
    return "r" if isinstance(scheme.granularity, PerDimension) else "t"


# ---- plain values ------------------------------------------------------------------------------


def plain_of(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a scheme with numbers, strings and None in the place of everything else."""
    match values["granularity"]:
        case PerGroup(by):
            granularity = {"kind": "group", "by": by}
        case PerDimension():
            granularity = {"kind": "row"}
        case _:
            granularity = {"kind": "tensor"}
    levels = values["levels"] and list(values["levels"])
    plain = values | {"granularity": granularity, "mode": values["mode"].value, "levels": levels}
    seldom = (*COLUMN_PARTS, "levels")
    return {name: value for name, value in plain.items() if value or name not in seldom}


def fields_from(plain: Any, known: list[str]) -> dict[str, Any]:
    """The reverse of :func:`plain_of`; fields that are not there are left to their defaults.

    Raises:
        TypeError: if ``plain`` is no mapping.
        ValueError: for a field that is not known, no bits, or an unknown mode or granularity.
    """
    if not isinstance(plain, Mapping):
        raise TypeError(f"a scheme is a mapping of fields, not {type(plain).__name__}")
    unknown = [str(key) for key in plain if key not in known]
    if unknown:
        raise ValueError(f"a scheme has no field {unknown[0]!r}; allowed are {', '.join(known)}")
    if "bits" not in plain:
        raise ValueError("a scheme needs the field 'bits'")
    values = dict(plain)
    if "granularity" in values:
        values["granularity"] = _granularity_from(values["granularity"])
    if "mode" in values:
        values["mode"] = _mode_from(values["mode"])
    return values


def _granularity_from(plain: Any) -> Granularity:
    match plain:
        case {"kind": "group", "by": by, **rest} if not rest:
            return PerGroup(by)
        case {"kind": "row", **rest} if not rest:
            return PerDimension(1)
        case {"kind": "tensor", **rest} if not rest:
            return Granularity.PerTensor
    raise ValueError(
        "granularity must be {'kind': 'tensor'}, {'kind': 'row'} or {'kind': 'group', 'by': size}, "
        f"not {plain!r:.80}"
    )


def _mode_from(value: Any) -> Mode:
    try:
        return Mode(value)
    except ValueError:
        allowed = " or ".join(repr(mode.value) for mode in Mode)
        raise ValueError(f"mode must be {allowed}, not {value!r:.60}") from None
