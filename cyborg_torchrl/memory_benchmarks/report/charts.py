"""Charts of groups of runs and of one agent's memory. Matplotlib draws them, as SVG inside the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from math import ceil, floor, log10
from statistics import median
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter, StrMethodFormatter

from cyborg_torchrl.checks import HorizonCurve
from cyborg_torchrl.memory_benchmarks.published import SOURCE
from cyborg_torchrl.memory_benchmarks.report.groups import Group, group_by
from cyborg_torchrl.memory_benchmarks.report.runs import Array, Columns, has_numbers
from cyborg_torchrl.memory_benchmarks.report.xray import Episode
from cyborg_torchrl.training.stats import Estimate

WIDTH, HEIGHT = 4.2, 2.9
"""Inches. An inch has 72 units, which are about 72 pixels on a telephone."""
NUM_COLOURS = 8
INK, LINE = "#010203", "#010204"
COLOURS = tuple(f"#0102{16 + index:02x}" for index in range(NUM_COLOURS))
"""Placeholders for the colours of the page's style sheet, which has a light and a dark theme."""
THEME = {INK: "currentColor", LINE: "var(--line)"} | {code: f"var(--s{i})" for i, code in enumerate(COLOURS)}
DASHES = ("-", "--", ":")
MARKERS = "osD^vPX*"
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "report",  # the same runs make the same page
    "text.parse_math": False,  # names may contain "$"
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    **dict.fromkeys(("axes.facecolor", "savefig.facecolor"), "none"),
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK),
    "legend.frameon": False,
    "lines.markersize": 3.5,
}
"""Settings of matplotlib while the charts of a page are drawn."""
MAX_CHANNELS, MAX_STEPS = 96, 400
"""Cells of a heat map. Others are left out evenly."""
FLOOR = 1e-12
Series = Mapping[str, int]
"""Number of each label. It selects colour, dashes and marker, the same in every chart."""
Rows = list[dict[str, str]]


class Chart(NamedTuple):
    """A picture with its numbers."""

    title: str
    svg: Markup
    caption: str
    rows: Rows
    family: str = ""
    """Charts of one family stand under one heading."""


class Bar(NamedTuple):
    """A line of a chart of final values."""

    label: str
    estimate: Estimate
    seeds: Sequence[float]


def inline_svg(figure: Figure, name: str, label: str) -> Markup:
    """Return a figure, drawn with `STYLE`, as an <svg> element.

    Args:
        figure: the figure.
        name: letters, digits and hyphens. The element's ids begin with it, so that no two figures share one.
        label: the content in words, for readers who cannot see it.
    """
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    head, _, body = file.getvalue().partition("</defs>")  # the first one holds a style, which would be the whole page's
    view_box = re.findall(r'viewBox="[^"]*"', head)[0]
    body = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", body.replace("xlink:href", "href"))
    for code, colour in THEME.items():
        body = body.replace(code, colour)
    start = Markup('<svg {} role="img" aria-label="{}" class="chart">').format(Markup(view_box), label)
    return start + Markup(body)


