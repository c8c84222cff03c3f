"""The norm over groups of channels in C++, with its gradient."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from cyborg_torchrl.cores.kernels.native import needs_gradient, run


def group_norm_cpp(
    x: Float[Tensor, "*B D"], scales: Float[Tensor, " D"] | None, groups: int, eps: float
) -> Float[Tensor, "*B D"]:
    """Return the output of `TimescaleNorm`. It runs on as many threads as torch uses.

    Args:
        x: rows.
        scales: factors of the channels before the norm. None: no factors.
        groups: number of groups, a divisor of D.
        eps: floor of the mean square.

    Raises:
        RuntimeError: if the C++ kernels were not built.
    """
    x = x.contiguous()
    return _GroupNorm.apply(x, scales, groups, eps) if needs_gradient([x]) else _run(x, scales, groups, eps)


def _run(x: Tensor, scales: Tensor | None, groups: int, eps: float) -> Tensor:
    y = torch.empty_like(x)
    inputs = [x] if scales is None else [x, scales]
    run("norm", _sizes(x, groups), inputs, [y], eps=eps)
    return y


def _sizes(x: Tensor, groups: int) -> tuple[int, ...]:
    channels = x.shape[-1]
    # All leading dimensions count as rows: the norm treats steps and environments alike.
    return 1, x.numel() // channels, channels, channels // groups


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, scales: Tensor | None, groups: int, eps: float) -> Tensor:
        # C++ recomputes the norm from x, so nothing more is stored.
        ctx.save_for_backward(x)
        ctx.scales, ctx.groups, ctx.eps = scales, groups, eps
        return _run(x, scales, groups, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        inputs = [x, grad_y.contiguous()] if ctx.scales is None else [x, grad_y.contiguous(), ctx.scales]
        run("norm_backward", _sizes(x, ctx.groups), inputs, [grad_x], eps=ctx.eps)
        return grad_x, None, None, None


def added_layer_norms_cpp(
    first: Float[Tensor, "B D"], second: Float[Tensor, "B D"], norms: tuple[nn.LayerNorm, nn.LayerNorm]
) -> Float[Tensor, "B D"]:
    """Return the sum of two layer norms of different inputs, without a gradient.

    Args:
        first: input of the first norm.
        second: input of the second norm.
        norms: two norms with weights and biases, and the same eps.
    """
    first, second = first.contiguous(), second.contiguous()
    total = torch.empty_like(first)
    # `norm.weight` would go through Module.__getattr__, which takes longer than the norms themselves.
    one, other = (norm._parameters for norm in norms)
    inputs: list[Any] = [first, one["weight"], one["bias"], second, other["weight"], other["bias"]]
    run("added_norms", (1, *first.shape), inputs, [total], eps=norms[0].eps)
    return total
