"""Train all combinations of several values, one run each, and print a table.

    cyborg-torchrl sweep backbone=lru,gru env=delayed_cue,n_back 'train.seed=range(3)' --jobs 2
    cyborg-torchrl sweep --config mine.yaml train.learning_rate=1e-3,3e-3 --folder runs/rates

--folder holds a folder for each run, and results.csv with a row for each. The same command with the same --folder
continues: finished runs are kept, and others continue from their last checkpoint. A run that fails does not end the
sweep. Exit code: 0, 1 if a run failed, 2 for bad input, 130 if interrupted.
"""

from __future__ import annotations

import io
import logging
import math
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override, ValueType
from hydra.core.utils import env_override
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from cyborg_torchrl.cli.train import hydra_parser, parse_overrides, run_hydra
from cyborg_torchrl.config import load_config
from cyborg_torchrl.config.checks import validate
from cyborg_torchrl.config.imports import import_components
from cyborg_torchrl.memory_benchmarks.report.groups import group_by
from cyborg_torchrl.memory_benchmarks.results import (
    JOB_FILE,
    Job,
    Row,
    finished_job,
    folder_name,
    measured_of,
    override_keys,
    read_jobs,
    write_rows,
)
from cyborg_torchrl.registry import UnavailableError
from cyborg_torchrl.training.builders import prepare_process
from cyborg_torchrl.training.command import EXIT_FAILED, EXIT_INTERRUPTED, KNOWN_ERRORS, UsageError, positive, writable
from cyborg_torchrl.training.experiment import StoppedError, run_experiment, terminations_as_interrupt
from cyborg_torchrl.training.stats import mean_interval

LOKY_WARNING = "ignore:resource_tracker:UserWarning"
"""joblib prints it when Ctrl-C ends its processes."""


def main(argv: Sequence[str]) -> int:
    """Run the command. Return the exit code."""
    parser = hydra_parser("sweep", __doc__, argv)
    parser.add_argument("--folder", help="folder of the runs (runs/sweep-DATE-TIME)")
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="runs at the same time (%(default)s)")
    parser.add_argument("--target", type=float, help="success, or return, that counts as solved (the task's own)")
    parser.add_argument("--markdown", type=writable, metavar="FILE", help="write the table as Markdown, too")
    arguments = parser.parse(argv)
    overrides = [*arguments.overrides, *_launcher(arguments.jobs)]
    first = _first_configuration(arguments.config, overrides)
    if arguments.print_config:
        print(OmegaConf.to_yaml(first), end="")
        return 0
    folder = Path(arguments.folder or f"{first.logger.base_dir}/sweep-{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--folder: cannot write to '{folder}' ({error.strerror})") from None
    print(f"runs are in {folder}", file=sys.stderr)
    hint = f"the same command with --folder {folder} continues"
    try:
        with terminations_as_interrupt(), env_override({"PYTHONWARNINGS": LOKY_WARNING}):
            run_hydra(run_job, arguments.config, overrides, ["--multirun"], str(folder))
    except BrokenProcessPool:
        raise StoppedError(f"a process of the sweep was killed (out of memory?); {hint}") from None
    except KeyboardInterrupt:
        print(f"interrupted; {hint}", file=sys.stderr)
        return EXIT_INTERRUPTED
    return _report(folder, arguments.target, arguments.markdown)


def _launcher(jobs: int) -> list[str]:
    """Return the overrides that let Hydra start so many runs at the same time.

    Raises:
        UnavailableError: if Hydra's joblib launcher is not installed.
    """
    if jobs == 1:
        return []
    try:
        import hydra_plugins.hydra_joblib_launcher  # noqa: F401
    except ImportError:
        raise UnavailableError("--jobs needs more packages: pip install 'cyborg-torchrl[sweep]'") from None
    return ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={jobs}"]


def _first_configuration(config: str, overrides: Sequence[str]) -> DictConfig:
    """Return the first run's configuration, so that a mistake in all of them is reported before any run.

    Raises:
        ConfigError: if it cannot be used.
        UsageError: for an override that a sweep sets itself.
    """
    parsed = parse_overrides(config, overrides)
    for override in parsed:
        key = override.get_key_element()
        if key == "hydra.sweep.dir":
            raise UsageError("--folder replaces hydra.sweep.dir")
        if key == "logger.run_name" or (override.is_sweep_override() and key.startswith("logger.")):
            raise UsageError(f"a sweep names its runs, and logs them alike: leave '{override.input_line}' out")
        if key in ("resume", "logger.resume") and override.value() != "auto":
            raise UsageError(f"a sweep resumes its own runs, by --folder: leave '{override.input_line}' out")
        if override.value_type in (ValueType.CHOICE_SWEEP, ValueType.SIMPLE_CHOICE_SWEEP):
            values = list(override.sweep_string_iterator())
            if len(set(values)) < len(values):
                raise UsageError(f"'{override.input_line}' has a value twice; each run has its own values")
    return load_config(config, [text for override in parsed for text in _first_value(override)])


def _first_value(override: Override) -> list[str]:
    if override.is_hydra_override():
        return []
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if override.value_type == ValueType.GLOB_CHOICE_SWEEP:  # only Hydra knows the values
        return []
    if override.value_type == ValueType.INTERVAL_SWEEP:
        value: Any = override.value()
        return [f"{override.get_key_element()}={value.start}"]
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()][:1]


