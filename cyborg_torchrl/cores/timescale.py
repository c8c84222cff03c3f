"""Time-scales of a memory: their spread over channels, and a norm that gives their read-outs equal magnitude."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from cyborg_torchrl.cores.blocks import blocks
from cyborg_torchrl.cores.kernels.group_norm import group_norm_cpp
from cyborg_torchrl.cores.kernels.native import is_native
from cyborg_torchrl.cores.kernels.triton.group_norm import group_norm_triton
from cyborg_torchrl.cores.kernels.triton.loading import is_triton

READOUTS = ("timescale_norm", "none")


LONG_REACH = 1000.0
"""Horizons that the slowest channels of `lru` reach, so that episodes may be longer than those of training."""


def log_spaced_timescales(channels: int, max_horizon: int, reach: float = 10.0) -> Float[Tensor, " D"]:
    """Return time constants in steps, log-uniform from 1 to `reach * max_horizon`, ascending, [channels].

    Raises:
        ValueError: if channels or max_horizon is below 1.
    """
    if channels < 1 or max_horizon < 1:
        raise ValueError(f"channels and max_horizon must be >= 1; got {channels} and {max_horizon}.")
    return torch.logspace(0.0, math.log10(reach * max_horizon), channels)


class _GroupNorm(torch.autograd.Function):
    """The norm over a whole sequence, block by block."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, norm: TimescaleNorm) -> Tensor:
        y = torch.empty_like(x)
        for span in blocks(x):
            torch.mul(x[span], norm.factors(x[span]), out=y[span])
        ctx.save_for_backward(x)
        ctx.norm = norm
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        norm: TimescaleNorm = ctx.norm
        grad_x = torch.empty_like(x)
        for span in blocks(x):
            factors = norm.factors(x[span])
            norm.backward(grad_y[span], x[span] * factors, factors, out=grad_x[span])
        return grad_x, None


class TimescaleNorm(nn.Module):
    """RMS norm of a memory's read-out, applied separately to groups of neighbouring time-scales.

        y_g = x_g / sqrt(mean(x_g^2) + eps)    for each group g of channels

    Slow channels write little at each step. One norm over all channels would let the fast ones hide them. Here every
    band of time-scales has the same magnitude. Channels must be ordered by time-scale. There are no parameters. A
    memory that is exactly zero stays zero. It gets no gradient, because the slope would be 1 / sqrt(eps).

    Args:
        features: channels of the read-out, D.
        groups: number of groups, reduced to the largest divisor of D with at least four channels in a group. A group
            of one channel would keep only its sign. Two channels cross zero together so often that rounding would
            show. 1 is plain RMSNorm.
        eps: floor of the mean square. It is small, because slow channels are small.
        timescales: factors of the channels before the norm, [D]. Use them if the size of a write is the channel's
            step size: then writes have the same size in all bands. This allows a larger `eps`, which does not amplify
            the rounding noise of sums that cancel. None: no factors.

    Source: our own finding, with an ablation in docs/ablations.md. The groups follow group normalisation (Wu and He,
    2018). The mean is kept, as in RMSNorm (Zhang and Sennrich, 2019).
    """

    def __init__(
        self, features: int, groups: int = 16, eps: float = 1e-12, timescales: Float[Tensor, " D"] | None = None
    ) -> None:
        super().__init__()
        if groups < 1:
            raise ValueError(f"groups must be >= 1; got {groups}.")
        self.groups = next(g for g in range(max(1, min(groups, features // 4)), 0, -1) if features % g == 0)
        self.eps = eps
        self.timescales: Tensor | None
        self.register_buffer("timescales", timescales, persistent=False)
        # Matrix products compute the means over groups and repeat a group's number for its channels. This is far
        # faster than reductions and broadcasts over a few numbers at a time.
        group = torch.eye(self.groups).repeat_interleave(features // self.groups, 0)
        self.average: Tensor
        self.register_buffer("average", group * (self.groups / features), persistent=False)
        self.spread: Tensor
        scales = 1.0 if timescales is None else timescales
        self.register_buffer("spread", group.t().contiguous() * scales, persistent=False)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Return the normalised read-out, of the same shape."""
        if is_native(x) and x.dtype == self.average.dtype:
            return group_norm_cpp(x, self.timescales, self.groups, self.eps)
        if is_triton(x) and x.dtype == self.average.dtype:
            return group_norm_triton(x, self.timescales, self.groups, self.eps)
        if torch.is_grad_enabled() and x.requires_grad and x.ndim > 1:
            return _GroupNorm.apply(x, self)
        return x * self.factors(x)

    def factors(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Return the factor of each channel: its time-scale divided by the root mean square of its group.

        The factor is zero for a group that is exactly zero.
        """
        scaled = x if self.timescales is None else x * self.timescales
        mean_square = torch.matmul(scaled.square(), self.average.to(x.dtype))
        scale = torch.rsqrt(mean_square + self.eps).masked_fill(mean_square == 0.0, 0.0)
        return torch.matmul(scale, self.spread.to(x.dtype))

    def backward(self, grad_y: Tensor, y: Tensor, factors: Tensor, out: Tensor) -> Tensor:
        """Write the gradient of x, f (g - y mean_g(g y)), to `out`, outside of autograd."""
        mean = torch.matmul(torch.mul(grad_y, y), self.average.to(y.dtype))
        share = torch.matmul(mean, (self.average > 0).to(y.dtype).t())
        return torch.addcmul(grad_y, y, share, value=-1.0, out=out).mul_(factors)

    def extra_repr(self) -> str:
        """Return the options as text."""
        return f"groups={self.groups}, eps={self.eps}"


def build_readout(name: str, features: int, groups: int, timescales: Float[Tensor, " D"] | None = None) -> nn.Module:
    """Return the module after a memory: "timescale_norm", or "none" for the bare state.

    Raises:
        ValueError: if the name is unknown.
    """
    if name == "timescale_norm":
        return TimescaleNorm(features, groups, 1e-12 if timescales is None else 1e-4, timescales)
    if name == "none":
        return nn.Identity()
    raise ValueError(f"unknown readout '{name}'; known: {', '.join(READOUTS)}.")


def rms_normalize(x: Float[Tensor, "*B D"], eps: float = 1e-5) -> Float[Tensor, "*B D"]:
    """Divide by the root mean square over the last dimension. There are no parameters."""
    return F.rms_norm(x, x.shape[-1:], eps=eps)  # one kernel on a GPU


def step_sizes(channels: int, max_horizon: int, dt_max: float = 0.3) -> Float[Tensor, " D"]:
    """Return step sizes from `dt_max` down to 0.1 / max_horizon, log-uniform, [channels].

    Channels are in ascending order of their time-scale 1 / delta. With a state matrix of -1 it reaches ten horizons.
    """
    return torch.logspace(math.log10(dt_max), math.log10(0.1 / max_horizon), channels)


def step_size_bias(channels: int, max_horizon: int, dt_max: float = 0.3) -> Float[Tensor, " D"]:
    """Return biases b with softplus(b) = `step_sizes`, [channels]."""
    delta = step_sizes(channels, max_horizon, dt_max)
    return delta + torch.log(-torch.expm1(-delta))
