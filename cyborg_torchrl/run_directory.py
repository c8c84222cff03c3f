"""What a run leaves behind: manifest, configuration, metrics, checkpoints, summary."""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.tensorboard import SummaryWriter

from cyborg_torchrl.checkpoint import save_checkpoint
from cyborg_torchrl.registry import environments

COLUMNS: tuple[str, ...] = (
    "update", "steps", "seconds", "steps_per_second", "episodes", "success_rate", "mean_reward", "reward_per_step",
    "explained_variance", "loss_objective", "loss_critic", "loss_entropy", "entropy", "kl_approx", "clip_fraction",
    "grad_norm", "ratio_error", "epochs", "learning_rate",
)  # fmt: skip


class RunDirectory:
    """The folder of one run.

    Holds `manifest.json`, `config.yaml`, `logs/metrics.csv`, TensorBoard's files in `logs/`, `checkpoints/last.pt`
    and `best.pt`, and at the end `summary.json`. Metrics are on disk as soon as they are logged.

    Args:
        path: the folder, which must not hold a run yet.
        cfg: the configuration, written as it was used.

    Raises:
        FileExistsError: if there is a run in the folder already.
    """

    def __init__(self, path: Path, cfg: DictConfig) -> None:
        if (path / "manifest.json").exists():
            raise FileExistsError(f"{path} holds a run already; choose another run name.")
        self.path = path
        self.cfg = cfg
        (path / "logs").mkdir(parents=True, exist_ok=True)
        (path / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
        self.write_json("manifest.json", manifest(cfg))
        self._file = (path / "logs" / "metrics.csv").open("w", newline="")
        self._writer: csv.DictWriter[str] | None = None
        self._tensorboard = SummaryWriter(str(path / "logs")) if cfg.logger.tensorboard else None
        self._best = float("-inf")

    def log(self, metrics: Mapping[str, float]) -> None:
        """Appends a row to metrics.csv, whose columns are those of the first row, and points to TensorBoard."""
        if self._writer is None:
            columns = [*COLUMNS, *(name for name in metrics if name not in COLUMNS)]
            self._writer = csv.DictWriter(self._file, columns, restval="", extrasaction="ignore")
            self._writer.writeheader()
        self._writer.writerow(metrics)
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, int(metrics["steps"]))

    def save(self, content: dict[str, Any], score: float | None) -> None:
        """Writes `checkpoints/last.pt`, and `best.pt` if the score is the highest so far."""
        content = {"config": OmegaConf.to_container(self.cfg), **content}
        save_checkpoint(self.path / "checkpoints" / "last.pt", content)
        if score is not None and score > self._best:
            self._best = score
            save_checkpoint(self.path / "checkpoints" / "best.pt", content)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes a JSON file into the folder."""
        (self.path / name).write_text(json.dumps(content, indent=2) + "\n")

    def close(self) -> None:
        """Closes the logs."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


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
