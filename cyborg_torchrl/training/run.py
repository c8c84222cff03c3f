"""What a run leaves behind: manifest, configuration, metrics, checkpoints, summary."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import platform
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.tensorboard import SummaryWriter

from cyborg_torchrl.config import ConfigError
from cyborg_torchrl.registry import environments
from cyborg_torchrl.training.checkpoint import CheckpointFolder
from cyborg_torchrl.training.loggers import MetricBackends, require_packages

COLUMNS: tuple[str, ...] = (
    "update", "steps", "seconds", "steps_per_second", "episodes", "success_rate", "mean_reward", "reward_per_step",
    "explained_variance", "loss_objective", "loss_critic", "loss_entropy", "entropy", "kl_approx", "clip_fraction",
    "grad_norm", "ratio_error", "epochs", "learning_rate",
)  # fmt: skip


class RunDirectory:
    """The folder of one run.

    Holds `manifest.json`, `config.yaml`, `logs/metrics.csv`, TensorBoard's files in `logs/`, `checkpoints/`
    (`CheckpointFolder`), and at the end `summary.json`. Metrics are on disk as soon as they are logged. As long as the
    object lives no other process can write into the folder.

    Args:
        path: the folder, which must not hold a run yet, unless it is resumed.
        cfg: the configuration, written as it was used.
        resumed_at: the update that the run goes on from; what was logged later is dropped. None: a new run.

    Raises:
        FileExistsError: if there is a run in the folder already, or another process is at it.
        ConfigError: if a backend of the metrics cannot be reached.
    """

    def __init__(self, path: Path, cfg: DictConfig, resumed_at: int | None = None) -> None:
        if resumed_at is None and (path / "manifest.json").exists():
            raise FileExistsError(f"{path} holds a run already; choose another run name, or resume=auto.")
        self.path, self.cfg = path, cfg
        require_packages(cfg.logger.backends)
        (path / "logs").mkdir(parents=True, exist_ok=True)
        self._lock = lock_run(path)
        if self._lock is None:
            raise FileExistsError(f"another process is training {path}.")
        try:
            self._backends = MetricBackends(cfg, path, is_resumed=resumed_at is not None)
        except ConfigError:
            self._lock.close()
            raise
        self.checkpoints = CheckpointFolder(path / "checkpoints", cfg.logger.keep_checkpoints)
        self.checkpoints.clean()
        self._write("config.yaml", OmegaConf.to_yaml(cfg))
        self.write_json("manifest.json", self._manifest(resumed_at))
        (path / "summary.json").unlink(missing_ok=True)
        metrics = path / "logs" / "metrics.csv"
        self._columns = _keep_rows(metrics, resumed_at or 0)
        self._file = metrics.open("a", newline="")
        self._writer: csv.DictWriter[str] | None = None
        self._tensorboard = SummaryWriter(str(path / "logs")) if cfg.logger.tensorboard else None
        self._thread_hook = threading.excepthook
        threading.excepthook = _without_errors_of_tensorboard(self._thread_hook)

    def log(self, metrics: Mapping[str, float]) -> None:
        """Appends a row to metrics.csv, whose columns are those of the first row, and points to TensorBoard."""
        if self._writer is None:
            columns = self._columns or [*COLUMNS, *(name for name in metrics if name not in COLUMNS)]
            self._writer = csv.DictWriter(self._file, columns, restval="", extrasaction="ignore")
            if not self._columns:
                self._writer.writeheader()
        self._writer.writerow(metrics)
        self._file.flush()
        self._send(metrics, int(metrics["steps"]))

    def log_evaluation(self, figures: Mapping[str, float | None], steps: int) -> None:
        """Points of an evaluation after so many steps, as "eval/..." to TensorBoard and the backends; no row."""
        self._send({f"eval/{name}": value for name, value in figures.items() if value is not None}, steps)

    def save(self, content: dict[str, Any], update: int, score: float | None) -> None:
        """Writes a checkpoint.

        Raises:
            OSError: if it cannot be written.
        """
        content = {"config": OmegaConf.to_container(self.cfg), "update": update, **content}
        self.checkpoints.save(content, update, score)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes a JSON file into the folder."""
        self._write(name, json.dumps(content, indent=2) + "\n")

    def close(self) -> None:
        """Closes the logs, and lets others into the folder."""
        with contextlib.suppress(OSError):  # of a full disk, of which `log` has told
            self._file.close()
        self._backends.close()
        if self._tensorboard is not None:
            with contextlib.suppress(OSError):
                self._tensorboard.close()
        threading.excepthook = self._thread_hook
        if self._lock is not None:
            self._lock.close()

    def _send(self, metrics: Mapping[str, float], steps: int) -> None:
        self._backends.log(metrics, steps)
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, steps)

    def _manifest(self, resumed_at: int | None) -> dict[str, Any]:
        now = manifest(self.cfg)
        if resumed_at is None:
            return now
        before = json.loads((self.path / "manifest.json").read_text())
        again = {"update": resumed_at, **{key: now[key] for key in ("started", "command", "commit")}}
        return {**before, "resumed": [*before.get("resumed", []), again]}

    def _write(self, name: str, text: str) -> None:
        """In one piece or not at all."""
        temporary = self.path / f".{name}.tmp"
        temporary.write_text(text)
        temporary.replace(self.path / name)


