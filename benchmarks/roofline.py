"""The roofline picture: what the machine allows, and where every candidate of one weight stands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.records import Results, Row, cells

MARKERS = {"float": "s", "ours": "o", "W8A16": "v", "W8A8": "x"}


class PlotError(Exception):
    """The picture cannot be made; the message says why."""


def plot(results: Results, path: Path) -> None:
    """Draw a panel for each dtype and number of threads of the largest weight.

    Raises:
        PlotError: if matplotlib is missing, or no cell has a limit.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError('the picture needs matplotlib: pip install "qwqa[bench]"') from error
    panels = _panels(results)
    if not panels:
        raise PlotError("there is no linear cell with a limit to draw")
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(6.4 * columns, 4.8 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for axis, (title, rows) in zip(axes, panels.items(), strict=False):
        _draw(axis, title, rows)
    for axis in list(axes)[len(panels) :]:
        axis.set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _panels(results: Results) -> dict[str, list[Row]]:
    """Rows of the weight with the most bytes, by dtype and threads."""
    limited = [row for row in results.of("linear") if "traffic" in row.values]
    if not limited:
        return {}

    def weights(row: Row) -> int:
        out_features, in_features = row.case["shape"].split("x")
        return int(out_features) * int(in_features)

    shape = max(limited, key=weights).case["shape"]
    panels: dict[str, list[Row]] = {}
    for cell in cells(results.of("linear")):
        case = cell[0].case
        reference = next((row for row in cell if "traffic" in row.values), None)
        if case["shape"] != shape or reference is None:
            continue
        threads = f"{case['threads']} thread{'s' if case['threads'] > 1 else ''}"
        for row in cell:
            if row.timing:
                row.values.setdefault("flops", reference.values["flops"])
                panels.setdefault(f"{shape}, {case['dtype']}, {threads}", []).append(row)
    return panels


def _draw(axis, title: str, rows: list[Row]) -> None:
    limited = [row for row in rows if "traffic" in row.values]
    intensity = {row.case["tokens"]: row.values["flops"] / row.values["traffic"] for row in limited}

    def line(name: str, seconds: Callable[[Row], float], **look: Any) -> Any:
        points = sorted(
            (intensity[row.case["tokens"]], row.values["flops"] / seconds(row) / 1e9)
            for row in rows
            if row.candidate == name
        )
        return axis.plot(*zip(*points, strict=True), **look)[0]

    kinds = {row.candidate: row.kind for row in rows}
    for name, kind in kinds.items():
        is_main = kind in ("ours", "float")
        drawn = line(
            name, lambda row: row.median, marker=MARKERS[kind], ms=5 if is_main else 4,
            lw=1.6 if is_main else 0.7, color="0.2" if kind == "float" else None,
            ls=":" if kind == "W8A8" else "-", label=f"{name} (W8A8)" if kind == "W8A8" else name,
        )  # fmt: skip
        if kind == "ours":
            line(name, lambda row: row.values["limit"], lw=1, ls="--", color=drawn.get_color())
    axis.set(
        xscale="log", yscale="log", title=title, ylabel="GFLOP/s",
        xlabel="operations a byte of int8 traffic (dashed: the limit of the same colour)",
    )  # fmt: skip
    axis.grid(True, which="both", lw=0.3)
    axis.legend(fontsize=6.5)
