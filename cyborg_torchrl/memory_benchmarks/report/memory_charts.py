"""Charts of one agent's memory: gradient horizon, states, slots, drift."""

from __future__ import annotations

import numpy as np
from matplotlib.ticker import EngFormatter, MaxNLocator

from cyborg_torchrl.checks import HorizonCurve
from cyborg_torchrl.memory_benchmarks.report.charts import (
    Chart,
    Row,
    Table,
    evenly,
    look_of,
    new_axes,
    scale_by_decades,
)
from cyborg_torchrl.memory_benchmarks.report.recording import Array, Episode
from cyborg_torchrl.memory_benchmarks.report.runs import Columns, has_numbers, number
from cyborg_torchrl.memory_benchmarks.report.svg import inline_svg, page_style

MOST_CHANNELS, MOST_STEPS = 96, 400
"""Cells of a picture at most; others are left out evenly."""
FLOOR = 1e-12


@page_style()
def horizon_chart(curve: HorizonCurve) -> Chart:
    """How far back the gradient reaches, beside how far back acting depends on what was seen; shares of the largest."""
    figure, axes = new_axes("share of the largest", "steps back")
    rows: list[Row] = []
    parts = {"gradient": curve.gradient, "change when acting": curve.influence}
    scaled = {name: np.array(values) / max(*values, FLOOR) for name, values in parts.items()}
    for index, (name, values) in enumerate(scaled.items()):
        lags = np.flatnonzero(values > 0)
        look = look_of(index)
        look["linestyle"] = ("-", ":")[index]
        axes.plot(lags, values[lags], **look, markersize=3, markevery=max(1, len(lags) // 12), label=name)
    scale_by_decades(axes, [value for values in scaled.values() for value in values if value > FLOOR])
    axes.set_xlim(-0.5, curve.chunk_length - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    for lag in evenly(curve.chunk_length, 8):
        rows.append((str(lag), *(f"{values[lag]:.2g}" for values in scaled.values())))
    reach = max((lag for lag, value in enumerate(curve.gradient) if value > 0), default=0)
    caption = (
        f"Gradient of the last step's action distribution to the {curve.leaf} so many steps back, and how much acting "
        f"changes when that is another. The gradient reaches {reach} steps back, of {curve.chunk_length - 1} looked at."
    )
    svg = inline_svg(figure, "xray-horizon", f"Line chart. {caption}")
    return Chart("Gradient horizon", svg, caption, Table(("steps back", *parts), rows))


def state_charts(episode: Episode) -> list[Chart]:
    """A heat map for each entry of the memory state: channels over time."""
    charts: list[Chart] = []
    for index, (name, values) in enumerate(episode.states.items()):
        channels = values.reshape(len(values), -1)
        largest = np.abs(channels).max(0)
        rows: list[Row] = []
        for step in evenly(len(channels), 6):
            size = np.abs(channels[step])
            rows.append((str(step), f"{size.mean():.3g}", f"{size.max():.3g}", f"{(size > 0).sum():,}"))
        shape = " x ".join(str(size) for size in values.shape[1:]) or "1"
        caption = (
            f"Shape {shape}; each channel as a share of its own largest magnitude, which is between "
            f"{largest.min():.2g} and {largest.max():.2g}. {_left_out(*channels.shape)}"
        )
        scaled = (channels / np.maximum(largest, FLOOR)).T
        chart = _heat_map(f"xray-state-{index}", f"State: {name}", scaled, ("channel", "share"), (-1.0, 1.0), caption)
        headers = ("step", "mean magnitude", "largest", "channels not zero")
        charts.append(chart._replace(table=Table(headers, rows)))
    return charts


def slot_charts(episode: Episode) -> list[Chart]:
    """Heat maps of the slots of each external memory: reads by each head, writes, usage."""
    charts: list[Chart] = []
    for layer, slots in enumerate(episode.slots):
        where = f" of memory {layer + 1}" if len(episode.slots) > 1 else ""
        told = {f"Slot reads{where}, head {head + 1}": slots.read[:, head] for head in range(slots.read.shape[1])}
        told |= {f"Slot writes{where}": slots.write, f"Slot usage{where}": slots.usage}
        for part, (title, values) in enumerate(told.items()):
            busiest = values.mean(0).argsort()[::-1][:5]
            rows: list[Row] = []
            for slot in busiest:
                one = values[:, slot]
                rows.append((str(slot), f"{one.mean():.3f}", f"{one.max():.3f}", str(one.argmax())))
            what = "after each step, between 0 and 1" if "usage" in title else "of each step, between 0 and 1"
            caption = f"Weight {what}. {_left_out(*values.shape)}"
            limits = (0.0, max(float(values.max()), FLOOR))
            chart = _heat_map(f"xray-slots-{layer}-{part}", title, values.T, ("slot", "weight"), limits, caption)
            charts.append(chart._replace(table=Table(("slot", "mean", "largest", "at step"), rows)))
    return charts


@page_style()
def _heat_map(
    name: str, title: str, values: Array, units: tuple[str, str], limits: tuple[float, float], caption: str
) -> Chart:
    """Rows over time as a raster; `values` [rows, T], `units` of the rows and of the values."""
    rows, steps = values.shape
    kept = values[np.ix_(evenly(rows, MOST_CHANNELS), evenly(steps, MOST_STEPS))]
    figure, axes = new_axes(units[0], "step of the episode")
    colours = "RdBu_r" if limits[0] < 0 else "viridis"
    image = axes.imshow(
        kept, aspect="auto", interpolation="none", cmap=colours, vmin=limits[0], vmax=limits[1], origin="lower",
        extent=(-0.5, steps - 0.5, -0.5, rows - 0.5),
    )  # fmt: skip
    axes.grid(visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=25)
    bar.set_label(units[1])
    bar.outline.set_visible(False)
    bar.solids.set_rasterized(True)
    svg = inline_svg(figure, name, f"Heat map of {rows} rows over {steps} steps. {title}. {caption}")
    return Chart(title, svg, caption, Table((), []))


def _left_out(steps: int, rows: int) -> str:
    parts = [f"{most} of {size:,} {what}" for size, most, what in
             ((rows, MOST_CHANNELS, "rows"), (steps, MOST_STEPS, "steps")) if size > most]  # fmt: skip
    return f"Drawn: {' and '.join(parts)}, evenly spaced." if parts else ""


@page_style()
def drift_charts(metrics: Columns) -> list[Chart]:
    """State drift and ratio error over training, from metrics.csv; none where neither was logged."""
    columns = {"state drift": metrics.get("state_drift"), "ratio error": metrics.get("ratio_error")}
    known = {name: values for name, values in columns.items() if values is not None and has_numbers(values)}
    if not known:
        return []
    figure, axes = new_axes("relative size", "environment steps")
    zero = [name for name, values in known.items() if not (values > 0).any()]
    for index, (name, values) in enumerate(known.items()):
        is_shown = np.isfinite(values) if len(zero) == len(known) else values > 0  # a logarithm has no zero
        label = f"{name} (zero)" if name in zero else name
        axes.plot(metrics["steps"][is_shown], values[is_shown], **look_of(index), markersize=3, label=label)
    scale_by_decades(axes, [value for values in known.values() for value in values])
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    rows: list[Row] = []
    for row in evenly(len(metrics["steps"]), 8):
        cells = [number(float(values[row])) for values in known.values()]
        rows.append((f"{metrics['steps'][row]:,.0f}", *("-" if cell is None else f"{cell:.2g}" for cell in cells)))
    caption = (
        "How far the stored states are from those of today's parameters (|difference| / |state|), and by how much the "
        "update's probabilities differ from acting's before its first step (|log ratio|)."
        + "".join(f" The {name} is zero throughout." for name in zero)
    )
    svg = inline_svg(figure, "xray-drift", f"Line chart. {caption}")
    return [Chart("State drift", svg, caption, Table(("steps", *known), rows))]
