"""The picture of the gradient horizon."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cyborg_torchrl.diagnostics.report import HorizonCurve

EXTRA = "plots need matplotlib: pip install 'cyborg-torchrl[plot]'"


def plot_horizon(curves: Mapping[str, HorizonCurve], path: Path | str) -> None:
    """Draws gradients against how many steps back they reach, one line for each name, and saves the picture.

    Each line is scaled to its own largest gradient. It ends where the gradient is exactly zero; dotted lines
    show how far back acting itself depends on what was seen.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot
    except ImportError:
        raise ImportError(EXTRA) from None
    figure, axes = pyplot.subplots(figsize=(7.5, 4.2), layout="constrained")
    for index, (name, curve) in enumerate(curves.items()):
        colour = f"C{index % 10}"
        dashes = "-" if index < 10 else "--"
        lags, values = _scaled(curve.influence)
        axes.plot(lags, values, color=colour, linestyle=":", linewidth=1.2, alpha=0.6)
        lags, values = _scaled(curve.gradient)
        axes.plot(lags, values, color=colour, linestyle=dashes, marker="o", markersize=3, label=name)
    axes.plot([], [], color="grey", label="gradient", marker="o", markersize=3)
    axes.plot([], [], color="grey", linestyle=":", label="change when acting")
    length = max((curve.chunk_length for curve in curves.values()), default=1)
    axes.axvline(length - 1, color="grey", linewidth=0.8)
    axes.set(yscale="log", xlabel="steps back", ylabel="share of the largest", title="Gradient horizon")
    axes.set_xlim(-0.5, length - 0.5)
    axes.set_ylim(bottom=1e-9)
    axes.legend(frameon=False, fontsize=8, ncols=2 if len(curves) > 3 else 1)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _scaled(values: tuple[float, ...]) -> tuple[list[int], list[float]]:
    """Lags whose value is not zero, and the values as shares of the largest."""
    lags = [lag for lag, value in enumerate(values) if value > 0]
    return lags, [values[lag] / max(values) for lag in lags]
