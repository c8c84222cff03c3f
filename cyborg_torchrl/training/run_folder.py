"""The folder of a run: manifest, configuration, metrics, checkpoints, summary."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import json
import os
import platform
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch
from omegaconf import DictConfig, OmegaConf

from cyborg_torchrl.config import ConfigError
from cyborg_torchrl.registry import environments
from cyborg_torchrl.training.checkpoint import CheckpointFolder, write_whole
from cyborg_torchrl.training.loggers import MetricBackends, require_packages

COLUMNS: tuple[str, ...] = (
    "update", "steps", "seconds", "steps_per_second", "seconds_collect", "seconds_advantages", "seconds_update",
    "seconds_checkpoint", "episodes", "success_rate", "mean_reward", "mmer", "reward_per_step",
    "explained_variance", "loss_objective", "loss_critic", "loss_entropy", "entropy", "kl", "kl_approx",
    "clip_fraction", "grad_norm", "ratio_error", "epochs", "learning_rate",
    "eval/success_rate", "eval/mean_reward", "eval/episodes", "eval/cut_episodes", "eval/seconds",
)  # fmt: skip


class RunFolder:
    """The folder of one run.

    It has `manifest.json`, `config.yaml`, `logs/metrics.csv`, TensorBoard's files in `logs/`, `checkpoints/`
    (`CheckpointFolder`), and at the end `summary.json`. Metrics are on disk as soon as they are logged. Until `close`,
    no other process can train in the folder.

    Args:
        path: the folder. A new run needs a folder without results.
        cfg: the configuration.
        resumed_at: the update from which the run continues; metrics of later updates are dropped. None: a new run.
        about: more entries of the manifest of a new run.

    Raises:
        ConfigError: if the folder already has results, another process uses it, or a metric backend cannot be reached.
        OSError: if the folder cannot be written.
    """

    def __init__(
        self, path: Path, cfg: DictConfig, resumed_at: int | None = None, about: Mapping[str, Any] | None = None
    ) -> None:
        self.path, self.cfg = path, cfg
        require_packages(cfg.logger.backends)
        (path / "logs").mkdir(parents=True, exist_ok=True)
        lock = lock_run(path)
        if lock is None:
            raise ConfigError(f"logger.run_name: another process is training {path}.")
        self._lock = lock
        try:
            if resumed_at is None and has_results(path):
                raise ConfigError(
                    f"logger.run_name: {path} holds a run already; choose another run name, or resume=auto."
                )
            self._backends = MetricBackends(cfg, path, is_resumed=resumed_at is not None)
        except ConfigError:
            self._lock.close()
            raise
        self.checkpoints = CheckpointFolder(path / "checkpoints", cfg.logger.keep_checkpoints)
        self.checkpoints.clean()
        write_whole(path / "config.yaml", OmegaConf.to_yaml(cfg).encode())
        self.write_json("manifest.json", self._manifest(resumed_at, about or {}))
        (path / "summary.json").unlink(missing_ok=True)
        if resumed_at is None:
            for old in (path / "logs").glob("events.out.tfevents.*"):  # of a run that failed
                old.unlink()
        metrics = path / "logs" / "metrics.csv"
        self._columns = _keep_rows(metrics, resumed_at or 0)
        self._file = metrics.open("a", newline="")
        self._writer: csv.DictWriter[str] | None = None
        self._tensorboard = _tensorboard_writer(path / "logs") if cfg.logger.tensorboard else None
        self._thread_hook = threading.excepthook
        threading.excepthook = _without_tensorboard_errors(self._thread_hook)

    def log(self, metrics: Mapping[str, float]) -> None:
        """Append a row to metrics.csv, and send the metrics to TensorBoard and the backends.

        The columns are the metrics of the first row.
        """
        if self._writer is None:
            columns = self._columns or [*COLUMNS, *(name for name in metrics if name not in COLUMNS)]
            self._writer = csv.DictWriter(self._file, columns, restval="", extrasaction="ignore")
            if not self._columns:
                self._writer.writeheader()
        self._writer.writerow(metrics)
        self._file.flush()
        self._send(metrics, int(metrics["steps"]))

    def log_evaluation(self, metrics: Mapping[str, float], steps: int) -> None:
        """Send the metrics of the evaluation after training to TensorBoard and the backends."""
        self._send(metrics, steps)

    def save(self, content: dict[str, Any], update: int, score: float | None) -> None:
        """Write a checkpoint.

        Raises:
            OSError: if it cannot be written.
        """
        content = {"config": OmegaConf.to_container(self.cfg), "update": update, **content}
        self.checkpoints.save(content, update, score)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file into the folder."""
        write_whole(self.path / name, (json.dumps(content, indent=2) + "\n").encode())

    def close(self) -> None:
        """Close the logs, and release the folder for other processes."""
        with contextlib.suppress(OSError):  # a full disk, which `log` has reported
            self._file.close()
        self._backends.close()
        if self._tensorboard is not None:
            with contextlib.suppress(OSError):
                self._tensorboard.close()
        threading.excepthook = self._thread_hook
        self._lock.close()

    def _send(self, metrics: Mapping[str, float], steps: int) -> None:
        self._backends.log(metrics, steps)
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, steps)

    def _manifest(self, resumed_at: int | None, about: Mapping[str, Any]) -> dict[str, Any]:
        now = {**manifest(self.cfg), **about}
        if resumed_at is None:
            return now
        first = json.loads((self.path / "manifest.json").read_text())
        restart = {"update": resumed_at, **{key: now.get(key) for key in ("started", "command", "commit", "kernels")}}
        return {**first, "resumed": [*first.get("resumed", []), restart]}


