"""Action heads: networks that compute the parameters of a distribution which fits an action spec."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, distributions, nn
from torchrl.data import Bounded, Categorical, MultiCategorical, OneHot, TensorSpec, Unbounded
from torchrl.data.tensor_specs import ContinuousBox
from torchrl.modules import IndependentNormal, OneHotCategorical, TanhNormal

from cyborg_torchrl.modules.mlp import with_hidden_layers


class MultiDiscrete(distributions.Distribution):
    """Independent categorical choices, with all logits side by side.

    Args:
        logits: [*B, sum(sizes)].
        sizes: number of options of each choice.
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(self, logits: Tensor, sizes: Sequence[int]) -> None:
        self.choices = [distributions.Categorical(logits=part) for part in logits.split(list(sizes), -1)]
        super().__init__(logits.shape[:-1], torch.Size([len(sizes)]), validate_args=False)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw actions [*sample_shape, *B, choices]."""
        return torch.stack([choice.sample(torch.Size(sample_shape)) for choice in self.choices], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the sum of the choices' log-probabilities, [*B]."""
        parts = zip(self.choices, value.unbind(-1), strict=True)
        return torch.stack([choice.log_prob(part) for choice, part in parts], -1).sum(-1)

    def entropy(self) -> Tensor:
        """Return the sum of the choices' entropies, [*B]."""
        return torch.stack([choice.entropy() for choice in self.choices], -1).sum(-1)

    @property
    def deterministic_sample(self) -> Tensor:
        """Return the mode; TorchRL reads it in deterministic exploration."""
        return self.mode

    @property
    def mode(self) -> Tensor:
        """Return the likeliest action, [*B, choices]."""
        return torch.stack([choice.mode for choice in self.choices], -1)


class NormalWithNoise(IndependentNormal):
    """A normal distribution whose samples can take their randomness from outside.

    Args:
        loc: mean, [*B, A].
        scale: standard deviation, [*B, A].
        noise: standard normal numbers, [*B, A]; None: new ones.
    """

    def __init__(self, loc: Tensor, scale: Tensor, noise: Tensor | None = None) -> None:
        super().__init__(loc, scale)
        self.noise = noise

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw actions, [*sample_shape, *B, A]."""
        if self.noise is None or sample_shape:
            return super().rsample(torch.Size(sample_shape))
        return self.base_dist.loc + self.base_dist.scale * self.noise


class TanhNormalWithNoise(TanhNormal):
    """A normal distribution squashed into bounds by tanh, with the same choice of randomness.

    Args:
        loc: mean before squashing, [*B, A].
        scale: standard deviation before squashing, [*B, A].
        noise: standard normal numbers, [*B, A]; None: new ones.
        low: lower bounds, [A].
        high: upper bounds, [A].
    """

    def __init__(self, loc: Tensor, scale: Tensor, noise: Tensor | None = None, *, low: Tensor, high: Tensor) -> None:
        super().__init__(loc, scale, low=low, high=high)
        self.noise = noise

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw actions, [*sample_shape, *B, A]."""
        if self.noise is None or sample_shape:
            return super().rsample(torch.Size(sample_shape))
        action = self.loc + self.scale * self.noise
        for transform in self.transforms:
            action = transform(action)
        return action


LOG_STD_RANGE = (-5.0, 2.0)
"""Limits of a standard deviation that depends on the features, as its logarithm."""


