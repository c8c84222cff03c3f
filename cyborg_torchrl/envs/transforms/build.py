"""Transforms between environment and agent: previous action and reward, first step, frame stack, normalisation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from tensordict.utils import NestedKey
from torch import Tensor
from torch.nn import functional as F
from torchrl.data import Bounded, Categorical, Composite, MultiCategorical, TensorSpec, Unbounded
from torchrl.envs import CatFrames, EnvBase, RewardClipping, Transform

from cyborg_torchrl import keys
from cyborg_torchrl.envs.transforms.entries import Entries, EntryTransform
from cyborg_torchrl.envs.transforms.normalization import NormalizeObservation, NormalizeReward
from cyborg_torchrl.modules.encoders.build import default_observations
from cyborg_torchrl.modules.encoders.images import image_layout, is_picture


class _Previous(EntryTransform):
    """A value of the last step as an entry of shape `shape` on the device `home`, zero at an episode's first step."""

    shape: Sequence[int]
    home: torch.device | None

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        """Add the entry."""
        observation_spec[self.out_keys[0]] = Unbounded(self.shape, device=observation_spec.device)
        return observation_spec

    def after_reset(self, begun: Entries, is_reset: Tensor | None) -> None:
        """Begin with zero."""
        begun[self.out_keys[0]] = torch.zeros(self.shape, device=self.home)


class PreviousAction(_Previous):
    """The previous action as the entry "previous_action", [N, A] float; zero at an episode's first step.

    Categories become one-hot vectors. Bounded continuous actions are clipped and scaled to [-1, 1].

    Args:
        action_spec: action spec of the environment.
        batch_dims: number of leading batch dimensions in its shape.
    """

    def __init__(self, action_spec: TensorSpec, batch_dims: int = 1) -> None:
        super().__init__(in_keys=[keys.ACTION], out_keys=[keys.PREVIOUS_ACTION])
        self.home = action_spec.device
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
        self.shape = (*self.batch, sum(self.sizes) if self.sizes else event.numel())

    def after_step(self, before: Entries, after: Entries) -> None:
        """Add the action of this step."""
        after[keys.PREVIOUS_ACTION] = self.encode(before[keys.ACTION])

    def encode(self, action: Tensor) -> Tensor:
        """Return actions [*B, ...] as vectors [*B, A]."""
        if self.sizes is not None:
            choices = action.reshape(*self.batch, len(self.sizes)).unbind(-1)
            parts = [F.one_hot(choice, size) for choice, size in zip(choices, self.sizes, strict=True)]
            return torch.cat(parts, -1).float()
        if self.centre is not None:
            action = ((action - self.centre) / self.half_range).clamp(-1.0, 1.0)
        return action.reshape(self.shape).float()


class PreviousReward(_Previous):
    """The previous reward as the entry "previous_reward", [N, 1] float; zero at an episode's first step.

    Args:
        reward_spec: reward spec of the environment.
    """

    def __init__(self, reward_spec: TensorSpec) -> None:
        super().__init__(in_keys=[keys.REWARD], out_keys=[keys.PREVIOUS_REWARD])
        self.shape, self.home = reward_spec.shape, reward_spec.device

    def after_step(self, before: Entries, after: Entries) -> None:
        """Add the reward of this step."""
        after[keys.PREVIOUS_REWARD] = after[keys.REWARD].float()


class FirstStep(_Previous):
    """A flag of an episode's first step as the entry "first_step", [N, 1] float.

    Args:
        reward_spec: reward spec of the environment.
    """

    def __init__(self, reward_spec: TensorSpec) -> None:
        super().__init__(in_keys=[keys.REWARD], out_keys=[keys.FIRST_STEP])
        self.shape, self.home = reward_spec.shape, reward_spec.device

    def after_step(self, before: Entries, after: Entries) -> None:
        """Take the flag away."""
        after[keys.FIRST_STEP] = torch.zeros(self.shape, device=self.home)

    def after_reset(self, begun: Entries, is_reset: Tensor | None) -> None:
        """Begin with the flag."""
        begun[keys.FIRST_STEP] = torch.ones(self.shape, device=self.home)


class ExplorationNoise(EntryTransform):
    """Standard normal noise that changes slowly, as the entry "exploration_noise", [N, A] float.

    A policy whose actions take their randomness from it explores in one direction for some steps, instead of trembling
    on the spot. The noise of a step is `r` times that before it plus `sqrt(1 - r^2)` times a new one, with
    `r = 1 - 1 / steps`. Each alone is standard normal, so log-probs are those of independent noise. An episode begins
    with new noise. Similar noise in PPO: Hollenstein et al. 2024, "Colored Noise in PPO".

    Args:
        action_spec: action spec of the environment.
        steps: about how long the noise is correlated; 1: independent noise.
    """

    def __init__(self, action_spec: TensorSpec, steps: float) -> None:
        super().__init__(in_keys=[keys.EXPLORATION_NOISE], out_keys=[keys.EXPLORATION_NOISE])
        self.shape, self.home = action_spec.shape, action_spec.device
        self.kept = 1.0 - 1.0 / steps

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        """Add the entry."""
        observation_spec[keys.EXPLORATION_NOISE] = Unbounded(self.shape, device=observation_spec.device)
        return observation_spec

    def after_step(self, before: Entries, after: Entries) -> None:
        """Change the noise a little."""
        noise = before[keys.EXPLORATION_NOISE]
        after[keys.EXPLORATION_NOISE] = self.kept * noise + math.sqrt(1.0 - self.kept**2) * torch.randn_like(noise)

    def after_reset(self, begun: Entries, is_reset: Tensor | None) -> None:
        """Begin with new noise."""
        begun[keys.EXPLORATION_NOISE] = torch.randn(self.shape, device=self.home)


