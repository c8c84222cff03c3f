"""What each section of the page shows of groups of runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import Any

import numpy as np

from cyborg_torchrl.memory_benchmarks.report.charts import (
    Bar,
    Chart,
    Link,
    Row,
    Table,
    against_horizon,
    bars,
    learning_curves,
)
from cyborg_torchrl.memory_benchmarks.report.groups import Group
from cyborg_torchrl.memory_benchmarks.report.inventory import group_anchor
from cyborg_torchrl.memory_benchmarks.report.runs import number
from cyborg_torchrl.memory_benchmarks.report.statistics import iqm_band, iqm_interval, steps_to

CURVES = (
    "Interquartile mean over seeds, with its 95 % stratified bootstrap interval (rliable), of the episodes that ended "
    "in training, where actions are sampled. Dotted line: the score that counts as solved. From few seeds the "
    "bootstrap makes intervals too narrow."
)
NO_CURVES = "No finished run has logged an episode."
HORIZONS = "Interquartile mean of the final scores with its 95 % interval, where a task was run at several horizons."
NO_HORIZONS = "No task was run at several horizons (the sweep's --horizons does that)."
RESULTS = (
    "Final scores: fresh episodes after training (logger.eval_episodes), or the last update's where there were none. "
    "A tick is a seed, the mark the interquartile mean, the band its 95 % stratified bootstrap interval."
)
SPEED = (
    "Environment steps a second over a whole run, collection and updates together; a tick is a run, the mark the "
    "median. Figures of runs that shared a machine with others, or ran on different machines, do not compare."
)
RUNS = (
    "Every folder that was found. Only finished runs count above; of a configuration and seed that was run several "
    "times the latest does. Differences are from what most runs have."
)
Series = Mapping[str, int]


def curves(groups: Sequence[Group], series: Series) -> list[Chart]:
    """A chart of learning curves for each task at each horizon."""
    charts: list[Chart] = []
    for index, (place, same) in enumerate(_by_place(groups).items()):
        learned = {group.backbone: [run.learning for run in group.finished if len(run.learning[0])] for group in same}
        bands = {label: iqm_band(found) for label, found in learned.items() if found}
        if bands:
            name = f"curve-{index}"
            charts.append(learning_curves(name, place, bands, series, same[0].measure, same[0].target))
    return charts


def horizons(groups: Sequence[Group], series: Series) -> list[Chart]:
    """A chart of final scores against the horizon for each task with several."""
    tasks: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        if group.horizon is not None and group.scores:
            tasks[group.task].append(group)
    charts: list[Chart] = []
    for index, (task, same) in enumerate(tasks.items()):
        if len({group.horizon for group in same}) < 2:
            continue
        found: dict[str, list[tuple[int, Any]]] = defaultdict(list)
        for group in same:
            found[group.backbone].append((group.horizon or 0, group.interval))
        charts.append(against_horizon(f"horizon-{index}", task, found, series, same[0].measure))
    return charts


def scores(groups: Sequence[Group], series: Series) -> list[Chart]:
    """A chart of final scores for each task at each horizon."""
    charts: list[Chart] = []
    for index, (place, same) in enumerate(_by_place(groups).items()):
        lines = [
            Bar(group.backbone, series[group.backbone], *group.interval, group.scores) for group in same if group.scores
        ]
        if lines:
            measure = same[0].measure
            limit = 1.03 if measure == "success" else None
            charts.append(bars(f"score-{index}", place, lines, f"final {measure}", limit=limit))
    return charts


def speed(groups: Sequence[Group], series: Series) -> list[Chart]:
    """A chart of steps a second for each task at each horizon."""
    charts: list[Chart] = []
    for index, (place, same) in enumerate(_by_place(groups).items()):
        lines: list[Bar] = []
        for group in same:
            found = _figures(group, "steps_per_second")
            if found:
                limits = (min(found), max(found))
                lines.append(Bar(group.backbone, series[group.backbone], median(found), *limits, found))
        if lines:
            charts.append(bars(f"speed-{index}", place, lines, "environment steps / s", limit=None, digits=0))
    return charts


def results_table(groups: Sequence[Group]) -> Table:
    """A row for each group: score, seeds, solved or not, steps that were needed."""
    headers = ("task", "backbone", "measure", "IQM [95 % interval]", "mean", "min", "seeds finished",
               "solved", "steps to target", "steps trained")  # fmt: skip
    rows: list[Row] = []
    for index, group in enumerate(groups):
        found = group.scores
        learned = [run.learning for run in group.finished]
        needed = None if group.target is None else steps_to(group.target, learned)
        rows.append((
            group.place, Link(group.backbone, group_anchor(index)), group.measure,
            str(group.interval) if found else "-",
            f"{mean(found):.3f}" if found else "-", f"{min(found):.3f}" if found else "-",
            f"{len(found)} of {group.seeds}", _solved(group), "-" if needed is None else f"{needed:,.0f}",
            f"{median(run.steps for run in group.finished):,.0f}" if found else "-",
        ))  # fmt: skip
    return Table(headers, rows)


def _solved(group: Group) -> str:
    if group.target is None or not group.scores or group.measure != "success":
        return "-"
    reached = sum(score >= group.target for score in group.scores)
    word = "yes" if reached == len(group.scores) else "no" if reached == 0 else "partly"
    return f"{word}: {reached} of {len(group.scores)} at {group.target:g}"


def together(groups: Sequence[Group]) -> tuple[Table | None, str]:
    """A row for each backbone: successes on all tasks together, seeds drawn again within each task.

    Returns:
        The table, if there are several tasks that know success; and who is left out, if anyone is.
    """
    known = [group for group in groups if group.measure == "success" and group.scores]
    places = {group.place for group in known}
    if len(places) < 2:
        return None, ""
    rows: list[Row] = []
    left_out: list[str] = []
    for backbone in sorted({group.backbone for group in known}):
        same = [group.scores for group in known if group.backbone == backbone]
        if len(same) == len(places) and len({len(column) for column in same}) == 1:
            rows.append((backbone, str(len(places)), str(len(same[0])), str(iqm_interval(np.array(same).T))))
        else:
            left_out.append(backbone)
    why = f"Not in the table of all tasks, for want of the same number of seeds on each: {', '.join(left_out)}."
    if not rows:
        return None, "No backbone has the same number of finished seeds on each task, to be compared on all of them."
    table = Table(("backbone", "tasks", "seeds on each", "IQM [95 % interval]"), rows)
    return table, why if left_out else ""


def speed_table(groups: Sequence[Group]) -> Table:
    """A row for each group: speed, memory, time."""
    rows: list[Row] = []
    for index, group in enumerate(groups):
        rates, peaks, walls = (_figures(group, key) for key in ("steps_per_second", "peak_rss_mb", "total_seconds"))
        rows.append((
            group.place, Link(group.backbone, group_anchor(index)),
            f"{median(rates):,.0f}" if rates else "-", f"{min(rates):,.0f} to {max(rates):,.0f}" if rates else "-",
            f"{max(peaks):,.0f}" if peaks else "-", f"{median(walls):,.1f}" if walls else "-", str(len(rates)),
        ))  # fmt: skip
    headers = ("task", "backbone", "steps / s (median)", "range", "peak memory (MiB)",
               "wall time (s, median)", "runs")  # fmt: skip
    return Table(headers, rows)


def _by_place(groups: Sequence[Group]) -> dict[str, list[Group]]:
    places: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        places[group.place].append(group)
    return places


def _figures(group: Group, key: str) -> list[float]:
    return [value for run in group.finished if (value := number(run.summary.get(key))) is not None]
