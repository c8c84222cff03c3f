"""Jobs of Hydra: one run alone, or the runs of a sweep, each in a folder that tells what is asked of it."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import shlex
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from cyborg_torchrl.cli import EXIT_BAD_INPUT, KNOWN_ERRORS, report_error, report_summary
from cyborg_torchrl.config import validate
from cyborg_torchrl.experiment import run_experiment
from cyborg_torchrl.memory_benchmarks.sweep import (
    ASKED,
    MEASURED,
    OWN_OPTIONS,
    Cell,
    failed_row,
    finished_row,
    table,
)
from cyborg_torchrl.resumption import with_config_of_run

EXIT_FAILED = 1
JOB_FILE = "job.json"
UNFINISHED = "has not ended"


def cell_of_job(cfg: DictConfig, hydra: Any) -> Cell:
    """What is asked of a job, as the cell of a sweep's table; what is not overridden is the task's own."""
    given = {override.lstrip("+~").partition("=")[0]: override for override in hydra.overrides.task}
    rest = [text for key, text in given.items() if key not in OWN_OPTIONS and not key.startswith("logger")]
    name, identity = cfg.env.name, cfg.env.get("id")
    return Cell(
        task=name if identity is None else f"{name}:{identity}",
        backbone=cfg.backbone.name,
        horizon=cfg.env.horizon if "env.horizon" in given else None,
        seed=cfg.train.seed,
        total_timesteps=cfg.train.total_timesteps if "train.total_timesteps" in given else None,
        overrides=shlex.join(rest),
        level=cfg.env.level if "env.level" in given else None,
        config=hydra.callbacks.table.config,
    )


def _folder_of_job(*, _root_: DictConfig) -> str:
    return cell_of_job(_root_, _root_.hydra).folder


# at import: in the processes of a launcher this module is imported before a job's folder is asked for
OmegaConf.register_new_resolver("cyborg_torchrl_folder", _folder_of_job, replace=True)


def run_job(cfg: DictConfig) -> float:
    """Trains as configured: Hydra's task function.

    Returns:
        Success, or the mean return where the task knows no success: the objective of Hydra's sweepers. NaN for a job
        of a sweep that failed; why is in its folder, and the others go on.

    Raises:
        KeyboardInterrupt: in a sweep, if the run was interrupted.
        SystemExit: alone, with the exit code of a run that failed or was interrupted.
    """
    logging.getLogger("torchrl").setLevel(logging.WARNING)  # a launcher's process has not heard of it
    hydra: Any = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN:
        return _run_in_sweep(cfg, hydra)
    try:
        summary = _train(with_config_of_run(cfg, list(hydra.overrides.task)))
    except KNOWN_ERRORS as error:
        raise SystemExit(report_error(error)) from None
    if code := report_summary(summary):
        raise SystemExit(code)
    return _objective(summary)


def _run_in_sweep(cfg: DictConfig, hydra: Any) -> float:
    cell, sweep = cell_of_job(cfg, hydra), Path(hydra.sweep.dir)
    folder, name = sweep / cell.folder, f"run {hydra.job.num}, {cell.folder}"
    cfg.logger.base_dir, cfg.logger.run_name, cfg.logger.progress = str(sweep), cell.folder, False
    cfg.logger.resume = "auto"  # what has ended is taken over, what was cut short goes on
    print(f"{name}: started", file=sys.stderr)
    _record(folder, cell, UNFINISHED)
    try:
        summary = _train(cfg)
    except Exception as error:  # whatever it is: the other runs go on
        text = str(error)
        if not isinstance(error, KNOWN_ERRORS):
            (folder / "error.txt").write_text(traceback.format_exc())
            text = " ".join(f"{type(error).__name__}: {error} (see error.txt in its folder)".split())
        _record(folder, cell, text)
        print(f"error: {name}: {text}", file=sys.stderr)
        return math.nan
    if summary["is_interrupted"]:
        raise KeyboardInterrupt
    _record(folder, cell, "")
    print(f"{name}: {_objective(summary):.3f} in {summary['total_seconds']:.0f} s", file=sys.stderr)
    return _objective(summary)


def _train(cfg: DictConfig) -> dict[str, Any]:
    OmegaConf.resolve(cfg)
    validate(cfg)
    return run_experiment(cfg)


def _objective(summary: dict[str, Any]) -> float:
    known = summary["mean_reward"] if summary["success_rate"] is None else summary["success_rate"]
    return math.nan if known is None else float(known)


def _record(folder: Path, cell: Cell, error: str) -> None:
    scratch = folder / f"{JOB_FILE}.tmp"  # another process may be reading
    scratch.write_text(json.dumps({"cell": asdict(cell), "error": error}, indent=2) + "\n")
    scratch.replace(folder / JOB_FILE)
    write_table(folder.parent)


def read_jobs(sweep: Path) -> list[dict[str, Any]]:
    """A row of the sweep's table for each job in its folder."""
    rows: list[dict[str, Any]] = []
    for file in sorted(sweep.glob(f"*/{JOB_FILE}")):
        job = json.loads(file.read_text())
        cell = Cell(**job["cell"])
        if job["error"]:
            rows.append(failed_row(cell, job["error"]))
        else:
            rows.append(finished_row(cell, json.loads((file.parent / "summary.json").read_text())))
    return rows


def write_table(sweep: Path) -> list[dict[str, Any]]:
    """Writes `results.csv` as `memory_benchmarks.sweep` does; several processes may do it at once. Returns its rows."""
    rows = read_jobs(sweep)
    scratch = sweep / f"results.csv.{os.getpid()}"
    with scratch.open("w", newline="") as file:
        writer = csv.DictWriter(file, (*ASKED, *MEASURED), restval="")
        writer.writeheader()
        writer.writerows(rows)
    scratch.replace(sweep / "results.csv")
    return rows


class SweepTable(Callback):
    """Says where the runs of a sweep are, and prints their table at the end.

    Args:
        config: the configuration that they differ from, as the user named it.
    """

    def __init__(self, config: str) -> None:
        self.config = config

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Makes the folder of the runs, and says where it is.

        Raises:
            SystemExit: if it cannot be written; Hydra makes warnings of other exceptions.
        """
        folder = config.hydra.sweep.dir
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            print(f"error: hydra.sweep.dir: cannot write to '{folder}' ({error.strerror}).", file=sys.stderr)
            raise SystemExit(EXIT_BAD_INPUT) from None
        print(f"runs are in {folder}", file=sys.stderr)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Prints the table.

        Raises:
            SystemExit: if a run failed; Hydra makes warnings of other exceptions.
        """
        rows = write_table(Path(config.hydra.sweep.dir))
        Console(width=200).print(table(rows))
        if any(row["error"] for row in rows):
            raise SystemExit(EXIT_FAILED)
