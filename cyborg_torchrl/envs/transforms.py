# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false
# (tensordict's and torchrl's annotations are narrower than what they take)
"""What is put between any environment and the agent: previous action and reward, frame stack, normalisation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch.nn import functional as F
from torchrl.data import Bounded, Categorical, Composite, MultiCategorical, TensorSpec, Unbounded
from torchrl.envs import CatFrames, Compose, EnvBase, RewardClipping, Transform, TransformedEnv

from cyborg_torchrl import keys
from cyborg_torchrl.modules.encoders.build import BOOKKEEPING, MAIN
from cyborg_torchrl.modules.encoders.images import MIN_SIDE, image_layout

EPSILON = 1e-8


class RunningMoments(nn.Module):
    """Mean and variance of all that was ever seen, each item with the same weight.

    Starts as if a hundredth of a percent of an item of mean 0 and variance 1 had been seen. In double precision.

    Args:
        shape: shape of one item.

    Source: Chan, Golub and LeVeque (1979), "Updating formulae and a pairwise algorithm for computing sample variances".
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.count: Tensor
        self.mean: Tensor
        self.var: Tensor
        self.register_buffer("count", torch.tensor(1e-4, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(tuple(shape), dtype=torch.float64))
        self.register_buffer("var", torch.ones(tuple(shape), dtype=torch.float64))

    @torch.no_grad()
    def update(self, items: Tensor) -> None:
        """Takes items [B, *shape] in; in place, for whoever shares the buffers."""
        if not len(items):
            return
        items = items.double()
        number, total = len(items), self.count + len(items)
        difference = items.mean(0) - self.mean
        square = self.var * self.count + items.var(0, correction=0) * number
        self.var.copy_((square + difference.square() * self.count * number / total) / total)
        self.mean.add_(difference * number / total)
        self.count.copy_(total)

    @property
    def std(self) -> Tensor:
        """Standard deviation, [*shape]."""
        return (self.var + EPSILON).sqrt()


class PreviousAction(Transform):
    """Shows the action that led to the present observation: "previous_action" [N, A] float, zero where none did.

    Categories as one-hot vectors; bounded continuous actions clipped and scaled to [-1, 1].

    Args:
        action_spec: the environment's.
        batch_dims: number of batch dimensions that its shape begins with.
    """

    def __init__(self, action_spec: TensorSpec, batch_dims: int = 1) -> None:
        super().__init__(in_keys=[keys.ACTION], out_keys=[keys.PREVIOUS_ACTION])
        self.batch = tuple(action_spec.shape[:batch_dims])
        self.sizes: list[int] | None = None
        self.centre: Tensor | None = None
        event = action_spec.shape[batch_dims:]
        if isinstance(action_spec, MultiCategorical):
            self.sizes = [int(n) for n in action_spec.nvec.reshape(-1, event[-1])[0]]
        elif type(action_spec) is Categorical:
            self.sizes = [int(action_spec.n)] * event.numel()
        elif isinstance(action_spec, Bounded) and action_spec.dtype.is_floating_point:
            low, high = (bound[(0,) * batch_dims] for bound in (action_spec.low, action_spec.high))
            if bool(torch.isfinite(high - low).all()):
                self.centre, self.half_range = (low + high) / 2, (high - low) / 2
        self.width = sum(self.sizes) if self.sizes else event.numel()

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        """Adds the entry."""
        shape = (*self.batch, self.width)
        observation_spec[keys.PREVIOUS_ACTION] = Unbounded(shape, device=observation_spec.device)
        return observation_spec

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        zeros = torch.zeros(*self.batch, self.width, device=tensordict_reset.device)
        return tensordict_reset.set(keys.PREVIOUS_ACTION, zeros)

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        return next_tensordict.set(keys.PREVIOUS_ACTION, self.encode(tensordict.get(keys.ACTION)))

    def encode(self, action: Tensor) -> Tensor:
        """Actions [*B, ...] as vectors [*B, A]."""
        if self.sizes is not None:
            choices = action.reshape(*self.batch, len(self.sizes)).unbind(-1)
            parts = [F.one_hot(choice, size) for choice, size in zip(choices, self.sizes, strict=True)]
            return torch.cat(parts, -1).float()
        if self.centre is not None:
            action = ((action - self.centre) / self.half_range).clamp(-1.0, 1.0)
        return action.reshape(*self.batch, self.width).float()


class PreviousReward(Transform):
    """Shows the reward that came with the present observation: "previous_reward" [N, 1] float, zero where none did.

    Args:
        reward_spec: the environment's.
    """

    def __init__(self, reward_spec: TensorSpec) -> None:
        super().__init__(in_keys=[keys.REWARD], out_keys=[keys.PREVIOUS_REWARD])
        self.shape = reward_spec.shape

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        """Adds the entry."""
        observation_spec[keys.PREVIOUS_REWARD] = Unbounded(self.shape, device=observation_spec.device)
        return observation_spec

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        return tensordict_reset.set(keys.PREVIOUS_REWARD, torch.zeros(self.shape, device=tensordict_reset.device))

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        return next_tensordict.set(keys.PREVIOUS_REWARD, next_tensordict.get(keys.REWARD).float())


class NormalizeObservation(Transform):
    """Observations with mean 0 and standard deviation 1, by running moments of all that was shown, clipped.

    Every observation is counted once: those of a reset where there was one, the others when they are stepped to.
    (TorchRL's `VecNormV2` takes the whole batch in again whenever one environment is reset, and forgets exponentially.)
    What a step shows is what the agent acts on and what is stored: it is not normalised again later.

    Args:
        observation_spec: the environment's.
        in_keys: float observations.
        batch_dims: number of batch dimensions that the specs' shapes begin with.
        limit: where normalised observations are clipped.
    """

    def __init__(
        self, observation_spec: Composite, in_keys: Sequence[NestedKey], batch_dims: int = 1, limit: float = 10.0
    ) -> None:
        super().__init__(in_keys=list(in_keys), out_keys=list(in_keys))
        events = [observation_spec[key].shape[batch_dims:] for key in in_keys]
        self.moments = nn.ModuleList(RunningMoments(event) for event in events)
        self.events, self.limit, self.is_frozen = events, limit, False

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        """Bounds become those of the clipping."""
        for key in self.in_keys:
            spec = observation_spec[key]
            observation_spec[key] = Bounded(-self.limit, self.limit, spec.shape, device=spec.device, dtype=spec.dtype)
        return observation_spec

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        mask = tensordict.get("_reset", None)
        return self._normalize(tensordict_reset, None if mask is None else mask.reshape(-1))

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        return self._normalize(next_tensordict, None)

    def _normalize(self, tensordict: TensorDictBase, mask: Tensor | None) -> TensorDictBase:
        for key, event, moments in zip(self.in_keys, self.events, self.moments, strict=True):
            seen = tensordict.get(key)
            if not self.is_frozen:
                rows = seen.reshape(-1, *event)
                moments.update(rows if mask is None else rows[mask])
            centred = (seen - moments.mean) / moments.std
            tensordict.set(key, centred.clamp(-self.limit, self.limit).to(seen.dtype))
        return tensordict


class NormalizeReward(Transform):
    """Rewards divided by the running standard deviation of the discounted return; never centred.

        R_t = gamma R_{t-1} + r_t within an episode,   r_t <- r_t / std of all R so far

    Args:
        reward_spec: the environment's.
        gamma: discount.

    Source: Engstrom et al. (2020), "Implementation matters in deep policy gradients", section 2.
    """

    def __init__(self, reward_spec: TensorSpec, gamma: float) -> None:
        super().__init__(in_keys=[keys.REWARD], out_keys=[keys.REWARD])
        self.moments, self.gamma, self.is_frozen = RunningMoments(()), gamma, False
        self._returns = torch.zeros(reward_spec.shape, device=reward_spec.device)

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        """Bounds no longer hold."""
        spec = reward_spec[keys.REWARD]
        reward_spec[keys.REWARD] = Unbounded(spec.shape, device=spec.device, dtype=spec.dtype)
        return reward_spec

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        mask = tensordict.get("_reset", None)
        reset = torch.ones_like(self._returns, dtype=torch.bool) if mask is None else mask.reshape(self._returns.shape)
        self._returns = self._returns.masked_fill(reset, 0.0)
        return tensordict_reset

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        reward = next_tensordict.get(keys.REWARD)
        self._returns = self.gamma * self._returns + reward
        if not self.is_frozen:
            self.moments.update(self._returns.reshape(-1))
        return next_tensordict.set(keys.REWARD, (reward / self.moments.std).to(reward.dtype))


def build_transforms(
    env: EnvBase,
    *,
    gamma: float,
    previous_action: bool = False,
    previous_reward: bool = False,
    frame_stack: int = 1,
    normalize_observation: bool = False,
    normalize_reward: bool = False,
    clip_reward: float | None = None,
) -> list[Transform]:
    """Builds what is asked for, in the order in which it has to stand behind an environment.

    Observations are normalised, then stacked; the previous reward is the raw one; rewards are normalised, then
    clipped.

    Args:
        env: what they are for.
        gamma: discount of the return that rewards are normalised by.
        previous_action: show the previous action.
        previous_reward: show the previous reward.
        frame_stack: observations of the last so many steps side by side; the first of an episode is repeated.
        normalize_observation: float observations by their running mean and standard deviation.
        normalize_reward: rewards by the running standard deviation of their discounted sum.
        clip_reward: rewards to [-clip_reward, clip_reward]; None: not.

    Raises:
        ValueError: if there is nothing to normalise or to stack.
    """
    batch_dims = len(env.batch_size)
    transforms: list[Transform] = []
    if normalize_observation:
        found = [key for key, spec in observations_of(env) if spec.dtype.is_floating_point]
        if not found:
            raise ValueError(
                "normalize_observation needs observations that are floats; pixels and categories are scaled by the "
                "encoder: leave it out."
            )
        transforms.append(NormalizeObservation(env.observation_spec, found, batch_dims))
    if frame_stack > 1:
        transforms += _frame_stack(env, frame_stack, batch_dims)
    if previous_action:
        transforms.append(PreviousAction(env.action_spec, batch_dims))
    if previous_reward:
        transforms.append(PreviousReward(env.reward_spec))
    if normalize_reward:
        transforms.append(NormalizeReward(env.reward_spec, gamma))
    if clip_reward is not None:
        transforms.append(RewardClipping(-clip_reward, clip_reward))
    return transforms


def observations_of(env: EnvBase) -> Iterator[tuple[NestedKey, TensorSpec]]:
    """The leaves that an encoder reads by default: "pixels", else all below "observation", else all others."""
    leaves = [
        (key, spec)
        for key, spec in env.observation_spec.items(True, True)
        if not BOOKKEEPING.intersection((key,) if isinstance(key, str) else (key[0], key[-1]))
    ]
    for main in MAIN:
        below = [(key, spec) for key, spec in leaves if main in (key, key[0])]
        if below:
            return iter(below)
    return iter(leaves)


def statistics_of(env: EnvBase) -> nn.ModuleDict | None:
    """The running moments of an environment's transforms, shared and not copied; None if there are none."""
    found = {}
    for transform in _transforms(env):
        if isinstance(transform, NormalizeObservation):
            found["observation"] = transform.moments
        elif isinstance(transform, NormalizeReward):
            found["reward"] = transform.moments
    return nn.ModuleDict(found) if found else None


def freeze_statistics(env: EnvBase, statistics: nn.Module | None) -> None:
    """Gives an environment's transforms these moments, and keeps them as they are.

    Raises:
        ValueError: if they are not those that its transforms need.
    """
    own = statistics_of(env)
    if own is None:
        return
    if statistics is None:
        raise ValueError("the environment normalises, but the agent was built for one that does not.")
    own.load_state_dict(statistics.state_dict())
    for transform in _transforms(env):
        if isinstance(transform, (NormalizeObservation, NormalizeReward)):
            transform.is_frozen = True


def _transforms(env: EnvBase | None) -> Iterator[Transform]:
    while isinstance(env, TransformedEnv):
        yield from env.transform if isinstance(env.transform, Compose) else [env.transform]
        env = env.base_env


def _frame_stack(env: EnvBase, frames: int, batch_dims: int) -> list[Transform]:
    stacks: dict[int, list[NestedKey]] = {}
    for key, spec in observations_of(env):
        shape = spec.shape[batch_dims:]
        if isinstance(spec, Categorical) or not shape:
            raise ValueError(
                f"frame_stack stacks pixels and vectors; the observation {key} is {type(spec).__name__} "
                f"{list(shape)}: leave it out."
            )
        is_image = len(shape) == 3 and sorted(shape)[1] >= MIN_SIDE
        dim = -3 if is_image and not image_layout(shape).is_channels_last else -1
        stacks.setdefault(dim, []).append(key)
    return [CatFrames(frames, dim, in_keys=found) for dim, found in stacks.items()]
