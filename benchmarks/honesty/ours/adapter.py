"""This package: an agent with a GRU, its collector, its advantages, and its loss on masked steps."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase

from benchmarks.honesty.common import NUM_ENVS, STEPS
from cyborg_torchrl.checks import Report, check_padding, check_recurrent
from cyborg_torchrl.collectors import FusedCollector
from cyborg_torchrl.config import load_config
from cyborg_torchrl.modules import PPOAgent
from cyborg_torchrl.objectives import add_advantages
from cyborg_torchrl.training.builders import build_agent, build_env, build_loss

PACKAGE = "cyborg-torchrl"
GAMMA = 0.9


def check(seed: int) -> tuple[Report, Report]:
    """Check the agent, and the collector's second batch with the values that its advantages used."""
    torch.manual_seed(seed)
    options = ["backbone=gru", "env.horizon=10", f"train.seed={seed}", "logger=quiet"]
    cfg = load_config(overrides=options)
    agent = build_agent(cfg, build_env(cfg, num_envs=NUM_ENVS))
    report = check_recurrent(agent, _primed(build_env(cfg, num_envs=NUM_ENVS), agent), seed=seed)
    size = NUM_ENVS * STEPS
    collector = FusedCollector(
        build_env(cfg, num_envs=NUM_ENVS), agent, frames_per_batch=size, total_frames=2 * size, compiled_step=False
    )
    rollout = [batch.clone() for batch in collector][1]
    collector.shutdown()
    rollout["next", "state_value"] = _used_values(rollout, agent)
    found = check_recurrent(agent, rollout=rollout, seed=seed, chunk_lengths=(1, 5, 12))
    return report, found.with_findings(_padding(agent, build_loss(cfg, agent), rollout))


def _used_values(rollout: TensorDictBase, agent: PPOAgent) -> torch.Tensor:
    """Return the values of next observations that the advantages used, read from one-step advantages."""
    steps = add_advantages(rollout.clone(), agent.get_value_operator(), gamma=GAMMA, gae_lambda=0.0)
    return ((steps["advantage"] + steps["state_value"] - steps["next", "reward"]) / GAMMA).detach()


def _primed(env: Any, agent: PPOAgent) -> Any:
    env.append_transform(agent.backbone.make_tensordict_primer())
    return env


def _padding(agent: PPOAgent, loss: Any, rollout: TensorDictBase) -> Any:
    """Compare the gradients of the loss on a batch whose last steps are masked, as whole episodes are padded."""
    is_padding = torch.arange(STEPS) >= torch.tensor([STEPS, 17, 9, 21]).unsqueeze(1)
    steps = rollout.clone()
    add_advantages(steps, agent.get_value_operator(), gamma=GAMMA, gae_lambda=0.95)
    names = ("observation", "action", "action_log_prob", "advantage", "value_target", "state_value")
    batch = {name: steps[name] for name in names}

    def update(batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        padded = steps.clone().update(batch)
        padded["collector", "mask"] = ~is_padding
        losses = loss(padded)
        total = sum(value for name, value in losses.items() if name.startswith("loss_"))
        parameters = [parameter for parameter in loss.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        return [total.detach(), *(gradient for gradient in gradients if gradient is not None)]

    return check_padding(update, batch, is_padding)
