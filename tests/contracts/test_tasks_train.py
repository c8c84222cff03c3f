"""Every memory task trains end to end with every backbone: some steps, which say nothing of learning."""

from __future__ import annotations

import inspect
import itertools
import math
import warnings
from pathlib import Path

import pytest

import cyborg_torchrl.envs  # noqa: F401  (registers the tasks)
from cyborg_torchrl.config import load_config
from cyborg_torchrl.envs import MemoryTask
from cyborg_torchrl.registry import backbones, environments
from cyborg_torchrl.training.experiment import run_experiment

TASKS = [
    name
    for name in environments.names()
    if inspect.isclass(environments.get(name)) and issubclass(environments.get(name), MemoryTask)
]
TINY = [
    "env.num_envs=8",
    "env.horizon=3",
    "train.total_timesteps=1",  # one rollout
    "train.n_epochs=1",
    "train.num_minibatches=2",
    "logger.eval_episodes=8",
    "logger=quiet",
]


def pairs() -> list:
    """Every task with two backbones, and every backbone with one task; all other pairs are slow tests."""
    found = []
    for task, backbone in itertools.product(TASKS, backbones.names()):
        is_fast = backbone in ("gru", "attention") or task == "n_back"
        found.append(pytest.param(task, backbone, marks=[] if is_fast else pytest.mark.slow))
    return found


@pytest.mark.parametrize(("task", "backbone"), pairs())
def test_a_task_trains_with_a_backbone(task: str, backbone: str, tmp_path: Path) -> None:
    cfg = load_config(overrides=[f"env={task}", f"backbone={backbone}", f"logger.base_dir={tmp_path}", *TINY])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # among others: that the update does not see the states of the rollout
        summary = run_experiment(cfg)
    env = environments.get(task)(num_envs=1, horizon=3)
    rollout = 128 if cfg.preset == "general" else env.max_episode_steps
    assert summary["total_timesteps"] == 8 * rollout
    assert (summary["total_updates"], summary["horizon"], summary["eval_episodes"]) == (1, 3, 8)
    assert 0.0 <= summary["success_rate"] <= 1.0
    assert math.isfinite(summary["mean_reward"])
