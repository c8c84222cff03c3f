"""Time-scales of a memory: how they are spread over channels, and how their read-out is made equally loud."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

READOUTS = ("timescale_norm", "none")


def log_spaced_timescales(channels: int, max_horizon: int, reach: float = 10.0) -> Float[Tensor, " D"]:
    """Time constants in steps, log-uniform from 1 to `reach * max_horizon`, in ascending order, [channels].

    Raises:
        ValueError: if channels or max_horizon is below 1.
    """
    if channels < 1 or max_horizon < 1:
        raise ValueError(f"channels and max_horizon must be >= 1; got {channels} and {max_horizon}.")
    return torch.logspace(0.0, math.log10(reach * max_horizon), channels)


def _inverse_rms(x: Tensor, average: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean square + eps) of each channel's group, and zero where all of it is zero."""
    mean_square = torch.matmul(x.square(), average.to(x.dtype))
    scale = torch.rsqrt(mean_square + eps).masked_fill_(mean_square == 0.0, 0.0)
    return torch.matmul(scale, (average > 0).to(x.dtype).t())


class _GroupNorm(torch.autograd.Function):
    """y = x r with r = 1 / sqrt(mean_g x^2 + eps), whose gradient is r (g - y mean_g(g y))."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: FunctionCtx, x: Tensor, average: Tensor, eps: float
    ) -> Tensor:
        scale = _inverse_rms(x, average, eps)
        y = x * scale
        ctx.save_for_backward(y, scale, average)
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: FunctionCtx, grad_y: Tensor
    ) -> tuple[Tensor | None, ...]:
        y, scale, average = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        mean = torch.matmul(torch.matmul(grad_y * y, average.to(y.dtype)), (average > 0).to(y.dtype).t())
        return torch.addcmul(grad_y, y, mean, value=-1.0).mul_(scale), None, None


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
        timescales: multiplied to the channels before the norm, [D]. Where one write is a slow channel's step size, this
            makes writes alike in all bands, so that `eps` can be large enough to leave numbers alone that cancelled
            to next to nothing, whose digits would be noise. None: channels as they are.

    Source: our own finding, with its ablation in docs/ablations.md; the group form is that of group
    normalisation (Wu and He, 2018) with the mean kept, as in RMSNorm (Zhang and Sennrich, 2019).
    """

    def __init__(
        self, features: int, groups: int = 16, eps: float = 1e-12, timescales: Float[Tensor, " D"] | None = None
    ) -> None:
        super().__init__()
        if groups < 1:
            raise ValueError(f"groups must be >= 1; got {groups}.")
        self.groups = next(g for g in range(max(1, min(groups, features // 2)), 0, -1) if features % g == 0)
        self.eps = eps
        self.timescales: Tensor | None
        self.register_buffer("timescales", timescales, persistent=False)
        # the mean over each group as a matrix product: far faster than a reduction over a few numbers at a time
        average = torch.eye(self.groups).repeat_interleave(features // self.groups, 0) * (self.groups / features)
        self.average: Tensor
        self.register_buffer("average", average, persistent=False)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Returns the normalised read-out, of the same shape."""
        if self.timescales is not None:
            x = x * self.timescales
        if torch.is_grad_enabled() and x.requires_grad:
            return _GroupNorm.apply(x, self.average, self.eps)  # pyright: ignore[reportReturnType]
        return x * _inverse_rms(x, self.average, self.eps)

    def extra_repr(self) -> str:
        """Shows the options."""
        return f"groups={self.groups}, eps={self.eps}"


def build_readout(name: str, features: int, groups: int, timescales: Float[Tensor, " D"] | None = None) -> nn.Module:
    """Returns the module between a memory and what reads it: "timescale_norm", or "none" for the bare state.

    Raises:
        ValueError: if there is no such read-out.
    """
    if name == "timescale_norm":
        return TimescaleNorm(features, groups, 1e-12 if timescales is None else 1e-4, timescales)
    if name == "none":
        return nn.Identity()
    raise ValueError(f"unknown readout '{name}'; known: {', '.join(READOUTS)}.")


def rms_normalize(x: Float[Tensor, "*B D"], eps: float = 1e-5) -> Float[Tensor, "*B D"]:
    """Divides by the root mean square over the last dimension; no parameters."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def step_sizes(channels: int, max_horizon: int, dt_max: float = 0.3) -> Float[Tensor, " D"]:
    """Step sizes from `dt_max` down to .1 / max_horizon, log-uniform, [channels].

    Channels are in ascending order of their time-scale 1 / delta, which reaches ten horizons where the state matrix
    is -1.
    """
    return torch.logspace(math.log10(dt_max), math.log10(0.1 / max_horizon), channels)


def step_size_bias(channels: int, max_horizon: int, dt_max: float = 0.3) -> Float[Tensor, " D"]:
    """Biases b with softplus(b) = `step_sizes`, [channels]."""
    delta = step_sizes(channels, max_horizon, dt_max)
    return delta + torch.log(-torch.expm1(-delta))
