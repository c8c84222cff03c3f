"""Time-scales of a memory: how they are spread over channels, and how their read-out is made equally loud."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

READOUTS = ("timescale_norm", "none")


def log_spaced_timescales(channels: int, max_horizon: int, reach: float = 10.0) -> Float[Tensor, " D"]:
    """Time constants in steps, log-uniform from 1 to `reach * max_horizon`, in ascending order, [channels].

    Raises:
        ValueError: if channels or max_horizon is below 1.
    """
    if channels < 1 or max_horizon < 1:
        raise ValueError(f"channels and max_horizon must be >= 1; got {channels} and {max_horizon}.")
    return torch.logspace(0.0, math.log10(reach * max_horizon), channels)


class TimescaleNorm(nn.Module):
    """RMS-normalises a memory's read-out in groups of neighbouring time-scales, each group by itself.

        y_g = x_g / sqrt(mean(x_g^2) + eps)    for each group g of channels

    Slow channels write little at each step. Under one norm over all channels the present drowns the past; here
    every band of time-scales is equally loud. Channels must be ordered by time-scale. No parameters. A memory that
    is exactly zero stays zero and gets no gradient there, where the slope would be 1 / sqrt(eps).

    Args:
        features: channels of the read-out, D.
        groups: number of groups; reduced to the largest divisor of D that leaves two channels or more to a group
            (one channel alone would be normalised to its sign). 1 is plain RMSNorm.
        eps: floor of the mean square; small, since slow channels are small.

    Source: our own finding, with its ablation in docs/ablations.md; the group form is that of group
    normalisation (Wu and He, 2018) with the mean kept, as in RMSNorm (Zhang and Sennrich, 2019).
    """

    def __init__(self, features: int, groups: int = 16, eps: float = 1e-12) -> None:
        super().__init__()
        if groups < 1:
            raise ValueError(f"groups must be >= 1; got {groups}.")
        self.groups = next(g for g in range(max(1, min(groups, features // 2)), 0, -1) if features % g == 0)
        self.eps = eps

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Returns the normalised read-out, of the same shape."""
        grouped = x.unflatten(-1, (self.groups, -1))
        mean_square = grouped.square().mean(-1, keepdim=True)
        scale = torch.rsqrt(mean_square + self.eps).masked_fill(mean_square == 0.0, 0.0)
        return (grouped * scale).flatten(-2)

    def extra_repr(self) -> str:
        """Shows the options."""
        return f"groups={self.groups}, eps={self.eps}"


def build_readout(name: str, features: int, groups: int) -> nn.Module:
    """Returns the module between a memory and what reads it: "timescale_norm", or "none" for the bare state.

    Raises:
        ValueError: if there is no such read-out.
    """
    if name == "timescale_norm":
        return TimescaleNorm(features, groups)
    if name == "none":
        return nn.Identity()
    raise ValueError(f"unknown readout '{name}'; known: {', '.join(READOUTS)}.")
