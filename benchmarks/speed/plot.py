"""Plot of the comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw bars of steps per second, one panel for each comparison.

    Raises:
        ImportError: without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        title = {
            "collection": f"collection, {row['backbone']}, {row['num_envs']:,} environments",
            "processes": "collection, Crafter in two processes",
            "update": "update",
            "end_to_end": f"end to end, horizon {row['horizon']:,}",
            "truncated": f"one epoch of {row['seq_len']}-step BPTT",
            "horizons": "end to end, ours",
        }[row["part"]]
        panels.setdefault(title, []).append(row)
    columns = 2
    lines = -(-len(panels) // columns)
    height = [max(len(found) for found in list(panels.values())[i * columns : (i + 1) * columns]) for i in range(lines)]
    figure, axes = pyplot.subplots(
        lines,
        columns,
        figsize=(12, 0.45 * sum(height) + 0.9 * lines),
        squeeze=False,
        gridspec_kw={"height_ratios": [h + 1 for h in height]},
        layout="constrained",
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, found) in zip(axes.flat, panels.items(), strict=False):
        names = [
            f"{row['subject']}, {row['backbone']}" if row["part"] == "update"
            else f"horizon {row['horizon']:,}" if row["part"] == "horizons" else row["subject"]
            for row in found
        ]  # fmt: skip
        speeds = [row["steps_per_second"] for row in found]
        colours = ["tab:blue" if "ours" in row["subject"] else "tab:grey" for row in found]
        bars = axis.barh(range(len(found)), speeds, color=colours)
        axis.bar_label(bars, [f" {speed:,.0f}" for speed in speeds], fontsize=8)
        axis.set_yticks(range(len(found)), names, fontsize=8)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=9)
        axis.set_xlim(0, 1.2 * max(speeds))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axis.locator_params(axis="x", nbins=5)
        axis.tick_params(axis="x", labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("environment steps per second, one thread", fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
