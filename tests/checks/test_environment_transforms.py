"""Checks of an environment whose transforms keep statistics, or draw noise."""

from __future__ import annotations

import torch

from cyborg_torchrl.checks import check_environment
from cyborg_torchrl.config import load_config
from cyborg_torchrl.envs.transforms.normalization import statistics_of
from cyborg_torchrl.training.builders import build_env


def test_the_environment_of_a_general_task_is_healthy_and_its_statistics_stay() -> None:
    env = build_env(load_config(overrides=["env=gymnasium", "id=Pendulum-v1", "env.num_envs=3"]))
    env.rollout(5)
    before = {name: value.clone() for name, value in statistics_of(env).state_dict().items()}
    findings = check_environment(env, time_limit="truncated")
    assert not [finding for finding in findings if finding.verdict == "broken"], findings
    after = statistics_of(env).state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    env.rollout(5)
    assert any(not torch.equal(value, after[name]) for name, value in before.items()), "they go on afterwards"
