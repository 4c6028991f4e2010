"""Pictures with matplotlib, the extra ``plot``: each function draws into Axes and returns them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quantization.inspection.explain import float_matrix, levels_of
from quantization.inspection.places import parts_of
from quantization.ops import native
from quantization.ops.extras import need
from quantization.schemes.packed_weights import PackedWeights
from quantization.schemes.stored_scales import restore, restore_zeros

__all__ = [
    "plot_errors",
    "plot_frontier",
    "plot_layers",
    "plot_roofline",
    "plot_weights",
    "roofline_panels",
]

_BINS = 200
_MARKERS = {"float": "s", "ours": "o", "W8A16": "v", "W8A8": "x"}


def _axes(ax: Any) -> Any:
    """The Axes that are given, or new ones.

    Raises:
        ImportError: if there are none and matplotlib is missing; the message says how to get it.
    """
    if ax is not None:
        return ax
    return need("matplotlib.pyplot", "plot").subplots(layout="constrained")[1]


# ---- one layer ---------------------------------------------------------------------------------


def plot_weights(layer: Any, reference: Any = None, *, ax: Any = None) -> Any:
    """How often a layer uses each level of its grid, and where the float weights lay among them.

    Levels are in units of the scale of their group, zero points included: bars are the share of
    weights of each code. With a reference its histogram is drawn behind them.

    Args:
        layer: as for :func:`quantization.explain`.
        reference: the float weight or layer, or None.
        ax: matplotlib Axes to draw into; None: new ones.

    Returns:
        The Axes.

    Raises:
        ImportError: if matplotlib is missing.
        TypeError, ValueError: as :func:`quantization.explain`.

    Example:
        >>> from quantization import pack_matrix
        >>> weight = np.random.default_rng(0).normal(size=(8, 64)).astype("float32")
        >>> plot_weights(pack_matrix(weight, "w2"), weight).get_title()
        'w2: 4 of 4 codes used'
    """
    packed = parts_of(layer).packed
    given = None if reference is None else float_matrix(reference, packed.shape)
    axes = _axes(ax)
    codes, counts = np.unique(native.to_array(packed.codes), return_counts=True)
    levels = levels_of(packed)
    places = np.array([levels[code] for code in levels])
    widths = np.diff(np.sort(places)).min(initial=np.inf, where=np.diff(np.sort(places)) > 0)
    width = 0.8 * (widths if np.isfinite(widths) else 1.0)
    shares = dict(zip(codes.tolist(), (counts / max(counts.sum(), 1)).tolist(), strict=True))
    used = [shares.get(code, 0.0) for code in levels]
    if given is not None:
        among = _among_levels(packed, given)
        density, edges = np.histogram(among, _BINS, _range(among, places), density=True)
        typical = float(np.median(np.diff(np.sort(places)))) if len(places) > 1 else 1.0
        label = "float weights (a level's worth)"
        axes.stairs(density * typical, edges, fill=True, alpha=0.3, color="C1", label=label)
    axes.bar(places, used, width, color="C0", alpha=0.7, label="codes")
    axes.plot(places, np.zeros_like(places), "|", color="0.3", ms=10, label="levels")
    shared = ", levels of row 0" if packed.codebook is not None and len(packed.codebook) > 1 else ""
    axes.set(xlabel=f"level{shared}", ylabel="share of weights",
             title=f"{packed.scheme}: {len(codes)} of {len(levels)} codes used")  # fmt: skip
    axes.legend()
    return axes


def plot_errors(layer: Any, reference: Any, *, ax: Any = None) -> Any:
    """The error of each group of a layer's weights, as a map: rows down, groups across.

    A cell is the root mean square of the error, in parts of that of the group's float weights.
    Groups are as they are stored: in an order of their own where the scheme has one.

    Args:
        layer: as for :func:`quantization.explain`.
        reference: the float weight or layer.
        ax: matplotlib Axes to draw into; None: new ones.

    Returns:
        The Axes, with a colour bar beside them.

    Raises:
        ImportError: if matplotlib is missing.
        TypeError, ValueError: as :func:`quantization.explain`.

    Example:
        >>> from quantization import pack_matrix
        >>> weight = np.random.default_rng(0).normal(size=(8, 64)).astype("float32")
        >>> plot_errors(pack_matrix(weight, "w4g32a"), weight).get_title()
        'w4g32a: error by group'
    """
    errors = group_errors(layer, reference)
    axes = _axes(ax)
    image = axes.imshow(errors, aspect="auto", interpolation="nearest", cmap="magma")
    axes.figure.colorbar(image, ax=axes, label="error / size of the group's weights (rms)")
    scheme = parts_of(layer).packed.scheme
    axes.set(xlabel="group", ylabel="row", title=f"{scheme}: error by group")
    return axes


def group_errors(layer: Any, reference: Any) -> np.ndarray:
    """What :func:`plot_errors` draws, ``[rows, groups]``; 0 for a group of zeros that is exact.

    Example:
        >>> from quantization import pack_matrix
        >>> weight = np.array([[1.0, 2.0, 3.0, 100.0]], "float32")
        >>> group_errors(pack_matrix(weight, "w8g2"), weight).round(3)
        array([[0.004, 0.001]])
    """
    parts = parts_of(layer)
    packed = parts.packed
    wanted = float_matrix(reference, packed.shape).astype("float64")
    found = native.to_array(native.cast(packed.dequantize(), "float64"))
    starts = np.arange(packed.scheme.groups(packed.shape[1])) * packed.scheme.group(packed.shape[1])
    order = parts.order
    noise, size = (
        np.add.reduceat(np.square(each[:, order]), starts, axis=1)
        for each in (found - wanted, wanted)
    )
    shares = np.divide(noise, size, out=np.where(noise > 0, np.inf, 0.0), where=size > 0)
    rms: np.ndarray = np.sqrt(shares)
    return rms


def _among_levels(packed: PackedWeights, weight: np.ndarray) -> np.ndarray:
    """Where float weights lie among the levels: divided by scales, zero points added."""
    cols, scheme = packed.shape[1], packed.scheme
    place = np.arange(cols) // scheme.group(cols)
    order = np.arange(cols) if packed.input_order is None else native.to_array(packed.input_order)
    scales = restore(packed.scales, packed.scale_steps)[:, place]
    if packed.input_scale is not None:
        scales = scales * native.to_array(native.cast(packed.input_scale, "float32"))
    zero = np.zeros((1, 1), "float32")
    if scheme.has_integer_zeros:
        zero = native.to_array(packed.integer_zero_points())[:, place]
    elif packed.zero_points is not None:
        zero = restore_zeros(packed.zero_points, scheme.bits)[:, place]
    with np.errstate(divide="ignore", invalid="ignore"):
        among: np.ndarray = weight[:, order] / scales + zero
    found: np.ndarray = among[np.isfinite(among)]
    return found


def _range(among: np.ndarray, places: np.ndarray) -> tuple[float, float]:
    low, high = float(places.min()), float(places.max())
    if among.size:
        low, high = min(low, float(among.min())), max(high, float(among.max()))
    return low - 0.5, high + 0.5


# ---- a model -----------------------------------------------------------------------------------


def plot_frontier(plan: Any, *, ax: Any = None) -> Any:
    """What each size of a plan is expected to lose, and where the plan stands.

    Args:
        plan: a :class:`quantization.BitPlan`.
        ax: matplotlib Axes to draw into; None: new ones.

    Returns:
        The Axes.

    Raises:
        ImportError: if matplotlib is missing.
        TypeError: if ``plan`` has no frontier.

    Example:
        >>> import torch
        >>> from quantization import plan_bits
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32))
        >>> plan = plan_bits(model, target_bits=5, batches=[torch.randn(4, 32)])
        >>> plot_frontier(plan).get_ylabel()
        'kl'
    """
    if not hasattr(plan, "frontier"):
        raise TypeError(f"{type(plan).__name__} has no frontier; plan_bits gives a BitPlan")
    axes = _axes(ax)
    sizes, losses = zip(*plan.frontier, strict=True)
    axes.plot(np.array(sizes) / 1e6, losses, ".-", color="C0", label="best for its size, expected")
    axes.plot(
        plan.nbytes / 1e6, plan.predicted, "o", color="C1", label=f"plan: {plan.bits:.2f} bits"
    )
    if plan.measured is not None:
        measured = getattr(plan.measured, plan.measure)
        axes.plot(plan.nbytes / 1e6, measured, "x", color="C3", label="plan, measured")
    if min(losses) > 0:
        axes.set_yscale("log")
    axes.set(
        xlabel="MB of the planned weights", ylabel=plan.measure, title="bits where they matter"
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return axes


def plot_layers(table: Any, column: str, *, name: str | None = None, ax: Any = None) -> Any:
    """A bar a layer: any column of numbers of any table of this package.

    Args:
        table: a plan, report, comparison or another table; sort and filter it first.
        column: key or heading of the numbers.
        name: column of the names; None: the first column.
        ax: matplotlib Axes to draw into; None: new ones, high enough for the names.

    Returns:
        The Axes, the first layer at the top; what is no number has no bar.

    Raises:
        ImportError: if matplotlib is missing.
        KeyError: if there is no such column.
        TypeError: if the column holds no numbers.

    Example:
        >>> from quantization.console.table import table_of
        >>> table = table_of(("layer", "bits"), [("a", 4), ("b", 8)])
        >>> [float(bar.get_width()) for bar in plot_layers(table, "bits").patches]
        [4.0, 8.0]
    """
    table = table.table()
    values, names = table.column(column), table.column(name or table.columns[0].key)
    numbers = [_number(values.of(row)) for row in table.rows]
    if table.rows and all(number is None for number in numbers):
        raise TypeError(f"the column {column!r} holds no numbers")
    known = [np.nan if number is None or not np.isfinite(number) else number for number in numbers]
    axes = _axes(ax)
    if ax is None:
        axes.figure.set_size_inches(7, max(2.0, 0.8 + 0.16 * len(known)))
    places = np.arange(len(known))
    axes.barh(places, known, color="C0")
    axes.set_yticks(places, [names.text(names.of(row)) for row in table.rows], fontsize=6)
    axes.set(xlabel=values.heading, ylim=(len(known) - 0.5, -0.5))
    axes.grid(alpha=0.3, axis="x")
    return axes


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float | np.number) else None


# ---- a machine ---------------------------------------------------------------------------------

#: What a measured row of a run is.
Rows = Sequence[Mapping[str, Any]]


def plot_roofline(
    source: str | os.PathLike[str] | Mapping[str, Any] | Rows, panel: str | None = None, *,
    ax: Any = None,
) -> Any:  # fmt: skip
    """What the machine allows, and where each way to compute a layer stands.

    Args:
        source: the JSON file of a run of this project's speed measurements, or what it holds.
        panel: which of its panels (:func:`roofline_panels`); None: the first.
        ax: matplotlib Axes to draw into; None: new ones.

    Returns:
        The Axes: operations a second over operations a byte, limits dashed.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if no row has a limit, or there is no such panel.

    Source: S. Williams et al., "Roofline" (2009).

    Example:
        >>> row = {"section": "linear", "shape": "8x4", "dtype": "float32", "threads": 1,
        ...        "tokens": 1, "candidate": "ours", "kind": "ours", "median": 1e-6,
        ...        "limit": 5e-7, "flops": 64, "traffic": 32}
        >>> plot_roofline({"rows": [row]}).get_title()
        '8x4, float32, 1 thread'
    """
    panels = roofline_panels(source)
    if not panels:
        raise ValueError("there is no linear row with a limit to draw")
    title = next(iter(panels)) if panel is None else panel
    if title not in panels:
        raise ValueError(f"no panel {title!r}; there are {', '.join(map(repr, panels))}")
    axes, rows = _axes(ax), panels[title]
    limited = [row for row in rows if "traffic" in row]
    flops = {row["tokens"]: row["flops"] for row in limited}
    intensity = {row["tokens"]: row["flops"] / row["traffic"] for row in limited}

    def line(name: str, seconds: str, **look: Any) -> Any:
        points = sorted(
            (intensity[row["tokens"]], flops[row["tokens"]] / row[seconds] / 1e9)
            for row in rows
            if row["candidate"] == name
        )
        return axes.plot(*zip(*points, strict=True), **look)[0]

    for name, kind in {row["candidate"]: row["kind"] for row in rows}.items():
        drawn = line(name, "median", **_look(name, kind))
        if kind == "ours":
            line(name, "limit", lw=1, ls="--", color=drawn.get_color())
    axes.set(
        xscale="log", yscale="log", title=title, ylabel="GFLOP/s",
        xlabel="operations a byte of int8 traffic (dashed: the limit of the same colour)",
    )  # fmt: skip
    axes.grid(True, which="both", lw=0.3)
    axes.legend(fontsize=6.5)
    return axes


def roofline_panels(
    source: str | os.PathLike[str] | Mapping[str, Any] | Rows,
) -> dict[str, list[Mapping[str, Any]]]:
    """Timed rows of the weight with the most numbers, by shape, dtype and threads.

    Example:
        >>> row = {"section": "linear", "shape": "8x4", "dtype": "float32", "threads": 1,
        ...        "tokens": 1, "candidate": "ours", "kind": "ours", "median": 1e-6,
        ...        "limit": 5e-7, "flops": 64, "traffic": 32}
        >>> list(roofline_panels([row]))
        ['8x4, float32, 1 thread']
    """
    if isinstance(source, str | os.PathLike):
        source = json.loads(Path(source).read_text(encoding="utf-8"))
    rows: Any = source["rows"] if isinstance(source, Mapping) else source
    linear = [row for row in rows if row.get("section") == "linear" and row.get("median")]
    limited = [row for row in linear if "traffic" in row]
    if not limited:
        return {}
    shape = max(limited, key=lambda row: _count(row["shape"]))["shape"]
    known = {_cell(row) for row in limited}
    panels: dict[str, list[Mapping[str, Any]]] = {}
    for row in linear:
        if row["shape"] == shape and _cell(row) in known:
            threads = f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"
            panels.setdefault(f"{shape}, {row['dtype']}, {threads}", []).append(row)
    return panels


def _cell(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["shape"], row["dtype"], row["threads"], row["tokens"]


def _count(shape: str) -> int:
    rows, cols = shape.split("x")
    return int(rows) * int(cols)


def _look(name: str, kind: str) -> dict[str, Any]:
    is_main = kind in ("ours", "float")
    return {
        "marker": _MARKERS.get(kind, "."), "ms": 5 if is_main else 4, "lw": 1.6 if is_main else 0.7,
        "color": "0.2" if kind == "float" else None, "ls": ":" if kind == "W8A8" else "-",
        "label": f"{name} (W8A8)" if kind == "W8A8" else name,
    }  # fmt: skip
