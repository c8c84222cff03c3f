# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# (tensordict's and torchrl's annotations are narrower than what they take)
"""Evaluation on fresh episodes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import set_recurrent_mode

from cyborg_torchrl import keys


@dataclass(frozen=True)
class Evaluation:
    """Means over episodes."""

    episodes: int
    mean_reward: float
    """Return of an episode, undiscounted; as the environment gave it where it keeps "episode_reward"."""
    success_rate: float | None
    """Share of episodes that ended in success; None where the task does not report it."""


@torch.no_grad()
def evaluate(policy: TensorDictModuleBase, env: EnvBase, episodes: int, *, is_deterministic: bool = True) -> Evaluation:
    """Plays episodes and averages over them.

    Every environment of the batch contributes the same number of episodes, its first ones, so that short episodes
    are not counted more often than long ones.

    Args:
        policy: reads and writes the environment's tensordicts, memory state included.
        env: batched or not, with `InitTracker` and the policy's primers on it.
        episodes: how many at least.
        is_deterministic: take the likeliest action instead of a sample.

    Raises:
        ValueError: if episodes is below 1.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be >= 1; got {episodes}.")
    batch = env.batch_size
    quota = -(-episodes // batch.numel())
    finished = torch.zeros(batch.numel(), dtype=torch.long, device=env.device)
    running = torch.zeros(batch.numel(), device=env.device)
    returns = torch.zeros((), device=env.device)
    successes = torch.zeros((), device=env.device)
    reports_success = False
    mode = ExplorationType.DETERMINISTIC if is_deterministic else ExplorationType.RANDOM
    with set_exploration_type(mode), set_recurrent_mode(False):
        tensordict = env.reset()
        while int(finished.min()) < quota:
            played, tensordict = env.step_and_maybe_reset(policy(tensordict))
            after = played.get(keys.NEXT)
            done = after.get(keys.DONE).reshape(-1)
            running += after.get(keys.REWARD).reshape(-1)
            is_counted = done & (finished < quota)
            raw = after.get(keys.EPISODE_REWARD, None)
            returns += (running if raw is None else raw.reshape(-1))[is_counted].sum()
            success = after.get(keys.SUCCESS, None)
            if success is not None:
                reports_success = True
                successes += success.reshape(-1)[is_counted].sum()
            running = running.masked_fill(done, 0.0)
            finished += done
    total = quota * batch.numel()
    return Evaluation(total, float(returns) / total, float(successes) / total if reports_success else None)
