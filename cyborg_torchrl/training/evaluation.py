"""Evaluation of policies on fresh episodes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import EnvBase, StepCounter
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import set_recurrent_mode

from cyborg_torchrl import keys
from cyborg_torchrl.collectors.flat_dict import NotFusable, flat
from cyborg_torchrl.collectors.fused_env import env_step
from cyborg_torchrl.collectors.fused_policy import policy_step
from cyborg_torchrl.data.chunks import ceil_div
from cyborg_torchrl.envs.make import episode_attribute
from cyborg_torchrl.envs.transforms.normalization import transforms_of
from cyborg_torchrl.modules.nan_check import check_finite

OnEpisodes = Callable[[int, int], None]
"""Called with the number of finished episodes, and the number of all episodes."""
MAX_STEPS = 10_000
"""Steps after which an episode is cut if the environment does not know its longest episode."""


@dataclass(frozen=True)
class Evaluation:
    """The results of some episodes."""

    returns: Tensor
    """Undiscounted returns, [episodes] float64: raw rewards if the environment records "episode_reward"."""
    lengths: Tensor
    """Numbers of steps, [episodes] integer."""
    successes: Tensor | None
    """Successes in [0, 1], [episodes] float64; None if the task does not report success."""
    num_cut: int
    """Number of these episodes that did not end within `max_steps`, and were cut there."""
    max_steps: int
    """Limit of steps of an episode."""

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

    @property
    def cut_note(self) -> str:
        """A line about the episodes that were cut; "" without any."""
        if not self.num_cut:
            return ""
        return (
            f"{self.num_cut:,} of {self.episodes:,} episodes did not end within {self.max_steps:,} steps and were cut"
        )


@torch.no_grad()
def evaluate(
    policy: TensorDictModuleBase,
    env: EnvBase,
    episodes: int,
    *,
    is_deterministic: bool = True,
    max_steps: int | None = None,
    on_episodes: OnEpisodes = lambda finished, total: None,
) -> Evaluation:
    """Play episodes with a policy.

    Every environment of the batch contributes the same number of episodes, its first ones. Otherwise short episodes
    would be counted more often than long ones.

    Episodes that never end are cut, and count with their return so far. Without `max_steps` an environment whose
    episode was cut plays no more, so that an evaluation ends soon.

    Args:
        policy: reads and writes the environment's tensordicts, memory state included.
        env: batched or not, with `InitTracker` and the policy's primers.
        episodes: smallest number of episodes.
        is_deterministic: take the most likely action; False: sample.
        max_steps: steps after which each episode is cut. None: the longest episode of the environment, if it knows it,
            but at least `MAX_STEPS`.
        on_episodes: called after each step.

    Returns:
        The results of `episodes`, rounded up to a multiple of the number of environments; fewer if some environments
        stopped at a cut episode.

    Raises:
        ValueError: if episodes or max_steps is below 1.
    """
    for name, number in (("episodes", episodes), ("max_steps", max_steps)):
        if number is not None and number < 1:
            raise ValueError(f"{name} must be >= 1; got {number}.")
    limit = max_steps or max(MAX_STEPS, longest_episode(env) or 0)
    num_envs = env.batch_size.numel()
    quota = ceil_div(episodes, num_envs)
    finished = torch.zeros(num_envs, dtype=torch.long, device=env.device)
    lengths = torch.zeros_like(finished)
    sums = torch.zeros(num_envs, dtype=torch.float64, device=env.device)
    rows: list[tuple[Tensor, ...]] = []  # returns, lengths and successes of the episodes that ended at each step
    reports_success, num_cut = False, 0
    restart: Tensor | None = None
    mode = ExplorationType.DETERMINISTIC if is_deterministic else ExplorationType.RANDOM
    with set_exploration_type(mode), set_recurrent_mode(False):
        steps = _steps(policy, env, is_greedy=is_deterministic)
        while int(finished.min()) < quota:
            after = steps.send(restart)
            done = after.get(keys.DONE).reshape(-1)
            sums += after.get(keys.REWARD).reshape(-1)
            lengths += 1
            is_cut = (lengths >= limit) & ~done
            done = done | is_cut
            restart = is_cut if max_steps is not None and bool(is_cut.any()) else None
            is_counted = done & (finished < quota)
            if bool(is_counted.any()):
                raw, success = after.get(keys.EPISODE_REWARD, None), after.get(keys.SUCCESS, None)
                reports_success = success is not None
                row = (sums if raw is None else raw, lengths, done if success is None else success)
                rows.append(tuple(value.reshape(-1)[is_counted].clone() for value in row))
                num_cut += int((is_cut & is_counted).sum())
            sums, lengths = sums.masked_fill(done, 0.0), lengths.masked_fill(done, 0)
            finished += done
            if max_steps is None:
                finished = finished.masked_fill(is_cut, quota)
            on_episodes(int(finished.clamp_max(quota).sum()), quota * num_envs)
    returns, steps_taken, successes = (torch.cat(column).cpu() for column in zip(*rows, strict=True))
    reports_success &= not bool(successes.isnan().all())  # NaN where an environment never reported success
    successes = successes.double().nan_to_num(0.0) if reports_success else None
    return Evaluation(returns.double(), steps_taken, successes, num_cut, limit)


def longest_episode(env: EnvBase) -> int | None:
    """Return the steps of the longest possible episode; None if the environment does not know it."""
    limits = [transform.max_steps for transform in transforms_of(env) if isinstance(transform, StepCounter)]
    limits.append(episode_attribute(env, "max_episode_steps"))
    return min((limit for limit in limits if limit is not None), default=None)


def _steps(
    policy: TensorDictModuleBase, env: EnvBase, *, is_greedy: bool
) -> Generator[TensorDictBase | Mapping[Any, Tensor], Tensor | None]:
    """Yield the entries after each step, without end. Plain tensors are faster, where the environment supports them.

    Takes a mask of environments that must begin a new episode, [N] bool, or None.
    """
    try:
        stepped, _ = env_step(env)
    except NotFusable:
        tensordict = env.reset()
        while True:
            played, tensordict = env.step_and_maybe_reset(policy(tensordict))
            restart = yield played.get(keys.NEXT)
            if restart is not None:
                tensordict = _restarted(env, tensordict, restart)

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
        restart = yield after
        if restart is not None:
            entries = TensorDict(dict(carried), env.batch_size, device=env.device)
            carried, may_begin = flat(_restarted(env, entries, restart)), True


def _restarted(env: EnvBase, tensordict: TensorDictBase, mask: Tensor) -> TensorDictBase:
    """Begin new episodes in the environments of a mask; return the entries before the next step."""
    tensordict = tensordict.copy()
    return env.maybe_reset(tensordict.set(keys.DONE, mask.reshape(tensordict.get(keys.DONE).shape)))
