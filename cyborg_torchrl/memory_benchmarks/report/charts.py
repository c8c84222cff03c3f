"""Charts of groups of runs: learning curves, success against the horizon, final scores, speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, floor, log10
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter, StrMethodFormatter

from cyborg_torchrl.memory_benchmarks.report.statistics import Band, Interval
from cyborg_torchrl.memory_benchmarks.report.svg import INK, NUM_SERIES, SERIES, inline_svg, page_style

SIZE = (4.2, 2.9)
"""Inches, of which 72 units each are about as many pixels on a telephone."""
DASHES = ("-", "--", ":")
MARKERS = "osD^vPX*"


class Link(NamedTuple):
    """A cell that leads to another part of the page."""

    text: str
    anchor: str


class Anchor(NamedTuple):
    """A cell that links lead to."""

    text: str
    anchor: str


Row = tuple[str | Link | Anchor, ...]


class Table(NamedTuple):
    """Rows of cells under headers."""

    headers: tuple[str, ...]
    rows: list[Row]
    is_wide: bool = False
    """Scrolled on narrow screens; otherwise each row becomes a card there."""
    is_folded: bool = False
    """Hidden until asked for."""


class Chart(NamedTuple):
    """A picture with its figures."""

    title: str
    svg: Markup
    caption: str
    table: Table


class Bar(NamedTuple):
    """A line of a chart of bars."""

    label: str
    series: int
    point: float
    low: float | None
    high: float | None
    values: Sequence[float]
    """Of each seed."""


def look_of(series: int) -> dict[str, Any]:
    """Colour, dashes and marker of a series, which are the same in every chart."""
    turn = series // NUM_SERIES
    return {"color": SERIES[series % NUM_SERIES], "linestyle": DASHES[turn % len(DASHES)], "marker": marker_of(series)}


def evenly(size: int, most: int) -> list[int]:
    """Indices of at most so many of `size` items, evenly spaced, the first and the last among them."""
    return [int(index) for index in np.unique(np.linspace(0, size - 1, min(size, most)).astype(int))]


def marker_of(series: int) -> str:
    """Marker of a series."""
    return MARKERS[series % len(MARKERS)]


@page_style()
def learning_curves(
    name: str, title: str, bands: Mapping[str, Band], series: Mapping[str, int], measure: str, target: float | None
) -> Chart:
    """Scores while training, with their intervals, one line for each backbone."""
    figure, axes = new_axes(f"{measure} while training", "environment steps")
    for label, band in bands.items():
        look = look_of(series[label])
        axes.fill_between(band.steps, band.low, band.high, color=look["color"], alpha=0.18, linewidth=0)
        every = max(1, len(band.steps) // 8)
        axes.plot(band.steps, band.point, **look, markersize=3.5, markevery=every, linewidth=1.5)
    if target is not None:
        axes.axhline(target, color=INK, linewidth=0.8, linestyle=(0, (2, 3)))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)
    if measure == "success":
        axes.set_ylim(-0.03, 1.05)
    rows: list[Row] = []
    for label, band in bands.items():
        chosen = evenly(len(band.steps), 6)
        rows += [(label, f"{band.steps[i]:,.0f}", f"{band.point[i]:.3f}", _limits(band, i)) for i in chosen]
    told = "; ".join(f"{label} ends at {band.point[-1]:.2f}" for label, band in bands.items())
    svg = inline_svg(figure, name, f"Line chart of {measure} while training on {title}: {told}.")
    return Chart(title, svg, "", Table(("backbone", "steps", "IQM", "95 % interval"), rows))


@page_style()
def against_horizon(
    name: str, title: str, found: Mapping[str, Sequence[tuple[int, Interval]]], series: Mapping[str, int], measure: str
) -> Chart:
    """Final scores against the horizon, one line for each backbone."""
    figure, axes = new_axes(f"final {measure}", "horizon (steps from cue to question)")
    horizons = sorted({horizon for points in found.values() for horizon, _ in points})
    rows: list[Row] = []
    for label, points in found.items():
        x, y = [horizon for horizon, _ in points], [interval.point for _, interval in points]
        below = [0.0 if i.low is None else max(0.0, i.point - i.low) for _, i in points]
        above = [0.0 if i.high is None else max(0.0, i.high - i.point) for _, i in points]
        axes.errorbar(x, y, [below, above], **look_of(series[label]), markersize=4, capsize=3, linewidth=1.5)
        rows += [(label, f"{horizon:,}", str(interval)) for horizon, interval in points]
    if horizons[0] > 0 and horizons[-1] >= 8 * horizons[0]:
        axes.set_xscale("log")
    axes.set_xticks(horizons, minor=False)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.minorticks_off()
    if measure == "success":
        axes.set_ylim(-0.03, 1.05)
    told = "; ".join(f"{label} {points[-1][1].point:.2f} at {points[-1][0]:,}" for label, points in found.items())
    svg = inline_svg(figure, name, f"Line chart of final {measure} on {title} against the horizon: {told}.")
    return Chart(title, svg, "", Table(("backbone", "horizon", "IQM [95 % interval]"), rows))


@page_style()
def bars(name: str, title: str, lines: Sequence[Bar], unit: str, *, limit: float | None, digits: int = 3) -> Chart:
    """A point with its interval for each line, and the seeds behind it.

    Args:
        name: what the chart's ids begin with.
        title: what it is about.
        lines: from top to bottom.
        unit: what is measured, for the axis.
        limit: where the axis ends; None: as the figures want.
        digits: of the figures in the table.
    """
    height = 0.75 + 0.28 * max(len(lines), 3)
    figure, axes = new_axes("", unit, height)
    for place, line in enumerate(lines):
        look = look_of(line.series)
        axes.plot(line.values, [place] * len(line.values), color=look["color"], marker="|", linestyle="", alpha=0.6)
        if line.low is not None and line.high is not None:
            axes.plot([line.low, line.high], [place, place], color=look["color"], linewidth=4, alpha=0.35)
        axes.plot([line.point], [place], color=look["color"], marker=look["marker"], markersize=6)
    axes.set_yticks(range(len(lines)), [line.label for line in lines])
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xlim(left=min([0.0, *(value for line in lines for value in line.values)]), right=limit)
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(sep="") if digits == 0 else StrMethodFormatter("{x:g}"))
    rows: list[Row] = []
    for line in lines:
        limits = "-" if line.low is None else f"{line.low:,.{digits}f} to {line.high:,.{digits}f}"
        rows.append(
            (line.label, f"{line.point:,.{digits}f}", limits, " ".join(f"{v:,.{digits}f}" for v in line.values))
        )
    told = "; ".join(f"{line.label} {line.point:,.{digits}f}" for line in lines)
    svg = inline_svg(figure, name, f"Chart of {unit} on {title}: {told}.")
    return Chart(title, svg, "", Table(("backbone", unit, "range", "each seed"), rows))


def new_axes(ylabel: str, xlabel: str, height: float = SIZE[1]) -> tuple[Figure, Axes]:
    """A figure of the size of all charts, with named axes; under `page_style`."""
    figure = Figure(figsize=(SIZE[0], height), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return figure, axes


def scale_by_decades(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic y axis over whole decades, with a legend above; an axis as it was where nothing is above zero."""
    positive = [value for value in values if value > 0]
    if positive:
        low, high = floor(log10(min(positive))), ceil(log10(max(positive)))
        axes.set_yscale("log")
        axes.set_ylim(0.8 * 10.0**low, 1.25 * 10.0 ** max(high, low + 1))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=8)


def _limits(band: Band, index: int) -> str:
    return "-" if band.num_seeds < 2 else f"{band.low[index]:.3f} to {band.high[index]:.3f}"
