"""Advantages without a critic, over the mean of each step."""

from __future__ import annotations

import torch

from cyborg_torchrl.build import build_trainer
from cyborg_torchrl.config import load_config


def test_without_a_critic_an_advantage_is_the_return_over_its_steps_mean(tmp_path) -> None:
    overrides = ["env=n_back", "env.num_envs=8", "env.horizon=6", "logger=quiet", f"logger.base_dir={tmp_path}"]
    overrides += ["train.vf_coef=0", "train.gamma=0.9", "train.gae_lambda=1", "train.normalize_advantage=step"]
    trainer, _, _ = build_trainer(load_config(overrides=[*overrides, "train.total_timesteps=1"]))
    rollout = trainer.collector.rollout()
    trainer._prepare(rollout)
    steps = rollout.steps
    assert not steps["state_value"].any()
    reward = steps["next", "reward"].squeeze(-1)
    returns = torch.zeros_like(reward)
    for t in reversed(range(reward.shape[1])):  # one episode each
        returns[:, t] = reward[:, t] + (0.9 * returns[:, t + 1] if t + 1 < reward.shape[1] else 0.0)
    over_mean = returns - returns.mean(0)
    torch.testing.assert_close(steps["advantage"].squeeze(-1), over_mean / over_mean.std())
    trainer.update(rollout)
    assert not trainer.collector.rollout().steps["state_value"].any(), "nobody trains the critic"