class ScaleReward(EntryTransform):
    """Rewards multiplied by a number. TorchRL's `RewardScaling` refuses rewards with bounds.

    Args:
        scale: the number, greater than 0.
    """

    def __init__(self, scale: float) -> None:
        super().__init__(in_keys=[keys.REWARD], out_keys=[keys.REWARD])
        self.scale = scale

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        """Remove the bounds, which no longer hold."""
        spec = reward_spec[keys.REWARD]
        reward_spec[keys.REWARD] = Unbounded(spec.shape, device=spec.device, dtype=spec.dtype)
        return reward_spec

    def after_step(self, before: Entries, after: Entries) -> None:
        """Scale the rewards."""
        after[keys.REWARD] = after[keys.REWARD] * self.scale


def build_transforms(
    env: EnvBase,
    *,
    gamma: float,
    previous_action: bool = False,
    previous_reward: bool = False,
    first_step: bool = False,
    frame_stack: int = 1,
    normalize_observation: bool = False,
    reward_scale: float = 1.0,
    normalize_reward: bool = False,
    clip_reward: float | None = None,
    noise_steps: float = 1.0,
) -> list[Transform]:
    """Build the requested transforms, in the right order.

    Observations are normalised, then stacked. The previous reward is the raw one. Rewards are scaled,
    then normalised, then clipped.

    Args:
        env: the environment.
        gamma: discount of the return, by whose deviation rewards are normalised.
        previous_action: show the previous action.
        previous_reward: show the previous reward.
        first_step: show a flag at an episode's first step.
        frame_stack: number of last observations to concatenate; the first one of an episode is repeated.
        normalize_observation: normalise float observations by their running mean and standard deviation.
        reward_scale: multiply rewards by this number.
        normalize_reward: divide rewards by the running standard deviation of their discounted sum.
        clip_reward: clip rewards to [-clip_reward, clip_reward]; None: no clipping.
        noise_steps: steps over which the exploration noise of continuous actions is correlated; 1: independent noise.

    Raises:
        ValueError: if there is nothing to normalise or to stack, or a number is out of range.
    """
    if frame_stack < 1:
        raise ValueError(f"frame_stack must be >= 1; got {frame_stack}.")
    if clip_reward is not None and not 0.0 < clip_reward < math.inf:
        raise ValueError(f"clip_reward must be a finite number greater than 0; got {clip_reward}.")
    if noise_steps < 1.0:
        raise ValueError(f"noise_steps must be >= 1; got {noise_steps}.")
    if noise_steps > 1.0 and not env.action_spec.dtype.is_floating_point:
        raise ValueError("noise_steps needs continuous actions: leave it out.")
    if not 0.0 < reward_scale < math.inf:
        raise ValueError(f"reward_scale must be a finite number greater than 0; got {reward_scale}.")
    batch_dims = len(env.batch_size)
    transforms: list[Transform] = []
    if normalize_observation:
        spec = env.observation_spec
        found = [key for key in default_observations(spec) if spec[key].dtype.is_floating_point]
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
    if first_step:
        transforms.append(FirstStep(env.reward_spec))
    if reward_scale != 1.0:
        transforms.append(ScaleReward(reward_scale))
    if normalize_reward:
        transforms.append(NormalizeReward(env.reward_spec, gamma))
    if clip_reward is not None:
        transforms.append(RewardClipping(-clip_reward, clip_reward))
    if noise_steps > 1.0:
        transforms.append(ExplorationNoise(env.action_spec, noise_steps))
    return transforms


def _frame_stack(env: EnvBase, frames: int, batch_dims: int) -> list[Transform]:
    stacks: dict[int, list[NestedKey]] = {}
    for key in default_observations(env.observation_spec):
        spec = env.observation_spec[key]
        shape = spec.shape[batch_dims:]
        if isinstance(spec, Categorical) or not shape:
            raise ValueError(
                f"frame_stack stacks pixels and vectors; the observation {key} is {type(spec).__name__} "
                f"{list(shape)}: leave it out."
            )
        dim = -3 if is_picture(shape) and not image_layout(shape).is_channels_last else -1
        stacks.setdefault(dim, []).append(key)
    return [CatFrames(frames, dim, in_keys=found) for dim, found in stacks.items()]
