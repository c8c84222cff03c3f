"""A loaded agent equals the trained one, with another horizon or device too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cyborg_torchrl.config import ConfigError
from cyborg_torchrl.registry import backbones
from cyborg_torchrl.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from cyborg_torchrl.training.loading import load_agent


@pytest.mark.parametrize(
    "overrides", [*((f"backbone={name}",) for name in backbones.names()), ("memory=pmm",)], ids=str
)
def test_memory_is_as_trained_at_another_horizon(overrides: tuple[str, ...], save_trained: Callable[..., Path]) -> None:
    path = save_trained("env.horizon=10", *overrides)
    here, there = load_agent(path), load_agent(path, ["env.horizon=500"])
    assert there.cfg.env.horizon == 500
    seen, actions = torch.rand(2, 30, 6), torch.zeros(2, 30, dtype=torch.long)
    one, other = (restored.agent.evaluate_actions(seen, actions).log_prob for restored in (here, there))
    assert torch.equal(one, other)


@pytest.mark.parametrize("change", ["backbone.hidden_size=7", "encoder.features=9"])
def test_the_error_names_the_override_that_changes_the_agent(change: str, save_trained: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=rf"do not fit the agent that {change} makes of it") as error:
        load_agent(save_trained(), [change])
    assert "\n" not in str(error.value)


def test_an_agent_from_a_gpu_acts_on_a_cpu(save_trained: Callable[..., Path]) -> None:
    path = save_trained("env.horizon=10")
    content = load_checkpoint(path)
    content["config"]["train"]["device"] = "cuda:99"
    save_checkpoint(path, content)
    assert load_agent(path, ["train.device=cpu"]).cfg.train.device == "cpu"
    with pytest.raises(ConfigError, match=r"train.device is 'cuda:99'"):
        load_agent(path)
