"""The page: everything about the runs in one HTML file that needs no other file and no network."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cyborg_torchrl.checks import Report
from cyborg_torchrl.memory_benchmarks.report import charts
from cyborg_torchrl.memory_benchmarks.report.charts import Chart, Rows, Series
from cyborg_torchrl.memory_benchmarks.report.groups import (
    Group,
    build_groups,
    differences,
    different_budgets,
    flatten,
    group_by,
)
from cyborg_torchrl.memory_benchmarks.report.runs import Run
from cyborg_torchrl.memory_benchmarks.report.xray import XRay
from cyborg_torchrl.training.stats import interquartile_mean

SHAPES = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼", "P": "✚", "X": "✖", "*": "★"}
DASH_ARRAYS = {"-": "none", "--": "6 3", ":": "2 3"}


def build_page(runs: Sequence[Run], xray: XRay | str) -> str:
    """Return the page as HTML.

    Args:
        runs: all runs. Those that did not finish are only listed.
        xray: the look into one agent's memory, or a sentence that says why there is none.
    """
    groups = build_groups(runs)
    names = sorted({group.backbone for group in groups})
    series = {name: index for index, name in enumerate(names)}
    together, left_out = together_table(groups)
    environment = Environment(
        loader=PackageLoader(__package__ or "", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    with matplotlib.rc_context(charts.STYLE):
        return environment.get_template("page.html").render(
            runs=runs,
            groups=groups,
            tasks={group.task for group in groups},
            statuses=sorted(Counter(run.status for run in runs if run.status != "finished").items()),
            legend=_legend(series),
            curves=_with_headings(charts.curve_charts(groups, series)),
            horizons=charts.horizon_charts(groups, series),
            scores=_with_headings(charts.score_charts(groups, series)),
            results=results_table(groups),
            different_budgets=different_budgets(groups),
            together=together,
            left_out=left_out,
            speeds=_with_headings(charts.speed_charts(groups, series)),
            speed_table=speed_table(groups),
            xray=xray_section(runs, xray),
            setups=setups_table(runs),
            run_rows=runs_table(runs, groups),
            folder=_common_folder(runs),
            written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC by cyborg_torchrl {version('cyborg-torchrl')}",
        )


def _with_headings(pictures: Sequence[Chart]) -> list[Chart]:
    """Return charts whose families are named only if there are several, and only those with several charts."""
    counts = Counter(chart.family for chart in pictures)
    return [chart if len(counts) > 1 and counts[chart.family] > 1 else chart._replace(family="") for chart in pictures]


def _legend(series: Series) -> list[dict[str, Any]]:
    legend = []
    for label, index in series.items():
        look = charts.look_of(index)
        legend.append({
            "label": label,
            "colour": index % charts.NUM_COLOURS,
            "shape": SHAPES[look["marker"]],
            "dashes": DASH_ARRAYS[look["linestyle"]],
        })  # fmt: skip
    return legend


def _link(text: str, anchor: str) -> Markup:
    return Markup('<a href="#{}">{}</a>').format(anchor, text)


def _anchor(text: str, anchor: str) -> Markup:
    """Return a text that links lead to."""
    return Markup('<span id="{}">{}</span>').format(anchor, text)


def results_table(groups: Sequence[Group]) -> Rows:
    """Return a row for each group: score, seeds, solved or not, steps until the target."""
    rows: Rows = []
    for index, group in enumerate(groups):
        scores, needed = group.scores, group.steps_to_target
        rows.append({
            "task": group.place,
            "backbone": _link(group.backbone, f"group-{index + 1}"),
            "measure": group.measure,
            "IQM [95 % interval]": str(group.score) if scores else "-",
            "mean": f"{mean(scores):.3f}" if scores else "-",
            "min": f"{min(scores):.3f}" if scores else "-",
            "seeds finished": f"{len(scores)} of {group.num_seeds}",
            "solved": _solved(group),
            "steps to target": "-" if needed is None else f"{needed:,.0f}",
            "steps trained": f"{median(run.steps for run in group.finished):,.0f}" if scores else "-",
            "MMER": f"{mean(mmer):.3f}" if (mmer := group.figures("mmer")) else "-",
            "published MMER": f"{group.published.best:.3f}" if group.published else "-",
        })  # fmt: skip
    if all(row["published MMER"] == "-" for row in rows):
        rows = [{name: row[name] for name in row if "MMER" not in name} for row in rows]
    return rows


def _solved(group: Group) -> str:
    if group.target is None or not group.scores or group.measure != "success":
        return "-"
    reached = sum(score >= group.target for score in group.scores)
    word = {len(group.scores): "yes", 0: "no"}.get(reached, "partly")
    return f"{word}: {reached} of {len(group.scores)} at {group.target:g}"


def together_table(groups: Sequence[Group]) -> tuple[Rows, list[str]]:
    """Return a row for each backbone, over all tasks that report success, and the backbones that are left out.

    A backbone needs the same number of seeds on each task. With fewer than two tasks there are no rows.
    """
    known = [group for group in groups if group.measure == "success" and group.scores]
    places = {group.place for group in known}
    rows: Rows = []
    left_out: list[str] = []
    if len(places) < 2:
        return rows, left_out
    for backbone in sorted({group.backbone for group in known}):
        scores = [group.scores for group in known if group.backbone == backbone]
        if len(scores) < len(places) or len(set(map(len, scores))) > 1:
            left_out.append(backbone)
            continue
        rows.append({
            "backbone": backbone,
            "tasks": str(len(places)),
            "seeds on each": str(len(scores[0])),
            "IQM [95 % interval]": str(interquartile_mean(np.array(scores).T)),
        })  # fmt: skip
    return rows, left_out


def speed_table(groups: Sequence[Group]) -> Rows:
    """Return a row for each group: speed, memory, time."""
    rows: Rows = []
    for index, group in enumerate(groups):
        rates = group.figures("steps_per_second")
        peaks = group.figures("peak_rss_mb")
        times = group.figures("total_seconds")
        rows.append({
            "task": group.place,
            "backbone": _link(group.backbone, f"group-{index + 1}"),
            "steps / s (median)": f"{median(rates):,.0f}" if rates else "-",
            "range": f"{min(rates):,.0f} to {max(rates):,.0f}" if rates else "-",
            "peak memory (MiB)": f"{max(peaks):,.0f}" if peaks else "-",
            "wall time (s, median)": f"{median(times):,.1f}" if times else "-",
            "runs": str(len(rates)),
        })  # fmt: skip
    return rows


def xray_section(runs: Sequence[Run], xray: XRay | str) -> dict[str, Any]:
    """Return the text, the charts and the findings of the look into a memory."""
    if isinstance(xray, str):
        return {"text": xray, "charts": [], "findings": []}
    drawn: list[Chart] = []
    text = "This agent has no memory state (train.recurrent_mode=none), so there is nothing to look into."
    findings: Rows = []
    if xray.report is not None and xray.episode is not None:
        if xray.report.horizon is not None:
            drawn.append(charts.gradient_chart(xray.report.horizon))
        drawn += [*charts.state_charts(xray.episode), *charts.slot_charts(xray.episode)]
        text, findings = _verdict(xray), _findings(xray.report)
    drawn += charts.drift_charts(xray.run.metrics)
    path = xray.run.path
    number = next((i + 1 for i, run in enumerate(runs) if run.path.resolve() == path.resolve()), None)
    source = str(path) if number is None else _link(f"Run {number}: {path.name}", f"run-{number}")
    return {"text": Markup("{}: {}").format(source, text), "charts": drawn, "findings": findings}


def _verdict(xray: XRay) -> str:
    report, episode = xray.report, xray.episode
    length = f"{len(episode.reward):,} steps, return {episode.reward.sum():.2f}"
    success = "" if episode.success is None or not episode.is_whole else f", success {episode.success:.2f}"
    part = "One fresh episode of" if episode.is_whole else "The beginning of an episode,"
    failed = ", ".join(finding.name for finding in report.failed)
    return f"{part} {length}{success}. {f'Failed checks: {failed}.' if failed else 'No check failed.'}"


def _findings(report: Report) -> Rows:
    rows: Rows = []
    for finding in report.findings:
        rows.append({
            "finding": finding.name,
            "value": "-" if finding.value is None else f"{finding.value:.3g}",
            "limit": "-" if finding.limit is None else f"{finding.limit:.3g}",
            "verdict": finding.verdict.replace("_", " "),
            "what it means": f"{finding.explanation} {finding.cure}".strip(),
        })  # fmt: skip
    return rows


def runs_table(runs: Sequence[Run], groups: Sequence[Group]) -> Rows:
    """Return a row for each run, the runs of a group together. A run's number is its position among all runs."""
    letters = {run.path: letter for letter, same in _setups(runs).items() for run in same}
    differing = differences([flatten(run.config) for run in runs])
    base = _common_folder(runs)
    positions = {run.path: index for index, run in enumerate(runs)}
    grouped: list[tuple[Run, Group | None, str | Markup]] = []
    for number, group in enumerate(groups):
        first = _anchor(group.backbone, f"group-{number + 1}")
        grouped += [(run, group, group.backbone if index else first) for index, run in enumerate(group.runs)]
    in_groups = {run.path for run, _, _ in grouped}
    grouped += [(run, None, "?") for run in runs if run.path not in in_groups]
    rows: Rows = []
    for run, group, backbone in grouped:
        position = positions[run.path]
        differs = [f"{key}={value}" for key, value in differing[position].items()]
        if group and group.missing:
            differs.append(f"without {', '.join(group.missing)}")
        rows.append({
            "run": _anchor(str(position + 1), f"run-{position + 1}"),
            "state": run.status,
            "task": group.place if group else "?",
            "backbone": backbone,
            "seed": "-" if run.seed is None else str(run.seed),
            "score": "-" if run.score is None else f"{run.score:.3f}",
            "steps": f"{run.steps:,}",
            "setup": letters.get(run.path, "-"),
            "differs in": " ".join(differs) or "-",
            "note": run.note or "-",
            "folder": str(run.path.absolute().relative_to(base) if base else run.path),
        })  # fmt: skip
    return rows


