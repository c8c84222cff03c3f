"""Episodes one step at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import set_recurrent_mode

from cyborg_torchrl import keys
from cyborg_torchrl.envs.rendering import Picture, action_names, picture
from cyborg_torchrl.modules import PPOAgent


class Frame(NamedTuple):
    """A step: the observation, the action and its result."""

    episode: int
    step: int
    observation: dict[str, Tensor]
    """The agent's input, without a batch dimension."""
    action: str
    """Its name, or its value if it has no name; "" after the end of the episode."""
    reward: float
    """Raw."""
    total: float
    """Sum of rewards up to this step."""
    end: str
    """"", "terminated", "truncated", or "cut" by the limit of steps."""
    success: float | None
    """Reported by the environment after the step."""
    picture: Picture | None


@torch.no_grad()
def play(
    agent: PPOAgent, env: EnvBase, episodes: int, *, is_deterministic: bool = True, max_steps: int | None = None
) -> Iterator[Frame]:
    """Play episodes. The last frame of each shows the result of its last action.

    Args:
        agent: the agent.
        env: its environment (`build_acting_env`), of one row.
        episodes: how many.
        is_deterministic: take the likeliest action, not a sample.
        max_steps: steps after which an episode is cut; None: never.
    """
    names = action_names(env)
    mode = ExplorationType.DETERMINISTIC if is_deterministic else ExplorationType.RANDOM
    for episode in range(1, episodes + 1):
        tensordict, total, end, step, success = env.reset(), 0.0, "", 0, None
        while not end:
            shown, observation = picture(env, tensordict), _read(agent, tensordict)
            with set_exploration_type(mode), set_recurrent_mode(False):
                tensordict = env.step(agent(tensordict))
            after = tensordict[keys.NEXT]
            before, total = total, _total(after, total)
            step += 1
            end = _end(after) or ("cut" if step == max_steps else "")
            reported = after.get(keys.SUCCESS, None)
            success = None if reported is None else float(reported)
            action = _written(tensordict[keys.ACTION][0], names)
            yield Frame(episode, step, observation, action, total - before, total, end, success, shown)
            tensordict = env.step_mdp(tensordict)
        shown = picture(env, tensordict)
        yield Frame(episode, step, _read(agent, tensordict), "", 0.0, total, end, success, shown)


def _read(agent: PPOAgent, tensordict: TensorDictBase) -> dict[str, Tensor]:
    names = (key if isinstance(key, str) else ".".join(key) for key in agent.encoder.in_keys)
    return {name: tensordict[key][0] for name, key in zip(names, agent.encoder.in_keys, strict=True)}


def _total(after: TensorDictBase, before: float) -> float:
    """Return the sum of raw rewards so far, from the environment if it reports one."""
    raw = after.get(keys.EPISODE_REWARD, None)
    return before + float(after[keys.REWARD]) if raw is None else float(raw)


def _end(after: TensorDictBase) -> str:
    if not bool(after[keys.DONE]):
        return ""
    return "truncated" if bool(after.get(keys.TRUNCATED, torch.tensor(False))) else "terminated"


def _written(action: Tensor, names: list[str] | None) -> str:
    if names is not None and action.numel() == 1:
        return names[int(action)]
    numbers = action.flatten().tolist()
    text = " ".join(f"{number:.3g}" if isinstance(number, float) else str(number) for number in numbers)
    return text if action.ndim == 0 else f"[{text}]"
