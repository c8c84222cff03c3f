"""The learning rate that follows the KL of the updates."""

from __future__ import annotations

import pytest
import torch

from cyborg_torchrl.config import load_config
from cyborg_torchrl.training.builders import build_trainer

SMALL = ["env.horizon=6", "env.num_envs=8", "train.total_timesteps=320", "train.lr_schedule=constant"]


def rates(*overrides: str) -> list[float]:
    trainer = build_trainer(load_config(overrides=[*SMALL, *overrides])).trainer
    updates = list(trainer.run())
    trainer.close()
    assert all(update["kl"] >= 0.0 for update in updates)
    return [update["learning_rate"] for update in updates]


def test_steps_become_smaller_while_updates_are_too_large() -> None:
    found = rates("train.learning_rate=0.01", "train.desired_kl=1e-9")
    assert len(found) >= 4
    assert found == pytest.approx([0.01 / 1.5**number for number in range(len(found))])


@pytest.mark.parametrize("desired", ["1e3", "0"])
def test_steps_are_never_larger_than_scheduled(desired: str) -> None:
    expected = float(torch.tensor(0.001))  # rates are rounded to float32
    assert set(rates("train.learning_rate=0.001", f"train.desired_kl={desired}")) == {expected}


def test_steps_grow_again_up_to_the_schedules() -> None:
    trainer = build_trainer(load_config(overrides=[*SMALL, "train.desired_kl=1e3"])).trainer
    trainer.rate_factor = 0.5
    factors = [trainer.rate_factor for _ in trainer.run()]
    trainer.close()
    assert factors[:3] == pytest.approx([0.75, 1.0, 1.0])
