"""Hidden layers of encoders and heads."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn


def hidden_layers(in_features: int, hidden_sizes: Sequence[int]) -> list[nn.Module]:
    """Return linear layers with SiLU after each, initialised orthogonally.

    The gain sqrt(2) and zero biases are usual for PPO (Andrychowicz et al. 2021, "What matters in on-policy RL").

    Args:
        in_features: width of the input.
        hidden_sizes: widths of the layers; empty: no layer.
    """
    layers: list[nn.Module] = []
    for width in hidden_sizes:
        linear = nn.Linear(in_features, width)
        nn.init.orthogonal_(linear.weight, math.sqrt(2.0))
        with torch.no_grad():
            linear.bias.zero_()
        layers += [linear, nn.SiLU()]
        in_features = width
    return layers


def with_hidden_layers(in_features: int, hidden_sizes: Sequence[int], head: nn.Module) -> nn.Module:
    """Return a head behind hidden layers; the head itself if there are none."""
    layers = hidden_layers(in_features, hidden_sizes)
    return nn.Sequential(*layers, head) if layers else head
