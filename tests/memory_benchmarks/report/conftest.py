"""A writer of run folders with known content."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

CURVE = (0.2, 0.4, 0.8, 1.0)


@pytest.fixture
def write_run(tmp_path: Path, run_writer: Callable[..., Path]) -> Callable[..., Path]:
    """Return a function that writes a finished run: `write("name", backbone="gru", seed=3)` returns its folder."""
    return partial(run_writer, tmp_path)


@pytest.fixture(scope="session")
def run_writer() -> Callable[..., Path]:
    """Return a writer whose first argument is the folder above the run."""

    def write(
        base: Path,
        name: str,
        *,
        task: str = "delayed_cue",
        backbone: str = "lru",
        seed: int = 0,
        success: float | None = 0.9,
        horizon: int = 10,
        curve: Sequence[float] = CURVE,
        started: str = "2026-01-01T00:00:00+00:00",
        **train: Any,
    ) -> Path:
        folder = base / name
        (folder / "logs").mkdir(parents=True)
        config = {
            "env": {"name": task, "horizon": horizon, "level": None, "num_envs": 4},
            "backbone": {"name": backbone, "hidden_size": 8},
            "memory": {"name": "none"},
            "train": {"seed": seed, "recurrent_mode": "episode", "learning_rate": 0.003, **train},
            "logger": {"run_name": name, "eval_actions": "greedy"},
        }
        summary = {
            "task": task, "backbone": backbone, "horizon": horizon, "seed": seed, "success_rate": success,
            "mean_reward": 0.5, "total_timesteps": 100 * len(curve), "steps_per_second": 1000.0 + seed,
            "peak_rss_mb": 300.0, "total_seconds": 2.0, "is_interrupted": False,
        }  # fmt: skip
        manifest = {"started": started, "commit": "c0ffee", "versions": {"torch": "1"}, "machine": {"cores": 2}}
        rows = [
            f"{i + 1},{100 * (i + 1)},{'' if success is None else value},{value},{10.0**-i},0.0"
            for i, value in enumerate(curve)
        ]
        header = "update,steps,success_rate,mean_reward,state_drift,ratio_error"
        (folder / "logs" / "metrics.csv").write_text("\n".join([header, *rows]) + "\n")
        (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
        (folder / "manifest.json").write_text(json.dumps(manifest))
        (folder / "summary.json").write_text(json.dumps(summary))
        return folder

    return write