def _without_errors_of_tensorboard(hook: Callable[[threading.ExceptHookArgs], Any]) -> Callable[..., Any]:
    """A hook for errors of threads that leaves out what TensorBoard's writer raises in `log` once more."""

    def own(arguments: threading.ExceptHookArgs) -> None:
        is_writer = type(arguments.thread).__module__.startswith("tensorboard.")
        if not (is_writer and isinstance(arguments.exc_value, OSError)):
            hook(arguments)

    return own


class NoDirectory:
    """Stands for the folder of a run where another process writes it.

    Args:
        path: the folder.
        cfg: the configuration.
    """

    def __init__(self, path: Path, cfg: DictConfig) -> None:
        self.path, self.cfg = path, cfg

    def log(self, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def log_evaluation(self, figures: Mapping[str, float | None], steps: int) -> None:
        """Nothing."""

    def save(self, content: dict[str, Any], update: int, score: float | None) -> None:
        """Nothing."""

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def lock_run(path: Path) -> IO[str] | None:
    """Takes a run's folder for this process, until what is returned is closed; None if another has it."""
    file = (path / ".lock").open("w")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # not on this system: nobody is kept out
        pass
    except OSError:
        file.close()
        return None
    return file


def _keep_rows(path: Path, update: int) -> list[str]:
    """Drops what metrics.csv says of later updates, and a half line. Returns its columns; none if there are no rows."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        columns = list(reader.fieldnames or [])
        whole = [row for row in reader if None not in row.values() and None not in row]
    kept = [row for row in whole if row["update"].isdigit() and int(row["update"]) <= update]
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        if kept:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(kept)
    temporary.replace(path)
    return columns if kept else []


def default_run_name(cfg: DictConfig) -> str:
    """Task (its id where it has one), backbone, seed and time."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
    task = re.sub(r"[^\w.-]+", "_", str(cfg.env.get("id") or environments.title(cfg.env.name, cfg.env)))
    return f"{task}-{cfg.backbone.name}-s{cfg.train.seed}-{stamp}"


def manifest(cfg: DictConfig) -> dict[str, Any]:
    """Versions, commit, seed and machine: what is needed to repeat a run."""
    packages = ("cyborg-torchrl", "torch", "torchrl", "tensordict", "hydra-core")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "seed": cfg.train.seed,
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
        "machine": {
            "platform": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "gpu": device,
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ModuleNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the checkout that the package runs from, with "-dirty" if it was changed; None outside of one."""
    folder = Path(__file__).parent
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