def setups_table(runs: Sequence[Run]) -> Rows:
    """Return a row for each setup: commit, versions, machine, number of runs."""
    rows: Rows = []
    for letter, same in _setups(runs).items():
        versions, machine = (same[0].manifest.get(key) or {} for key in ("versions", "machine"))
        started = sorted(str(run.manifest.get("started", "?")) for run in same)
        rows.append({
            "setup": letter,
            "runs": str(len(same)),
            "commit": str(same[0].manifest.get("commit") or "-"),
            "versions": ", ".join(f"{name} {number}" for name, number in versions.items()) or "-",
            "machine": ", ".join(f"{name} {value}" for name, value in machine.items() if value) or "-",
            "started": " to ".join(dict.fromkeys((started[0], started[-1]))),
        })  # fmt: skip
    return rows


def _setups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the runs of each commit, versions and machine, by letters: A to Z, then AA, BB."""

    def setup(run: Run) -> str:
        return json.dumps([run.manifest.get(key) for key in ("commit", "versions", "machine")], sort_keys=True)

    setups = group_by((run for run in runs if run.manifest), setup)
    return {chr(ord("A") + i % 26) * (1 + i // 26): same for i, same in enumerate(setups.values())}


def _common_folder(runs: Sequence[Run]) -> Path | None:
    """Return the folder that contains all runs; None if there is none, or only one run."""
    try:
        return Path(os.path.commonpath([run.path.absolute().parent for run in runs])) if len(runs) > 1 else None
    except ValueError:  # on several drives
        return None
