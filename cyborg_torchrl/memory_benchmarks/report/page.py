"""The page: what the runs say, in sections, as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from cyborg_torchrl.memory_benchmarks.report import sections
from cyborg_torchrl.memory_benchmarks.report.charts import DASHES, Chart, Link, Table, marker_of
from cyborg_torchrl.memory_benchmarks.report.groups import Group, build_groups
from cyborg_torchrl.memory_benchmarks.report.inventory import (
    common_folder,
    run_anchor,
    runs_table,
    setups,
    versions_table,
)
from cyborg_torchrl.memory_benchmarks.report.runs import Run
from cyborg_torchrl.memory_benchmarks.report.svg import NUM_SERIES
from cyborg_torchrl.memory_benchmarks.report.xray import XRay

SHAPES = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼", "P": "✚", "X": "✖", "*": "★"}
DASH_ARRAYS = dict(zip(DASHES, ("none", "6 3", "2 3"), strict=True))


class Key(NamedTuple):
    """A line of the legend."""

    label: str
    colour: int
    shape: str
    dashes: str


class Section(NamedTuple):
    """A part of the page."""

    anchor: str
    title: str
    text: str
    charts: Sequence[Chart] = ()
    tables: Sequence[tuple[str, Table]] = ()
    """Each with its caption."""
    has_legend: bool = False
    link: Link | None = None
    """Where in the page more is said."""


def build_page(runs: Sequence[Run], xray: XRay | str) -> str:
    """The page as HTML.

    Args:
        runs: all runs; those that are not finished are listed as such and count for nothing else.
        xray: the look into one agent, or a sentence that says why there is none.
    """
    groups = build_groups(runs)
    labels = sorted({group.backbone for group in groups})
    series = {label: index for index, label in enumerate(labels)}
    environment = Environment(loader=PackageLoader(__package__ or "", "."), autoescape=True, undefined=StrictUndefined)
    environment.tests["linking"] = lambda value: isinstance(value, Link)
    return environment.get_template("page.html").render(
        title="Memory benchmark report",
        told=_overview(runs, groups),
        legend=[_key(label, index) for label, index in series.items()],
        sections=_sections(runs, groups, series, xray),
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC by cyborg_torchrl {version('cyborg-torchrl')}",
    )


def _sections(runs: Sequence[Run], groups: list[Group], series: dict[str, int], xray: XRay | str) -> list[Section]:
    curves = sections.curves(groups, series)
    horizons = sections.horizons(groups, series)
    scores = sections.scores(groups, series)
    speed = sections.speed(groups, series)
    together, why = sections.together(groups)
    return [
        Section(
            "curves", "Learning curves", sections.CURVES if curves else sections.NO_CURVES, curves,
            has_legend=bool(curves),
        ),
        Section(
            "horizons", "Success against horizon", sections.HORIZONS if horizons else sections.NO_HORIZONS, horizons,
            has_legend=bool(horizons),
        ),
        Section(
            "results", "Results", f"{sections.RESULTS} {why}".strip(), scores,
            [("Each task and backbone", sections.results_table(groups)),
             *([("All tasks together", together)] if together else [])],
        ),
        Section("speed", "Speed", sections.SPEED, speed, [("Speed and memory", sections.speed_table(groups))]),
        _xray_section(runs, xray),
        Section(
            "runs", "What was run", sections.RUNS, (),
            [("Versions and machines", versions_table(runs)), (_runs_caption(runs), runs_table(runs, groups))],
        ),
    ]  # fmt: skip


def _xray_section(runs: Sequence[Run], xray: XRay | str) -> Section:
    if isinstance(xray, str):
        return Section("xray", "Memory X-ray", xray)
    tables = [] if xray.findings is None else [("What the checker found", xray.findings)]
    path = xray.run.path
    number = next((i for i, run in enumerate(runs) if run.path.resolve() == path.resolve()), None)
    link = None if number is None else Link(f"Run {number + 1}: {path.name}", run_anchor(number))
    text = xray.sentence if link else f"{path}: {xray.sentence}"
    return Section("xray", "Memory X-ray", text, xray.charts, tables, link=link)


def _overview(runs: Sequence[Run], groups: Sequence[Group]) -> list[str]:
    finished = sum(run.status == "finished" for run in runs)
    tasks, backbones = {group.task for group in groups}, {group.backbone for group in groups}
    told = [
        f"{_count(len(runs), 'run')}: {_count(len(tasks), 'task')}, {_count(len(backbones), 'backbone')}, "
        f"{_count(len(groups), 'group')} of runs that differ in the seed alone."
    ]
    if len(setups(runs)) > 1:
        told.append(f"They come from {len(setups(runs))} setups (commits, versions or machines): see What was run.")
    others = {status: sum(run.status == status for run in runs) for status in sorted({run.status for run in runs})}
    if finished < len(runs):
        listed = ", ".join(f"{count} {status}" for status, count in others.items() if status != "finished")
        told.append(f"Not all count: {finished} finished, {listed}. Those are listed under What was run.")
    return told


def _runs_caption(runs: Sequence[Run]) -> str:
    base = common_folder(runs)
    return "Runs" if base is None else f"Runs in {base}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _key(label: str, index: int) -> Key:
    dashes = DASH_ARRAYS[DASHES[index // NUM_SERIES % len(DASHES)]]
    return Key(label, index % NUM_SERIES, SHAPES[marker_of(index)], dashes)
