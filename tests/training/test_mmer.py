"""MMER, computed by hand, and in runs that are resumed."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from cyborg_torchrl.config import load_config
from cyborg_torchrl.training import mmer
from cyborg_torchrl.training.experiment import run_experiment
from cyborg_torchrl.training.mmer import EpochReturns
from cyborg_torchrl.training.trainer import PPOTrainer

TINY = ["env.horizon=2", "env.num_envs=16", "train.n_steps=6", "train.num_minibatches=2", "train.n_epochs=1"]
TINY += ["logger.progress=false", "logger.tensorboard=false", "logger.eval_episodes=8"]


def test_the_largest_mean_of_an_epoch_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmer, "EPOCH_STEPS", 100)
    returns = EpochReturns()
    values = []
    for num_steps, episodes, mean in [
        (40, 2.0, 1.0),
        (80, 0.0, None),
        (120, 6.0, 0.2),  # the first epoch ends: (2 * 1.0 + 6 * 0.2) / 8 = 0.4
        (160, 1.0, 0.9),
        (200, 3.0, 0.5),  # (0.9 + 1.5) / 4 = 0.6
        (240, 1.0, 5.0),
        (300, 9.0, -1.0),  # (5 - 9) / 10 = -0.4
        (420, 0.0, None),  # two epochs without an episode
        (480, 1.0, 9.0),  # not finished
    ]:
        returns.add(num_steps, episodes, mean)
        values.append(returns.mmer)
    assert values == [None, None, *[pytest.approx(0.4)] * 2, *[pytest.approx(0.6)] * 5]


def test_a_resumed_run_has_the_same_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmer, "EPOCH_STEPS", 250)

    def run(name: str) -> dict:
        overrides = [f"logger.base_dir={tmp_path}", f"logger.run_name={name}", f"train.total_timesteps={96 * 8}"]
        return run_experiment(load_config(overrides=[*TINY, *overrides, "resume=auto"]))

    update = PPOTrainer.update

    def interrupted(trainer: PPOTrainer, rollout: Any) -> dict[str, float]:
        if trainer.num_updates == 4:  # in the second epoch, which began after three updates
            raise KeyboardInterrupt
        return update(trainer, rollout)

    whole = run("whole")
    with monkeypatch.context() as patch:
        patch.setattr(PPOTrainer, "update", interrupted)
        assert run("parts")["is_interrupted"]
    assert run("parts")["mmer"] == whole["mmer"]
    with (tmp_path / "whole" / "logs" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["mmer"]) for row in rows] == [False] * 2 + [True] * 6
    means = [sum(float(row["mean_reward"]) * float(row["episodes"]) for row in rows[i : i + 3]) for i in (0, 3)]
    ended = [sum(float(row["episodes"]) for row in rows[i : i + 3]) for i in (0, 3)]
    assert whole["mmer"] == pytest.approx(max(total / number for total, number in zip(means, ended, strict=True)))
    assert json.loads((tmp_path / "whole" / "summary.json").read_text())["mmer"] == whole["mmer"]


def test_the_protocol_of_the_paper() -> None:
    cfg = load_config("popgym_paper", ["id=popgym-RepeatPreviousHard-v0"])
    assert (cfg.env.name, cfg.env.id) == ("popgym", "popgym-RepeatPreviousHard-v0")
    assert (cfg.transforms.previous_action, cfg.transforms.first_step) == (True, True)
    assert cfg.train.total_timesteps // mmer.EPOCH_STEPS == 228
    assert cfg.logger.eval_episodes == 1024
