"""Comparison of an exported program with its agent, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import set_recurrent_mode

from cyborg_torchrl import keys
from cyborg_torchrl.export.parity import Runner
from cyborg_torchrl.export.programs import example_inputs
from cyborg_torchrl.export.streaming_step import dotted
from cyborg_torchrl.modules import PPOAgent
from cyborg_torchrl.training.builders import build_env
from cyborg_torchrl.training.loading import build_acting_env

RESET_SHARE = 0.01
"""Share of steps at which memory is reset, in addition to the starts of episodes."""


class Differences(NamedTuple):
    """Largest differences between a program and its agent; relative for numbers larger than 1."""

    largest: float
    """Largest of the next three."""
    parameters: float
    """Of the parameters of the action distribution."""
    state: float
    action: float
    """Of continuous actions. For others: the agent's best logit minus its logit of the program's choice."""
    steps: int
    resets: int


def unnormalized(cfg: DictConfig) -> DictConfig:
    """Return the configuration with unnormalised observations, which the exported program reads."""
    return OmegaConf.merge(cfg, {"transforms": {"normalize_observation": False}})


@torch.no_grad()
def replay(
    cfg: DictConfig,
    agent: PPOAgent,
    runner: Runner,
    *,
    steps: int,
    rows: int,
    on_step: Callable[[int], None] = lambda step: None,
) -> Differences:
    """Run program and agent on the same observations, each with its memory, and compare them.

    Memory is reset where episodes begin, and also at random.

    Args:
        cfg: the agent's configuration, for the CPU.
        agent: the agent.
        runner: the program.
        steps: steps of each environment.
        rows: number of environments.
        on_step: called after each step.
    """
    _, state, _ = example_inputs(runner.description, rows)
    parameters, about = runner.description["parameters"], runner.description["action"]
    worst, resets = [0.0, 0.0, 0.0], 0
    for step, (acted, observation, is_init) in enumerate(_acted(cfg, agent, steps, rows), 1):
        result = runner(observation, state, is_init)
        state = result["state"]
        own = {name: acted[keys.NEXT, key] for name, key in agent.backbone.state_keys.items()}
        found = (
            max(_distance(result[name], acted[name]) for name in parameters),
            max((_distance(state[name], value) for name, value in own.items()), default=0.0),
            _regret(acted, result["action"], about),
        )
        worst = list(map(max, worst, found))
        resets += int(is_init.sum())
        on_step(step)
    return Differences(max(worst), *worst, steps=steps, resets=resets)


def _acted(
    cfg: DictConfig, agent: PPOAgent, steps: int, rows: int
) -> Iterator[tuple[TensorDictBase, dict[str, Tensor], Tensor]]:
    """Yield for each step the agent's tensordict, the unnormalised observations, and the memory resets [rows].

    With normalised observations there are two environments with the same seed and the same actions: the agent's, and
    one without normalisation.
    """
    options = {"num_envs": rows, "seed": cfg.train.seed, "workers": 0}
    generator = torch.Generator().manual_seed(cfg.train.seed)
    with ExitStack() as stack:
        env = stack.enter_context(closing(build_acting_env(cfg, agent, **options)))
        plain: EnvBase | None = None
        if cfg.transforms.normalize_observation:
            plain = stack.enter_context(closing(build_env(unnormalized(cfg), **options)))
        shown = env.reset()
        bare = shown if plain is None else plain.reset()
        for _ in range(steps):
            is_forced = torch.rand(rows, 1, generator=generator) < RESET_SHARE
            shown.set(keys.IS_INIT, shown[keys.IS_INIT] | is_forced)
            with set_exploration_type(ExplorationType.DETERMINISTIC), set_recurrent_mode(False):
                acted = agent(shown)
            yield acted, {dotted(key): bare[key] for key in agent.observed_keys}, shown[keys.IS_INIT].reshape(rows)
            shown = env.step_and_maybe_reset(acted)[1]
            bare = shown if plain is None else plain.step_and_maybe_reset(bare.set(keys.ACTION, acted[keys.ACTION]))[1]


def _distance(value: Tensor, reference: Tensor) -> float:
    """Return the largest difference; NaN counts as infinite."""
    difference = (value - reference).abs() / reference.abs().clamp_min(1.0)
    return float(difference.nan_to_num(nan=torch.inf).max())


def _regret(acted: TensorDictBase, action: Tensor, about: dict) -> float:
    """Return how much worse the program's action is than the agent's, by the agent's logits."""
    if about["kind"] == "continuous":
        return _distance(action, acted[keys.ACTION])
    if about["kind"] == "one_hot":
        action = action.argmax(-1)
    worst = 0.0
    choices = action.reshape(len(action), -1).unbind(-1)
    for logits, choice in zip(acted["logits"].split(about["sizes"], -1), choices, strict=True):
        worst = max(worst, float((logits.amax(-1) - logits.gather(-1, choice.unsqueeze(-1)).squeeze(-1)).max()))
    return worst
