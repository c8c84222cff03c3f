"""Plot of the gradient horizon."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cyborg_torchrl.checks.report import HorizonCurve

EXTRA = "plots need matplotlib: pip install 'cyborg-torchrl[report]'"
FLOOR = 1e-12
"""Smallest share that is drawn."""


def plot_horizon(curves: Mapping[str, HorizonCurve], path: Path | str) -> None:
    """Plot gradients against the number of steps back, one line for each name, and save the picture.

    Each line is scaled to its largest gradient. It ends with a cross where the gradient is exactly zero. Dotted lines
    show how far back the actions depend on observations.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot
    except ImportError:
        raise ImportError(EXTRA) from None
    figure, axes = pyplot.subplots(figsize=(7.5, 5.0), layout="constrained")
    length = max((curve.chunk_length for curve in curves.values()), default=1)
    smallest = 0.1
    for index, (name, curve) in enumerate(curves.items()):
        colour, dashes = f"C{index % 10}", "-" if index < 10 else "--"
        lags, values = _scaled(curve.influence)
        axes.plot(lags, values, color=colour, linestyle=":", linewidth=1.2, alpha=0.6)
        smallest = min(smallest, *values, 1.0)
        lags, values = _scaled(curve.gradient)
        smallest = min(smallest, *values, 1.0)
        is_cut = lags[-1:] != [curve.chunk_length - 1]
        label = f"{name} (ends {lags[-1] if lags else 0} back)" if is_cut else name
        axes.plot(lags, values, color=colour, linestyle=dashes, marker="o", markersize=3, label=label)
        if is_cut:
            axes.plot(lags[-1:], values[-1:], color=colour, marker="X", markersize=10)
    axes.plot([], [], color="black", label="gradient", marker="o", markersize=3)
    axes.plot([], [], color="black", linestyle=":", label="change when acting")
    axes.axvline(length - 1, color="grey", linewidth=0.8)
    axes.annotate("end of chunk ", (length - 1, 1.0), ha="right", va="bottom", fontsize=8, color="grey")
    axes.set(yscale="log", xlabel="steps back", ylabel="share of the largest", title="Gradient horizon")
    axes.set_xlim(-0.5, length - 0.5)
    axes.set_ylim(max(smallest / 3, FLOOR), 2.0)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _scaled(values: tuple[float, ...]) -> tuple[list[int], list[float]]:
    """Return the lags with a value above zero, and these values relative to the largest."""
    lags = [lag for lag, value in enumerate(values) if value > 0]
    return lags, [values[lag] / max(values) for lag in lags]
