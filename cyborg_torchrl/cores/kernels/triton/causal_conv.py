"""The causal convolution before a state space model in Triton, with its gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from cyborg_torchrl.cores.kernels.native import distinct, needs_gradient
from cyborg_torchrl.cores.kernels.triton.launch import ceil_div, launch, run
from cyborg_torchrl.cores.kernels.triton.loading import kernels

WIDTH = 4
"""Taps of the kernel."""
BLOCK = 64
"""Channels of a program."""
SPAN = 32
"""Steps of a program of the backward pass."""


def causal_conv_triton(
    x: Float[Tensor, "T B D"],
    weight: Float[Tensor, "D W"],
    bias: Float[Tensor, " D"] | None,
    history: Float[Tensor, "B D W"],
    is_init: Bool[Tensor, "T B"],
    initial: Float[Tensor, "B D W"],
) -> tuple[Float[Tensor, "T B D"], Float[Tensor, "B D W"]]:
    """Run `causal_conv` in Triton, for W = 4 taps.

    Args:
        x: this and all other arguments are those of `causal_conv`, float32 on a GPU.
    """
    tensors = [tensor.contiguous() for tensor in (x, weight, history, initial, is_init)]
    if bias is not None:
        tensors.append(bias)
    if needs_gradient(tensors):
        return _CausalConv.apply(*distinct(tensors))
    return _run(tensors)


def _run(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    y, last = torch.empty_like(tensors[0]), torch.empty_like(tensors[2])
    run("causal_conv", tensors, [y, last])
    return y, last


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*tensors)
        return _run(tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_y: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        x, history, bias = saved[0], saved[2], saved[5:]
        spans = ceil_div(x.shape[0], SPAN)
        grad_x, grad_history = torch.empty_like(x), torch.empty_like(history)
        grad_weight, grad_initial = (x.new_empty(spans, *history.shape) for _ in range(2))
        grad_bias = x.new_empty(spans, *history.shape[:2])
        inputs = [*saved[:5], grad_y.contiguous(), grad_last.contiguous(), *bias]
        run("causal_conv_backward", inputs, [grad_x, grad_weight, grad_bias, grad_history, grad_initial])
        grads = (grad_x, grad_weight.sum((0, 1)), grad_history, grad_initial.sum(0), None)
        return (*grads, grad_bias.sum((0, 1))) if bias else grads


@launch("causal_conv")
def _launch(inputs: Sequence[Tensor], outputs: Sequence[Tensor], _: Sequence[int | float]) -> None:
    x, weight, history, initial, is_init, *bias = inputs
    steps, rows, channels = x.shape
    grid = (steps * rows, ceil_div(channels, BLOCK))
    # A pointer has to be passed in any case. Without a bias it is not read.
    tensors = [x, weight, *(bias or [weight]), history, initial, is_init, *outputs]
    kernel = kernels("causal_conv").forward[grid]
    kernel(*tensors, steps, rows, D=channels, HAS_BIAS=bool(bias), BLOCK=BLOCK, num_warps=1)


@launch("causal_conv_backward")
def _launch_backward(inputs: Sequence[Tensor], outputs: Sequence[Tensor], _: Sequence[int | float]) -> None:
    x, weight, history, initial, is_init, grad_y, grad_last, *bias = inputs
    steps, rows, channels = x.shape
    grid = (rows, ceil_div(channels, BLOCK), ceil_div(steps, SPAN))
    tensors = [x, weight, *(bias or [weight]), history, initial, is_init, grad_y, grad_last, *outputs]
    kernel = kernels("causal_conv").backward[grid]
    kernel(*tensors, steps, rows, D=channels, HAS_BIAS=bool(bias), BLOCK=BLOCK, SPAN=SPAN, num_warps=1)
