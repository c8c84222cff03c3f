"""The norm over groups of channels in Triton, with its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from cyborg_torchrl.cores.kernels.native import needs_gradient
from cyborg_torchrl.cores.kernels.triton.launch import ceil_div, launch, next_power_of_2, run
from cyborg_torchrl.cores.kernels.triton.loading import kernels

TILE = 1024
"""Numbers of a tile, unless one row has more."""


def group_norm_triton(
    x: Float[Tensor, "*B D"], scales: Float[Tensor, " D"] | None, groups: int, eps: float
) -> Float[Tensor, "*B D"]:
    """Return the output of `TimescaleNorm`. Arguments are those of `group_norm_cpp`, float32 on a GPU."""
    x = x.contiguous()
    return _GroupNorm.apply(x, scales, groups, eps) if needs_gradient([x]) else _run(x, scales, groups, eps)


def _run(x: Tensor, scales: Tensor | None, groups: int, eps: float) -> Tensor:
    y = torch.empty_like(x)
    run("group_norm", [x] if scales is None else [x, scales], [y], [groups, eps])
    return y


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, scales: Tensor | None, groups: int, eps: float) -> Tensor:
        # The backward pass recomputes the norm from x, so nothing more is stored.
        ctx.save_for_backward(x)
        ctx.scales, ctx.groups, ctx.eps = scales, groups, eps
        return _run(x, scales, groups, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        inputs = [x, grad_y.contiguous()] if ctx.scales is None else [x, grad_y.contiguous(), ctx.scales]
        run("group_norm_backward", inputs, [grad_x], [ctx.groups, ctx.eps])
        return grad_x, None, None, None


@launch("group_norm")
def _launch(inputs: Sequence[Tensor], outputs: Sequence[Tensor], numbers: Sequence[int | float]) -> None:
    x, *scales = inputs
    _launch_rows("forward", [x], scales, outputs[0], numbers)


@launch("group_norm_backward")
def _launch_backward(inputs: Sequence[Tensor], outputs: Sequence[Tensor], numbers: Sequence[int | float]) -> None:
    x, grad_y, *scales = inputs
    _launch_rows("backward", [x, grad_y], scales, outputs[0], numbers)


def _launch_rows(
    name: str, inputs: Sequence[Tensor], scales: Sequence[Tensor], output: Tensor, numbers: Sequence[int | float]
) -> None:
    rows = output.numel() // output.shape[-1]
    chosen = {**tile_constants(output, int(numbers[0])), "HAS_SCALES": bool(scales)}
    grid = (ceil_div(rows, chosen["ROWS"]),)
    kernel = getattr(kernels("group_norm"), name)
    # A pointer has to be passed in any case. Without scales it is not read.
    kernel[grid](*inputs, *(scales or [inputs[0]]), output, rows, float(numbers[1]), **chosen)


def tile_constants(x: Tensor, groups: int) -> dict[str, Any]:
    """Return the constants of a kernel whose programs compute some rows of `x`. Zero groups count as one."""
    channels, count = x.shape[-1], max(1, groups)
    padded, size = next_power_of_2(count), next_power_of_2(channels // count)
    rows = max(1, TILE // (padded * size))
    return {"COUNT": count, "WIDTH": channels // count, "GROUPS": padded, "SIZE": size, "ROWS": rows}
