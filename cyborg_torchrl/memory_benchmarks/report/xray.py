"""The memory of one trained agent, looked into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from cyborg_torchrl.checks import Report
from cyborg_torchrl.memory_benchmarks.report.charts import Chart, Row, Table
from cyborg_torchrl.memory_benchmarks.report.memory_charts import (
    drift_charts,
    horizon_chart,
    slot_charts,
    state_charts,
)
from cyborg_torchrl.memory_benchmarks.report.recording import Episode, check_agent, record_episode
from cyborg_torchrl.memory_benchmarks.report.runs import (
    ReportError,
    Run,
    number,
    read_run,
    run_folders,
)
from cyborg_torchrl.training.loading import load_agent


class XRay(NamedTuple):
    """What a look into an agent's memory found."""

    run: Run
    sentence: str
    """What episode was looked at, and what the checks say."""
    charts: list[Chart]
    findings: Table | None
    """What `check_recurrent` found; None for an agent without memory."""


def look(runs: Sequence[Run], path: Path | None, on_progress: Callable[[str], None] = lambda _: None) -> XRay | str:
    """Looks into the run at the path; without one, into a finished run of the best score.

    Args:
        runs: to choose from.
        path: a run's folder, among these or not.
        on_progress: called with the name of what comes next.

    Returns:
        What was found; where nobody asked for a run and the chosen one cannot be used, a sentence that says why.

    Raises:
        ReportError: if the run at the path cannot be used; ConfigError, CheckpointError, UnavailableError: likewise.
    """
    if path is not None:
        return take(path, on_progress)
    able = [run for run in runs if run.status == "finished" and (run.path / "checkpoints" / "last.pt").is_file()]
    if not able:
        return "No finished run has a checkpoint to look into."
    chosen = max(able, key=_worth)
    try:
        return take(chosen.path, on_progress)
    except ValueError as error:  # of the checkpoint, of its configuration, of what is not installed
        return f"{chosen.path} could not be looked into: {error}"


def _worth(run: Run) -> tuple[bool, bool, float, bool, float]:
    """What makes a run worth looking into: memory, a success rate, the score, slots, the horizon."""
    has_memory = run.config.get("train", {}).get("recurrent_mode") != "none"
    has_slots = run.config.get("memory", {}).get("name") == "pmm"
    horizon = number(run.summary.get("horizon")) or 0.0
    return has_memory, run.measure == "success", run.score or 0.0, has_slots, horizon


def take(path: Path, on_progress: Callable[[str], None]) -> XRay:
    """Loads a run's last checkpoint, plays an episode and checks the agent.

    Raises:
        ReportError: if the path is no run's folder, or the agent cannot be checked.
        CheckpointError: if there is no usable checkpoint.
        ConfigError: if its configuration cannot be used here.
        UnavailableError: if its environment is not installed.
    """
    if not run_folders(path)[:1] == [path]:
        raise ReportError(f"--xray: '{path}' is not a run's folder, which holds manifest.json and checkpoints.")
    run = read_run(path)
    cfg, agent, _ = load_agent(path)
    drift = drift_charts(run.metrics)
    if not agent.backbone.state_keys:
        said = "This agent has no memory state (train.recurrent_mode=none), so there is nothing to look into."
        return XRay(run, said, drift, None)
    try:
        report = check_agent(cfg, agent, on_progress)
    except (KeyError, ValueError) as error:  # it says what a policy or its environment lacks
        raise ReportError(f"{path} cannot be checked: {error.args[0]}") from None
    on_progress("an episode")
    episode = record_episode(cfg, agent)
    horizon = [] if report.horizon is None else [horizon_chart(report.horizon)]
    charts = [*horizon, *state_charts(episode), *slot_charts(episode), *drift]
    return XRay(run, _sentence(episode, report), charts, findings_table(report))


def _sentence(episode: Episode, report: Report) -> str:
    length = len(episode.reward)
    whole = "One fresh episode of" if episode.is_whole else "The beginning of an episode,"
    success = "" if episode.success is None or not episode.is_whole else f", success {episode.success:.2f}"
    failed = ", ".join(finding.name for finding in report.failed)
    verdict = f"Failed checks: {failed}." if failed else "All checks passed."
    return f"{whole} {length:,} steps, return {episode.reward.sum():.2f}{success}. {verdict}"


def findings_table(report: Report) -> Table:
    """What the checker found, one line each."""
    rows: list[Row] = []
    for finding in report.findings:
        figures = ["-" if value is None else f"{value:.3g}" for value in (finding.value, finding.limit)]
        said = f"{finding.explanation} {finding.cure}".strip()
        rows.append((finding.name, *figures, finding.verdict.replace("_", " "), said))
    return Table(("finding", "value", "limit", "verdict", "what it means"), rows, is_folded=True)