def look_of(series: int) -> dict[str, Any]:
    """Return colour, dashes and marker of a series."""
    dashes = DASHES[series // NUM_COLOURS % len(DASHES)]
    return {"color": COLOURS[series % NUM_COLOURS], "linestyle": dashes, "marker": MARKERS[series % len(MARKERS)]}


def curve_charts(groups: Sequence[Group], series: Series) -> list[Chart]:
    """Draw the learning curves of each task and horizon, one line for each backbone."""
    places = group_by((group for group in groups if group.curve is not None), lambda group: group.place)
    return [_curve_chart(f"curve-{i}", place, places[place], series) for i, place in enumerate(places)]


def _curve_chart(name: str, place: str, groups: Sequence[Group], series: Series) -> Chart:
    measure, target = groups[0].measure, groups[0].target
    axes = _new_axes("environment steps", f"{measure} while training")
    rows: Rows = []
    ends: list[str] = []
    for group in groups:
        assert group.curve is not None
        steps, (point, low, high) = group.curve
        look = look_of(series[group.backbone])
        axes.fill_between(steps, low, high, color=look["color"], alpha=0.18, linewidth=0)
        axes.plot(steps, point, **look, markevery=max(1, len(steps) // 8), linewidth=1.5)
        ends.append(f"{group.backbone} ends at {point[-1]:.2f}")
        for i in _evenly(len(steps), 6):
            limits = "-" if np.isnan(low[i]) else f"{low[i]:.3f} to {high[i]:.3f}"
            row = {"backbone": group.backbone, "steps": f"{steps[i]:,.0f}", "IQM": f"{point[i]:.3f}"}
            rows.append(row | {"95 % interval": limits})
    if target is not None:
        axes.axhline(target, color=INK, linewidth=0.8, linestyle=(0, (2, 3)))
    caption = _published_line(groups[0], axes.axhline)
    _count_steps(axes)
    axes.set_xlim(left=0)
    if measure == "success":
        axes.set_ylim(-0.03, 1.05)
    label = f"Line chart of {measure} while training on {place}: {'; '.join(ends)}. {caption}".rstrip()
    return Chart(place, inline_svg(axes.get_figure(), name, label), caption, rows, groups[0].family)


def _published_line(group: Group, draw: Callable[..., Any]) -> str:
    """Draw the published score of a task, if there is one, and return a sentence about it."""
    if group.published is None:
        return ""
    draw(group.published.best, color=INK, linewidth=1, linestyle=(0, (8, 3)))
    return f"Dashed: {group.published.best:.3f}, the best of 13 models in {SOURCE} ({group.published.agent}, MMER)."


def horizon_charts(groups: Sequence[Group], series: Series) -> list[Chart]:
    """Draw final scores against the horizon, for each task with several horizons."""
    known = [group for group in groups if group.horizon is not None and group.scores]
    tasks = group_by(known, lambda group: group.task)
    several = {task: same for task, same in tasks.items() if len({group.horizon for group in same}) > 1}
    return [_horizon_chart(f"horizon-{i}", task, several[task], series) for i, task in enumerate(several)]


def _horizon_chart(name: str, task: str, groups: Sequence[Group], series: Series) -> Chart:
    measure = groups[0].measure
    axes = _new_axes("horizon (steps from cue to question)", f"final {measure}")
    rows: Rows = []
    ends: list[str] = []
    for label, line in group_by(groups, lambda group: group.backbone).items():
        x = [group.horizon for group in line]
        point, low, high = np.array([group.score for group in line]).T
        reach = np.clip([point - low, high - point], 0.0, None)
        axes.errorbar(x, point, reach, **look_of(series[label]), capsize=3, linewidth=1.5)
        ends.append(f"{label} {point[-1]:.2f} at {x[-1]:,}")
        for group in line:
            row = {"backbone": label, "horizon": f"{group.horizon:,}", "IQM [95 % interval]": str(group.score)}
            rows.append(row)
    horizons = sorted({group.horizon or 0 for group in groups})
    if horizons[0] > 0 and horizons[-1] >= 8 * horizons[0]:
        axes.set_xscale("log")
    axes.set_xticks(horizons)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.minorticks_off()
    if measure == "success":
        axes.set_ylim(-0.03, 1.05)
    label = f"Line chart of final {measure} on {task} against the horizon: {'; '.join(ends)}."
    return Chart(task, inline_svg(axes.get_figure(), name, label), "", rows)


def score_charts(groups: Sequence[Group], series: Series) -> list[Chart]:
    """Draw the final scores of each task and horizon."""
    places = group_by((group for group in groups if group.scores), lambda group: group.place)
    charts: list[Chart] = []
    for index, same in enumerate(places.values()):
        bars = [Bar(group.backbone, group.score, group.scores) for group in same]
        charts.append(_bar_chart(f"score-{index}", same[0], bars, series, f"final {same[0].measure}", digits=3))
    return charts


def speed_charts(groups: Sequence[Group], series: Series) -> list[Chart]:
    """Draw the environment steps per second of each task and horizon."""
    places = group_by((group for group in groups if group.figures("steps_per_second")), lambda group: group.place)
    charts: list[Chart] = []
    for index, same in enumerate(places.values()):
        bars: list[Bar] = []
        for group in same:
            rates = group.figures("steps_per_second")
            middle = Estimate(np.float64(median(rates)), np.float64(min(rates)), np.float64(max(rates)))
            bars.append(Bar(group.backbone, middle, rates))
        charts.append(_bar_chart(f"speed-{index}", same[0], bars, series, "environment steps / s", digits=0))
    return charts


def _bar_chart(name: str, group: Group, bars: Sequence[Bar], series: Series, unit: str, *, digits: int) -> Chart:
    """Draw a mark with its interval for each bar, from top to bottom, and a tick for each seed.

    A chart of final scores has a line at the published score of the group's task.
    """
    place = group.place
    axes = _new_axes(unit, height=0.75 + 0.28 * max(len(bars), 3))
    rows: Rows = []
    for position, (label, (point, low, high), seeds) in enumerate(bars):
        look = look_of(series[label]) | {"linestyle": ""}
        axes.plot(seeds, [position] * len(seeds), **look | {"marker": "|", "alpha": 0.6})
        axes.plot([low, high], [position] * 2, color=look["color"], linewidth=4, alpha=0.35)
        axes.plot([point], [position], **look, markersize=6)
        rows.append({
            "backbone": label,
            unit: f"{point:,.{digits}f}",
            "range": "-" if np.isnan(low) else f"{low:,.{digits}f} to {high:,.{digits}f}",
            "each seed": " ".join(f"{value:,.{digits}f}" for value in seeds),
        })  # fmt: skip
    names = [fill(bar.label, 24, max_lines=2, placeholder="…") for bar in bars]  # long names would crush the chart
    axes.set_yticks(range(len(bars)), names, fontsize=8)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    values = [value for bar in bars for value in bar.seeds]
    caption = ""
    if unit.startswith("final") and group.published is not None:
        caption = _published_line(group, axes.axvline)
        values.append(group.published.best)
    left, right = min(0.0, *values), max(1.0 if unit == "final success" else 0.0, *values)
    axes.set_xlim(left - 0.03 * (right - left), right + 0.05 * (right - left))
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(sep="") if digits == 0 else StrMethodFormatter("{x:g}"))
    content = "; ".join(f"{row['backbone']} {row[unit]}" for row in rows)
    label = f"Chart of {unit} on {place}: {content}. {caption}".rstrip()
    return Chart(place, inline_svg(axes.get_figure(), name, label), caption, rows, group.family)


def gradient_chart(curve: HorizonCurve) -> Chart:
    """Draw how far back the gradient reaches, and how far back acting depends on observations."""
    axes = _new_axes("steps back", "share of the largest")
    parts = {"gradient": np.array(curve.gradient), "change when acting": np.array(curve.influence)}
    shares = {name: values / max(values.max(), FLOOR) for name, values in parts.items()}
    for index, (name, values) in enumerate(shares.items()):
        lags = np.flatnonzero(values > 0)
        look = look_of(index) | {"linestyle": ("-", ":")[index]}
        axes.plot(lags, values[lags], **look, markevery=max(1, len(lags) // 12), label=name)
    _scale_by_decades(axes, np.concatenate(list(shares.values())))
    axes.set_xlim(-0.5, curve.chunk_length - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    rows: Rows = []
    for lag in _evenly(curve.chunk_length, 8):
        rows.append({"steps back": str(lag)} | {name: f"{values[lag]:.2g}" for name, values in shares.items()})
    reach = np.flatnonzero(parts["gradient"] > 0).max(initial=0)
    caption = (
        f"Gradient of the last step's action distribution with respect to the {curve.leaf} of earlier steps, and how "
        f"much acting changes with that {curve.leaf}. The gradient reaches {reach} steps back, of "
        f"{curve.chunk_length - 1} examined steps."
    )
    return Chart(
        "Gradient horizon", inline_svg(axes.get_figure(), "xray-horizon", f"Line chart. {caption}"), caption, rows
    )


def state_charts(episode: Episode) -> list[Chart]:
    """Draw a heat map for each entry of the memory state: channels over time."""
    charts: list[Chart] = []
    for index, (name, values) in enumerate(episode.states.items()):
        channels = values.reshape(len(values), -1)
        largest = np.abs(channels).max(0)
        rows: Rows = []
        for step in _evenly(len(channels), 6):
            size = np.abs(channels[step])
            row = {"step": str(step), "mean magnitude": f"{size.mean():.3g}", "largest": f"{size.max():.3g}"}
            rows.append(row | {"channels not zero": f"{(size > 0).sum():,}"})
        shape = " x ".join(str(size) for size in values.shape[1:]) or "1"
        caption = (
            f"Shape {shape}. Each channel is drawn as a share of its largest magnitude, which is between "
            f"{largest.min():.2g} and {largest.max():.2g}."
        )
        shares = (channels / np.maximum(largest, FLOOR)).T
        title, units = f"State: {name}", ("channel", "share")
        charts.append(_heat_map(f"xray-state-{index}", title, shares, units, (-1.0, 1.0), caption, rows))
    return charts


def slot_charts(episode: Episode) -> list[Chart]:
    """Draw heat maps of the slots of each external memory: reads by each head, writes, usage."""
    charts: list[Chart] = []
    for layer, slots in enumerate(episode.slots):
        owner = f" of memory {layer + 1}" if len(episode.slots) > 1 else ""
        parts = {f"Slot reads{owner}, head {head + 1}": slots.read[:, head] for head in range(slots.read.shape[1])}
        parts |= {f"Slot writes{owner}": slots.write, f"Slot usage{owner}": slots.usage}
        for part, (title, values) in enumerate(parts.items()):
            rows: Rows = []
            for slot in values.mean(0).argsort()[::-1][:5]:  # the busiest slots
                weight = values[:, slot]
                row = {"slot": str(slot), "mean": f"{weight.mean():.3f}", "largest": f"{weight.max():.3f}"}
                rows.append(row | {"at step": str(weight.argmax())})
            caption = f"Weight {'after' if 'usage' in title else 'of'} each step, between 0 and 1."
            limits = (0.0, max(float(values.max()), FLOOR))
            name, units = f"xray-slots-{layer}-{part}", ("slot", "weight")
            charts.append(_heat_map(name, title, values.T, units, limits, caption, rows))
    return charts


def _heat_map(
    name: str, title: str, values: Array, units: tuple[str, str], limits: tuple[float, float], caption: str, rows: Rows
) -> Chart:
    """Draw rows over time as pixels; `values` [rows, T], `units` of the rows and of the values."""
    height, steps = values.shape
    cells = values[np.ix_(_evenly(height, MAX_CHANNELS), _evenly(steps, MAX_STEPS))]
    axes = _new_axes("step of the episode", units[0])
    colours = "RdBu_r" if limits[0] < 0 else "viridis"
    image = axes.imshow(
        cells, aspect="auto", interpolation="none", cmap=colours, vmin=limits[0], vmax=limits[1], origin="lower",
        extent=(-0.5, steps - 0.5, -0.5, height - 0.5),
    )  # fmt: skip
    axes.grid(visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    colorbar = axes.get_figure().colorbar(image, ax=axes, pad=0.02, aspect=25, label=units[1])
    colorbar.outline.set_visible(False)
    colorbar.solids.set_rasterized(True)
    if cells.size < values.size:
        caption += f" {cells.shape[0]:,} of {height:,} rows and {cells.shape[1]:,} of {steps:,} steps are drawn."
    label = f"Heat map of {height} rows over {steps} steps. {title}. {caption}"
    return Chart(title, inline_svg(axes.get_figure(), name, label), caption, rows)


def drift_charts(metrics: Columns) -> list[Chart]:
    """Draw state drift and ratio error during training; return no chart if neither was logged."""
    columns = {"state drift": metrics.get("state_drift"), "ratio error": metrics.get("ratio_error")}
    lines = {name: values for name, values in columns.items() if values is not None and has_numbers(values)}
    if not lines:
        return []
    axes = _new_axes("environment steps", "relative size")
    zero = [name for name, values in lines.items() if not (values > 0).any()]
    for index, (name, values) in enumerate(lines.items()):
        is_shown = np.isfinite(values) if len(zero) == len(lines) else values > 0  # a logarithmic axis has no zero
        label = f"{name} (zero)" if name in zero else name
        axes.plot(metrics["steps"][is_shown], values[is_shown], **look_of(index), label=label)
    _scale_by_decades(axes, np.concatenate(list(lines.values())))
    _count_steps(axes)
    rows: Rows = []
    for row in _evenly(len(metrics["steps"]), 8):
        cells = {name: f"{values[row]:.2g}" if np.isfinite(values[row]) else "-" for name, values in lines.items()}
        rows.append({"steps": f"{metrics['steps'][row]:,.0f}"} | cells)
    caption = (
        "Distance between the stored states and states from the current parameters (|difference| / |state|), and the "
        "difference between the update's and the acting probabilities before the first optimiser step (|log ratio|)."
        + "".join(f" The {name} is zero throughout." for name in zero)
    )
    return [Chart("State drift", inline_svg(axes.get_figure(), "xray-drift", f"Line chart. {caption}"), caption, rows)]


def _new_axes(xlabel: str, ylabel: str = "", height: float = HEIGHT) -> Axes:
    axes = Figure(figsize=(WIDTH, height), layout="constrained").add_subplot()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return axes


def _count_steps(axes: Axes) -> None:
    """Label an x axis of environment steps: 800, 1.6k."""
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _scale_by_decades(axes: Axes, values: Array) -> None:
    """Use a logarithmic y axis over whole decades, if any value is above `FLOOR`, with a legend above."""
    positive = values[values > FLOOR]
    if len(positive):
        low, high = floor(log10(positive.min())), ceil(log10(positive.max()))
        axes.set_yscale("log")
        axes.set_ylim(0.8 * 10.0**low, 1.25 * 10.0 ** max(high, low + 1))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=8)


def _evenly(size: int, most: int) -> list[int]:
    """Return at most so many indices of `size` items, evenly spaced, with the first and the last."""
    return [int(index) for index in np.unique(np.linspace(0, size - 1, min(size, most)).astype(int))]
