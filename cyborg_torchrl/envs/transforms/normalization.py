"""Normalisation of observations and rewards by running statistics, which are saved with the agent."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn
from torchrl.data import Bounded, Composite, TensorSpec, Unbounded
from torchrl.envs import Compose, EnvBase, Transform, TransformedEnv

from cyborg_torchrl import keys
from cyborg_torchrl.envs.transforms.entries import Entries, EntryTransform

EPSILON = 1e-8


class RunningMoments(nn.Module):
    """Running mean and variance of all items, each with the same weight, in double precision.

    The initial moments, mean 0 and the initial variance, count as 1e-4 of an item.

    Args:
        shape: shape of one item.
        initial_var: initial variance.

    Source: Chan, Golub and LeVeque (1979), "Updating formulae and a pairwise algorithm for computing sample variances".
    """

    def __init__(self, shape: Sequence[int], initial_var: float = 1.0) -> None:
        super().__init__()
        self.count: Tensor
        self.mean: Tensor
        self.var: Tensor
        self.register_buffer("count", torch.tensor(1e-4, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(tuple(shape), dtype=torch.float64))
        self.register_buffer("var", torch.full(tuple(shape), initial_var, dtype=torch.float64))
        self._merged = self._values()

    @torch.no_grad()
    def update(self, items: Tensor) -> None:
        """Add items [B, *shape], in place, since other modules share the buffers.

        An entry is left out where one of the items is not finite.
        """
        if not len(items):
            return
        items = items.double()
        number, total = len(items), self.count + len(items)
        difference = items.mean(0) - self.mean
        square = self.var * self.count + items.var(0, correction=0) * number
        var = (square + difference.square() * self.count * number / total) / total
        # Numbers that are not finite would spread to all environments, and nothing could say where they came from.
        is_finite = var.isfinite()
        self.var.copy_(torch.where(is_finite, var, self.var))
        self.mean.add_(torch.where(is_finite, difference * number / total, 0.0))
        self.count.copy_(total)

    @torch.no_grad()
    def merge(self, sum_over_all: Callable[[Tensor], Tensor]) -> None:
        """Add the items that other processes have seen since the last merge, in place.

        All processes must begin with the same moments.

        Args:
            sum_over_all: returns the sum of a tensor over all processes.
        """
        count, mean, var = (value.to(self.mean.device) for value in self._merged)
        off = self.mean - mean
        square = (self.var + off.square()) * self.count - var * count  # about the mean of the last merge
        news = torch.stack([off * self.count, square]).reshape(-1)
        news = sum_over_all(torch.cat([(self.count - count).reshape(1), news]))
        total, (off, square) = count + news[0], news[1:].view(2, *mean.shape)
        self.count.copy_(total)
        self.mean.copy_(mean + off / total)
        self.var.copy_((var * count + square) / total - (off / total).square())
        self._merged = self._values()

    def _values(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.count.clone(), self.mean.clone(), self.var.clone()

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        super()._load_from_state_dict(*args, **options)
        self._merged = self._values()

    @property
    def std(self) -> Tensor:
        """Standard deviation, [*shape]."""
        return (self.var + EPSILON).sqrt()


class NormalizeObservation(EntryTransform):
    """Observations with mean 0 and standard deviation 1 by running moments, then clipped.

    Every observation counts once. (TorchRL's `VecNormV2` adds the whole batch again whenever one environment is reset,
    and forgets exponentially.) The agent acts on the normalised observation, and the same values are stored, so nothing
    is normalised again later.

    Args:
        observation_spec: observation spec of the environment.
        in_keys: float observations.
        batch_dims: number of leading batch dimensions in the shapes of the specs.
        limit: largest absolute value of a normalised observation.
    """

    def __init__(
        self, observation_spec: Composite, in_keys: Sequence[NestedKey], batch_dims: int = 1, limit: float = 10.0
    ) -> None:
        in_keys = [unravel_key(key) for key in in_keys]
        super().__init__(in_keys=in_keys, out_keys=in_keys)
        shapes = [observation_spec[key].shape[batch_dims:] for key in in_keys]
        self.moments = nn.ModuleList(RunningMoments(shape) for shape in shapes)
        self.limit, self.is_frozen = limit, False

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        """Set the bounds to those of the clipping."""
        for key in self.in_keys:
            spec = observation_spec[key]
            observation_spec[key] = Bounded(-self.limit, self.limit, spec.shape, device=spec.device, dtype=spec.dtype)
        return observation_spec

    def after_step(self, before: Entries, after: Entries) -> None:
        """Normalise the observations."""
        self._normalize(after, None)

    def after_reset(self, begun: Entries, is_reset: Tensor | None) -> None:
        """Normalise the first observations of episodes."""
        self._normalize(begun, None if is_reset is None else is_reset.reshape(-1))

    def _normalize(self, entries: Entries, mask: Tensor | None) -> None:
        all_moments = cast("Iterable[RunningMoments]", self.moments)
        for key, moments in zip(self.in_keys, all_moments, strict=True):
            seen = entries[key]
            if not self.is_frozen:
                rows = seen.reshape(-1, *moments.mean.shape)
                moments.update(rows if mask is None else rows[mask])
            centred = ((seen - moments.mean) / moments.std).clamp(-self.limit, self.limit)
            # Infinity is not clipped, so that the check of the rollout finds it.
            entries[key] = torch.where(seen.isinf(), seen, centred).to(seen.dtype)


class NormalizeReward(EntryTransform):
    """Rewards divided by a running measure of their size; not centred.

        R_t = gamma R_{t-1} + r_t within an episode,   r_t <- r_t / max(std of all R so far, P)

    P is the root mean square of the largest |r| of each finished episode that had a reward. With many rewards the
    deviation of R is larger. If an episode has one reward, at its end, R is zero at most steps. Its deviation is then
    far smaller than the values to learn, the critic's loss is large, and its gradient hides that of the policy.

    Args:
        reward_spec: reward spec of the environment.
        gamma: discount.

    Source: Engstrom et al. (2020), "Implementation matters in deep policy gradients", section 2; P is ours.
    """

    def __init__(self, reward_spec: TensorSpec, gamma: float) -> None:
        super().__init__(in_keys=[keys.REWARD], out_keys=[keys.REWARD])
        self.moments, self.gamma, self.is_frozen = RunningMoments(()), gamma, False
        self.peak_moments = RunningMoments((), initial_var=0.0)  # until an episode ends, only the deviation counts
        self._returns: Tensor
        self._peaks: Tensor
        for name in ("_returns", "_peaks"):
            self.register_buffer(name, torch.zeros(reward_spec.shape, device=reward_spec.device))

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        """Remove the bounds, which no longer hold."""
        spec = reward_spec[keys.REWARD]
        reward_spec[keys.REWARD] = Unbounded(spec.shape, device=spec.device, dtype=spec.dtype)
        return reward_spec

    def after_step(self, before: Entries, after: Entries) -> None:
        """Normalise the rewards."""
        reward = after[keys.REWARD]
        self._returns = self.gamma * self._returns + reward
        self._peaks = torch.maximum(self._peaks, reward.abs())
        if not self.is_frozen:
            self.moments.update(self._returns.reshape(-1))
        peak = (self.peak_moments.var + self.peak_moments.mean.square()).sqrt()
        after[keys.REWARD] = (reward / torch.maximum(self.moments.std, peak)).to(reward.dtype)

    def after_reset(self, begun: Entries, is_reset: Tensor | None) -> None:
        """Add the peaks of the episodes that ended, and begin new ones."""
        is_new = torch.ones_like(self._peaks, dtype=torch.bool)
        if is_reset is not None:
            is_new = is_reset.reshape(is_new.shape)
        if not self.is_frozen:
            self.peak_moments.update(self._peaks[is_new & (self._peaks > 0)])
        self._returns = self._returns.masked_fill(is_new, 0.0)
        self._peaks = self._peaks.masked_fill(is_new, 0.0)


def statistics_of(env: EnvBase) -> nn.ModuleDict | None:
    """Return the running moments of an environment's transforms, shared and not copied; None without any."""
    found = {}
    for transform in transforms_of(env):
        if isinstance(transform, NormalizeObservation):
            found["observation"] = transform.moments
        elif isinstance(transform, NormalizeReward):
            found["reward"] = transform.moments
            found["reward_peaks"] = transform.peak_moments
    return nn.ModuleDict(found) if found else None


def freeze_statistics(env: EnvBase, statistics: nn.Module | None) -> None:
    """Load moments into an environment's transforms, and freeze them.

    Raises:
        ValueError: if the moments do not fit the transforms.
    """
    own = statistics_of(env)
    if own is None:
        return
    if statistics is None:
        raise ValueError("the environment normalises, but the agent was built for one that does not.")
    own.load_state_dict(statistics.state_dict())
    for transform in transforms_of(env):
        if isinstance(transform, (NormalizeObservation, NormalizeReward)):
            transform.is_frozen = True


@contextmanager
def frozen_statistics(env: EnvBase) -> Generator[None]:
    """Keep the moments of an environment's transforms as they are."""
    running = [each for each in transforms_of(env) if getattr(each, "is_frozen", True) is False]
    for transform in running:
        transform.is_frozen = True
    try:
        yield
    finally:
        for transform in running:
            transform.is_frozen = False


def transforms_of(env: EnvBase | None) -> Iterator[Transform]:
    """Yield all transforms around an environment, outermost first."""
    while isinstance(env, TransformedEnv):
        yield from env.transform if isinstance(env.transform, Compose) else [env.transform]
        env = env.base_env
