"""One picture of a language model under each scheme: bytes, perplexity and tokens a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.records import Results
from benchmarks.roofline import PlotError

WORST = 3  # times the perplexity of the float model, beyond which a scheme is out of the picture


def plot_schemes(results: Results, path: Path) -> None:
    """Draw perplexity over megabytes, each point coloured by tokens a second.

    Raises:
        PlotError: if matplotlib is missing, or the section packed_model was not measured.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError('the picture needs matplotlib: pip install "qwqa[bench]"') from error
    rows = [row for row in results.of("packed_model") if "tokens_per_second" in row.values]
    if not rows:
        raise PlotError("packed_model was not measured")
    case = rows[0].case
    rows = [row for row in rows if row.case == case]
    bound = WORST * next(row.values["perplexity"] for row in rows if row.kind == "float")
    rows = [row for row in rows if row.values["perplexity"] <= bound]
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axis = figure.subplots()
    points = axis.scatter(
        [row.values["bytes"] / 1e6 for row in rows],
        [row.values["perplexity"] for row in rows],
        c=[row.values["tokens_per_second"] for row in rows],
        cmap="viridis",
        s=64,
    )
    for row in rows:
        _label(axis, row.candidate, row.values)
    axis.set(xscale="log", yscale="log", xlabel="MB of linear layers", ylabel="perplexity")
    threads = f"{case['threads']} thread{'s' if case['threads'] > 1 else ''}"
    axis.set_title(
        f"{case['model']}, {case['dtype']} activations, {threads}: down and left is better"
    )
    for place in (axis.xaxis, axis.yaxis):
        place.set_major_formatter("{x:.3g}")
        place.set_minor_formatter("{x:.3g}")
    axis.grid(alpha=0.3, which="both")
    figure.colorbar(points, label="tokens a second, greedy")
    with matplotlib.rc_context({"svg.hashsalt": "schemes"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _label(axis: Any, name: str, values: dict[str, Any]) -> None:
    place = values["bytes"] / 1e6, values["perplexity"]
    axis.annotate(name, place, (5, 4), textcoords="offset points", fontsize=7)