def _tensorboard_writer(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # here, since its import takes a second

    return SummaryWriter(str(folder))


def _without_tensorboard_errors(hook: Callable[[threading.ExceptHookArgs], Any]) -> Callable[..., Any]:
    """Return a hook for errors of threads that ignores file errors of TensorBoard's thread; `log` raises them too."""

    def hook_of_run(arguments: threading.ExceptHookArgs) -> None:
        is_writer = type(arguments.thread).__module__.startswith("tensorboard.")
        if not (is_writer and isinstance(arguments.exc_value, OSError)):
            hook(arguments)

    return hook_of_run


def has_results(path: Path) -> bool:
    """Return whether a run's folder holds a checkpoint, or the summary of a run that was not interrupted.

    A run that failed before its first checkpoint leaves no results, and a new run may use its folder.
    """
    if any((path / "checkpoints").glob("*.pt")):
        return True
    try:
        return not json.loads((path / "summary.json").read_text()).get("is_interrupted", False)
    except (OSError, ValueError):
        return False


def lock_run(path: Path) -> IO[str] | None:
    """Lock a run's folder until the returned file is closed. Return None if another process has the lock."""
    file = (path / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def _keep_rows(path: Path, update: int) -> list[str]:
    """Drop incomplete rows of metrics.csv, and those of later updates. Return its columns; [] without rows."""
    if not path.exists():
        return []
    header, *lines = path.read_bytes().splitlines(keepends=True) or [b""]
    rows = [line for line in lines if line.endswith(b"\n") and int(line.split(b",")[0]) <= update]
    write_whole(path, b"".join([header, *rows] if rows else []))
    return header.decode().strip().split(",") if rows else []


def default_run_name(cfg: DictConfig) -> str:
    """Return a name of task (or its id), backbone, seed and time."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
    task = re.sub(r"[^\w.-]+", "_", str(cfg.env.get("id") or environments.title(cfg.env.name, cfg.env)))
    return f"{task}-{cfg.backbone.name}-s{cfg.train.seed}-{stamp}"


def manifest(cfg: DictConfig) -> dict[str, Any]:
    """Return versions, commit, seed and machine: all that is needed to repeat a run."""
    packages = ("cyborg-torchrl", "torch", "torchrl", "tensordict", "hydra-core")
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
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of the checkout that holds the package, with "-dirty" if it is changed; None without one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
