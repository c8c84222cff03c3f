"""Evaluation of policies on fresh episodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import set_recurrent_mode

from cyborg_torchrl import keys
from cyborg_torchrl.collectors.flat_dict import NotFusable, flat
from cyborg_torchrl.collectors.fused_env import env_step
from cyborg_torchrl.collectors.fused_policy import policy_step
from cyborg_torchrl.data.chunks import ceil_div
from cyborg_torchrl.modules.nan_check import check_finite

OnEpisodes = Callable[[int, int], None]
"""Called with the number of finished episodes, and the number of all episodes."""


@dataclass(frozen=True)
class Evaluation:
    """The results of some episodes."""

    returns: Tensor
    """Undiscounted returns, [episodes] float64: raw rewards if the environment records "episode_reward"."""
    lengths: Tensor
    """Numbers of steps, [episodes] integer."""
    successes: Tensor | None
    """Successes in [0, 1], [episodes] float64; None if the task does not report success."""

    @property
    def episodes(self) -> int:
        """Number of episodes."""
        return len(self.returns)

    @property
    def mean_reward(self) -> float:
        """Mean return."""
        return float(self.returns.mean())

    @property
    def success_rate(self) -> float | None:
        """Mean success; None if the task does not report success."""
        return None if self.successes is None else float(self.successes.mean())


@torch.no_grad()
def evaluate(
    policy: TensorDictModuleBase,
    env: EnvBase,
    episodes: int,
    *,
    is_deterministic: bool = True,
    on_episodes: OnEpisodes = lambda finished, total: None,
) -> Evaluation:
    """Play episodes with a policy.

    Every environment of the batch contributes the same number of episodes, its first ones. Otherwise short episodes
    would be counted more often than long ones.

    Args:
        policy: reads and writes the environment's tensordicts, memory state included.
        env: batched or not, with `InitTracker` and the policy's primers.
        episodes: smallest number of episodes.
        is_deterministic: take the most likely action; False: sample.
        on_episodes: called after each step.

    Returns:
        The results of `episodes`, rounded up to a multiple of the number of environments.

    Raises:
        ValueError: if episodes is below 1.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be >= 1; got {episodes}.")
    num_envs = env.batch_size.numel()
    quota = ceil_div(episodes, num_envs)
    finished = torch.zeros(num_envs, dtype=torch.long, device=env.device)
    lengths = torch.zeros_like(finished)
    sums = torch.zeros(num_envs, dtype=torch.float64, device=env.device)
    rows: list[tuple[Tensor, ...]] = []  # returns, lengths and successes of the episodes that ended at each step
    reports_success = False
    mode = ExplorationType.DETERMINISTIC if is_deterministic else ExplorationType.RANDOM
    with set_exploration_type(mode), set_recurrent_mode(False):
        steps = _steps(policy, env, is_greedy=is_deterministic)
        while int(finished.min()) < quota:
            after = next(steps)
            done = after.get(keys.DONE).reshape(-1)
            sums += after.get(keys.REWARD).reshape(-1)
            lengths += 1
            is_counted = done & (finished < quota)
            if bool(is_counted.any()):
                raw, success = after.get(keys.EPISODE_REWARD, None), after.get(keys.SUCCESS, None)
                reports_success = success is not None
                row = (sums if raw is None else raw, lengths, done if success is None else success)
                rows.append(tuple(value.reshape(-1)[is_counted].clone() for value in row))
            sums, lengths = sums.masked_fill(done, 0.0), lengths.masked_fill(done, 0)
            finished += done
            on_episodes(int(finished.clamp_max(quota).sum()), quota * num_envs)
    returns, steps_taken, successes = (torch.cat(column).cpu() for column in zip(*rows, strict=True))
    return Evaluation(returns.double(), steps_taken, successes.double() if reports_success else None)


def _steps(
    policy: TensorDictModuleBase, env: EnvBase, *, is_greedy: bool
) -> Iterator[TensorDictBase | Mapping[Any, Tensor]]:
    """Yield the entries after each step, without end. Plain tensors are faster, where the environment supports them."""
    try:
        stepped, _ = env_step(env)
    except NotFusable:
        tensordict = env.reset()
        while True:
            played, tensordict = env.step_and_maybe_reset(policy(tensordict))
            yield played.get(keys.NEXT)

    acts = policy_step(policy, env, is_greedy=is_greedy)
    acts.begin(env.batch_size.numel())
    carried, may_begin = flat(env.reset()), True
    while True:
        written = acts(carried, may_begin=may_begin)
        log_prob = written.get(keys.ACTION_LOG_PROB)
        if log_prob is not None and not bool(
            log_prob.sum().isfinite()
        ):  # torch's sampler would raise without a location
            rows = TensorDict({**carried, **written}, env.batch_size).unsqueeze(1)
            check_finite(rows, [*acts.in_keys, *written], is_rollout=False)
        after, carried, is_over = stepped.step(carried, written)
        may_begin = is_over is not None
        yield after