def run_job(cfg: DictConfig) -> float:
    """Train one run of a sweep.

    Returns:
        Success, or the mean return where the task has no success: the objective of Hydra's sweepers. NaN for a run
        that failed; `job.json` in its folder says why.

    Raises:
        KeyboardInterrupt: if the run was interrupted.
    """
    logging.getLogger("torchrl").setLevel(logging.WARNING)  # this may be a new process
    hydra: Any = HydraConfig.get()
    if "joblib" in hydra.launcher._target_:  # the process that started this one handles Ctrl-C, and ends all
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    given = (text.lstrip("+").partition("=") for text in hydra.overrides.task)
    overrides = {key: value for key, _, value in given if not key.startswith("logger.") and key != "imports"}
    folder = Path(hydra.sweep.dir) / folder_name(overrides)
    cfg.logger.base_dir, cfg.logger.run_name = str(folder.parent), folder.name
    cfg.logger.progress = False
    cfg.logger.resume = "auto"
    name = f"run {hydra.job.num}, {folder.name}"
    config: Any = OmegaConf.to_container(cfg)
    job, finished = Job(overrides, config), finished_job(folder)
    (finished or job).write(folder)
    print(f"{name}: started", file=sys.stderr)
    notes = io.StringIO()
    try:
        OmegaConf.resolve(cfg)
        import_components(cfg.imports)
        validate(cfg)
        prepare_process(cfg)
        with redirect_stderr(notes):  # an interrupted run tells how to resume it alone
            summary = run_experiment(cfg)
    except Exception as error:  # the other runs must not end with this one
        text = str(error)
        if not isinstance(error, KNOWN_ERRORS):
            (folder / "error.txt").write_text(traceback.format_exc())
            text = " ".join(f"{type(error).__name__}: {error} (see error.txt in its folder)".split())
        _record(replace(job, error=text) if finished is None else replace(finished, later_error=text), folder)
        print(f"{notes.getvalue()}error: {name}: {text}", file=sys.stderr)
        return math.nan
    if summary["is_interrupted"]:
        raise KeyboardInterrupt
    _record(replace(job, error="", measured=measured_of(summary)), folder)
    print(f"{notes.getvalue()}{name}: {_score(summary):.3f} in {summary['total_seconds']:.0f} s", file=sys.stderr)
    return _score(summary)


def _record(job: Job, folder: Path) -> None:
    job.write(folder)
    write_rows(folder.parent)


def _report(folder: Path, target: float | None, markdown: Path | None) -> int:
    rows = write_rows(folder)
    headers, lines = table(rows, target)
    shown = Table(*headers, title="success on fresh episodes (mean return where a task has no success), over seeds")
    for line in lines:
        shown.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 200).print(shown)
    if markdown:
        markdown.write_text("".join(f"| {' | '.join(line)} |\n" for line in (headers, ["---"] * len(headers), *lines)))
    jobs = {path.name: job for path, job in read_jobs(folder.glob(f"*/{JOB_FILE}")).items()}
    for run, job in jobs.items():
        if job.error:
            print(f"failed: {run}: {job.error}")
        elif job.later_error:
            print(f"failed: {run}: {job.later_error} (the table has its earlier result)")
    return EXIT_FAILED if any(job.error or job.later_error for job in jobs.values()) else 0


def table(rows: Sequence[Row], target: float | None = None) -> tuple[list[str], list[list[str]]]:
    """Return the headers and the lines of a table: a line for each group of runs that differ only in the seed.

    Args:
        rows: from `write_rows`.
        target: the score that counts as solved; None: the target of each task.
    """
    varied = [key for key in override_keys(rows) if len({row.get(key, "") for row in rows}) > 1]
    names = ["task", "backbone", *varied]
    groups = group_by(rows, lambda row: tuple(str(row.get(name, "")) for name in names))
    measured = ("horizon", "steps", "mean", "95 %", "min", "seeds", "target", "solved", "s/run", "MiB")
    return [*names, *measured], [[*group, *_measured(runs, target)] for group, runs in sorted(groups.items())]


def _measured(runs: Iterable[Row], target: float | None) -> list[str]:
    """Return the cells of a group's results; "-" where there are none."""
    runs = sorted(runs, key=lambda row: row["seed"])
    finished = [row for row in runs if not row["error"]]
    scores = [_score(row) for row in finished]
    target = runs[0]["target"] if target is None else target
    seeds = " ".join("failed" if row["error"] else f"{_score(row):.2f}" for row in runs)
    solved = "-" if target is None else f"{sum(score >= target for score in scores)}/{len(runs)}"
    goal = "-" if target is None else f"{target:g}"
    if not finished:
        return ["-", "-", "-", "-", "-", seeds, goal, solved, "-", "-"]
    first = finished[0]
    return [
        f"{first['horizon']:,}" if first["horizon"] else "-",
        f"{first['total_timesteps']:,}",
        f"{mean(scores):.3f}",
        _interval(scores, is_rate=first["success_rate"] is not None),
        f"{min(scores):.3f}",
        seeds,
        goal,
        solved,
        f"{mean(row['total_seconds'] for row in finished):.0f}",
        f"{max(row['peak_rss_mb'] for row in finished):.0f}",
    ]


def _interval(scores: Sequence[float], *, is_rate: bool) -> str:
    """Return Student's interval over seeds; a success rate stays in [0, 1]."""
    interval = mean_interval(torch.tensor(scores, dtype=torch.float64))
    if interval is None:
        return "-"
    low, high = torch.tensor(interval).clamp(0.0, 1.0).tolist() if is_rate else interval
    return f"{low:.3f} to {high:.3f}"


def _score(row: Row) -> float:
    """Return success, or the mean return where the task has no success."""
    score = row["mean_reward"] if row["success_rate"] is None else row["success_rate"]
    return math.nan if score is None else float(score)
