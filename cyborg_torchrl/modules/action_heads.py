"""Action heads: networks that compute the parameters of a distribution which fits an action spec."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, distributions, nn
from torchrl.data import Bounded, Categorical, MultiCategorical, OneHot, TensorSpec, Unbounded
from torchrl.data.tensor_specs import ContinuousBox
from torchrl.modules import IndependentNormal, OneHotCategorical


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


class NormalHead(nn.Module):
    """Mean from the features, standard deviation from a free parameter, both in units of half the action range."""

    def __init__(self, in_features: int, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.mean = nn.Linear(in_features, low.numel())
        self.log_std = nn.Parameter(torch.zeros(low.numel()))
        is_finite = torch.isfinite(high - low)  # TorchRL's unbounded specs reach from -max to max
        self.centre: Tensor
        self.half_range: Tensor
        self.register_buffer("centre", torch.where(is_finite, (low + high) / 2, torch.zeros_like(low)))
        self.register_buffer("half_range", torch.where(is_finite, (high - low) / 2, torch.ones_like(low)))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, [*B, A]."""
        mean = self.centre + self.half_range * self.mean(features)
        return mean, (self.half_range * self.log_std.exp()).expand_as(mean)


@dataclass(frozen=True)
class ActionHead:
    """A network, the keys it writes, and the distribution that reads them."""

    network: nn.Module
    param_keys: list[str]
    distribution_class: type[distributions.Distribution]
    distribution_kwargs: dict[str, Any] = field(default_factory=dict)


def build_action_head(
    action_spec: TensorSpec, in_features: int, *, scale: float = 0.01, batch_dims: int = 0
) -> ActionHead:
    """Build the head that fits an action spec: categorical, one-hot, multi-categorical, or continuous (normal).

    Args:
        action_spec: the action spec of the environment.
        in_features: width of the features.
        scale: factor on the initial weights, so that the first policy is near uniform.
        batch_dims: number of leading batch dimensions in the spec's shape.

    Raises:
        ValueError: if no head fits the spec.
    """
    event_dims = len(action_spec.shape) - batch_dims
    if isinstance(action_spec, MultiCategorical) and event_dims == 1:
        sizes = [int(n) for n in action_spec.nvec.reshape(-1, action_spec.nvec.shape[-1])[0]]
        linear = nn.Linear(in_features, sum(sizes))
        head = ActionHead(linear, ["logits"], MultiDiscrete, {"sizes": sizes})
    elif type(action_spec) is Categorical and event_dims == 0:
        linear = nn.Linear(in_features, int(action_spec.space.n))
        head = ActionHead(linear, ["logits"], distributions.Categorical)
    elif type(action_spec) is OneHot and event_dims == 1:
        linear = nn.Linear(in_features, int(action_spec.space.n))
        head = ActionHead(linear, ["logits"], OneHotCategorical)
    elif isinstance(action_spec, (Bounded, Unbounded)) and event_dims == 1 and action_spec.dtype.is_floating_point:
        box = cast("ContinuousBox", action_spec.space)
        low, high = (bound.reshape(-1, action_spec.shape[-1])[0] for bound in (box.low, box.high))
        network = NormalHead(in_features, low, high)
        head = ActionHead(network, ["loc", "scale"], IndependentNormal)
        linear = network.mean
    else:
        raise ValueError(
            f"no action head fits {type(action_spec).__name__} of shape {tuple(action_spec.shape)}; categorical, "
            "one-hot, multi-categorical and flat continuous actions do."
        )
    with torch.no_grad():
        linear.weight *= scale
        linear.bias.zero_()
    return head