class NormalHead(nn.Module):
    """Mean and standard deviation of continuous actions, both in units of half the action range.

    Args:
        in_features: width of the features.
        low: lower bounds, [A].
        high: upper bounds, [A].
        log_std_init: logarithm of the standard deviation at the start.
        std_from_features: compute the standard deviation from the features. False: a free parameter for each action.
        is_squashed: the action is squashed into its bounds by tanh afterwards, so nothing is scaled here.
    """

    def __init__(
        self,
        in_features: int,
        low: Tensor,
        high: Tensor,
        *,
        log_std_init: float = 0.0,
        std_from_features: bool = False,
        is_squashed: bool = False,
    ) -> None:
        super().__init__()
        self.mean = nn.Linear(in_features, low.numel())
        self.log_std = nn.Parameter(torch.full((low.numel(),), log_std_init))
        self.log_std_change = nn.Linear(in_features, low.numel(), bias=False) if std_from_features else None
        if self.log_std_change is not None:
            nn.init.zeros_(self.log_std_change.weight)
        is_finite = torch.isfinite(high - low)  # TorchRL's unbounded specs reach from -max to max
        if is_squashed and not bool(is_finite.all()):
            raise ValueError("squashed actions need bounds; the action space has none.")
        is_scaled = is_finite & (high > low) & (not is_squashed)
        self.centre: Tensor
        self.half_range: Tensor
        self.register_buffer("centre", torch.where(is_scaled, (low + high) / 2, torch.zeros_like(low)))
        self.register_buffer("half_range", torch.where(is_scaled, (high - low) / 2, torch.ones_like(low)))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, [*B, A]."""
        mean = self.centre + self.half_range * self.mean(features)
        log_std = self.log_std
        if self.log_std_change is not None:
            log_std = (log_std + self.log_std_change(features)).clamp(*LOG_STD_RANGE)
        return mean, (self.half_range * log_std.exp()).expand_as(mean)


MASKED_LOGIT = -1e8
"""Logit of an invalid action: its probability is exactly zero, and the entropy stays finite."""


class NoValidActionError(ValueError):
    """A mask that allows no action.

    Args:
        row: number of the mask in its batch, which while acting is the number of the environment.
        step: step of the rollout; None if unknown.
    """

    def __init__(self, row: int, step: int | None = None) -> None:
        when = "" if step is None else f" at step {step} of the rollout"
        super().__init__(f"the action mask of environment {row} allows no action{when}.")
        self.row, self.step = row, step


class MaskedLogits(nn.Module):
    """Logits with those of invalid actions replaced, so that no invalid action is ever drawn.

    Args:
        network: computes the logits, [*B, n].
        sizes: numbers of options of the choices, which sum to n.
        mask_shape: shape of one mask, n booleans.

    Raises:
        ValueError: if a mask has not n booleans.
    """

    def __init__(self, network: nn.Module, sizes: Sequence[int], mask_shape: Sequence[int]) -> None:
        super().__init__()
        self.network, self.sizes, self.mask_dims = network, list(sizes), len(mask_shape)
        if torch.Size(mask_shape).numel() != sum(sizes):
            raise ValueError(f"the action mask has shape {list(mask_shape)}; needed: {sum(sizes)} booleans.")

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """Return the logits. The mask is true for valid actions, [*B, *mask_shape].

        Raises:
            NoValidActionError: if a choice has no valid option. It is not checked in exported programs and CUDA graphs.
        """
        mask = mask.flatten(-self.mask_dims).bool()
        is_captured = mask.is_cuda and torch.cuda.is_current_stream_capturing()
        if not (is_captured or torch.compiler.is_exporting()):
            is_valid = torch.stack([part.any(-1) for part in mask.split(self.sizes, -1)]).all(0).reshape(-1)
            if not bool(is_valid.all()):
                raise NoValidActionError(int((~is_valid).nonzero()[0]))
        return self.network(features).masked_fill(~mask, MASKED_LOGIT)


@dataclass(frozen=True)
class ActionHead:
    """A network, the keys it writes, and the distribution that reads them."""

    network: nn.Module
    param_keys: list[str]
    distribution_class: type[distributions.Distribution]
    distribution_kwargs: dict[str, Any] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)
    """Number of options of each categorical choice."""


def _is_continuous(spec: TensorSpec, event_dims: int) -> bool:
    return event_dims == 1 and spec.shape[-1] > 0 and spec.dtype.is_floating_point


def build_action_head(
    action_spec: TensorSpec,
    in_features: int,
    *,
    scale: float = 0.01,
    batch_dims: int = 0,
    hidden_sizes: Sequence[int] = (),
    log_std_init: float = 0.0,
    std_from_features: bool = False,
    squash: bool = False,
) -> ActionHead:
    """Build the head that fits an action spec: categorical, one-hot, multi-categorical, or continuous.

    Continuous actions have a normal distribution, or a normal distribution squashed by tanh.

    Args:
        action_spec: the action spec of the environment.
        in_features: width of the features.
        scale: factor on the initial weights, so that the first policy is near uniform.
        batch_dims: number of leading batch dimensions in the spec's shape.
        hidden_sizes: widths of hidden layers.
        log_std_init: see `NormalHead`.
        std_from_features: see `NormalHead`.
        squash: squash continuous actions into their bounds by tanh. False: the environment clips them.

    Raises:
        ValueError: if no head fits the spec, or actions without bounds cannot be squashed.
    """
    width = hidden_sizes[-1] if hidden_sizes else in_features
    event_dims = len(action_spec.shape) - batch_dims
    if isinstance(action_spec, MultiCategorical) and event_dims == 1:
        sizes = [int(n) for n in action_spec.nvec.reshape(-1, action_spec.nvec.shape[-1])[0]]
        network = linear = nn.Linear(width, sum(sizes))
        head = ActionHead(network, ["logits"], MultiDiscrete, {"sizes": sizes}, sizes)
    elif type(action_spec) is Categorical and event_dims == 1 and action_spec.shape[-1] > 1:
        sizes = [int(action_spec.space.n)] * action_spec.shape[-1]  # TorchRL's spec of several choices of equal size
        network = linear = nn.Linear(width, sum(sizes))
        head = ActionHead(network, ["logits"], MultiDiscrete, {"sizes": sizes}, sizes)
    elif type(action_spec) is Categorical and event_dims == 0:
        network = linear = nn.Linear(width, int(action_spec.space.n))
        head = ActionHead(network, ["logits"], distributions.Categorical, sizes=[linear.out_features])
    elif type(action_spec) is OneHot and event_dims == 1:
        network = linear = nn.Linear(width, int(action_spec.space.n))
        head = ActionHead(network, ["logits"], OneHotCategorical, sizes=[linear.out_features])
    elif isinstance(action_spec, (Bounded, Unbounded)) and _is_continuous(action_spec, event_dims):
        box = cast("ContinuousBox", action_spec.space)
        low, high = (bound.reshape(-1, action_spec.shape[-1])[0] for bound in (box.low, box.high))
        network = NormalHead(
            width, low, high, log_std_init=log_std_init, std_from_features=std_from_features, is_squashed=squash
        )
        linear = network.mean
        kind, options = (TanhNormalWithNoise, {"low": low, "high": high}) if squash else (NormalWithNoise, {})
        head = ActionHead(network, ["loc", "scale"], kind, options)
    else:
        raise ValueError(
            f"no action head fits {type(action_spec).__name__} of shape {tuple(action_spec.shape)}; categorical, "
            "one-hot, multi-categorical and flat continuous actions do. For an environment of gymnasium use "
            "GymWrapper(cyborg_torchrl.envs.gym.environment.wrap(env)), which converts many others."
        )
    with torch.no_grad():
        linear.weight *= scale
        linear.bias.zero_()
    return replace(head, network=with_hidden_layers(in_features, hidden_sizes, network))
