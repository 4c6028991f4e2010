"""The roofline picture: what the machine allows, and where every candidate of one weight stands."""

from __future__ import annotations

from pathlib import Path

from benchmarks.records import Results
from quantization import plot_roofline, roofline_panels


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
    rows = [row.to_dict() for row in results.rows]
    panels = roofline_panels(rows)
    if not panels:
        raise PlotError("there is no linear cell with a limit to draw")
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(6.4 * columns, 4.8 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for axis, title in zip(axes, panels, strict=False):
        plot_roofline(rows, title, ax=axis)
    for axis in list(axes)[len(panels) :]:
        axis.set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
