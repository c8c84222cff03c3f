"""The gated recurrence of `lru` in Triton, with its gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from cyborg_torchrl.cores.kernels.native import distinct, needs_gradient
from cyborg_torchrl.cores.kernels.triton.launch import ceil_div, launch, run
from cyborg_torchrl.cores.kernels.triton.loading import kernels

CONSTANTS = {"BLOCK": 32, "UNROLL": 8, "num_warps": 1}


def gated_recurrence_triton(
    inputs: Float[Tensor, "T B I"],
    rate: Float[Tensor, " D"],
    h_0: Float[Tensor, "B D"],
    is_init: Bool[Tensor, "T B"],
    initial: Float[Tensor, "B D"],
) -> Float[Tensor, "T B D"]:
    """Return the states of an `LRULayer`. Arguments are those of `gated_recurrence_cpp`, float32 on a GPU."""
    tensors = [tensor.contiguous() for tensor in (inputs, rate, h_0, initial, is_init)]
    return _GatedRecurrence.apply(*distinct(tensors)) if needs_gradient(tensors) else _run(*tensors)


def _run(inputs: Tensor, rate: Tensor, h_0: Tensor, initial: Tensor, is_init: Tensor) -> Tensor:
    states = inputs.new_empty(inputs.shape[0], *h_0.shape)
    run("gated_recurrence", [inputs, rate, h_0, initial, is_init], [states])
    return states


class _GatedRecurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, *tensors: Tensor) -> Tensor:
        states = _run(*tensors)
        # Only inputs and states are saved. The backward pass recomputes the gates, to save memory.
        ctx.save_for_backward(*tensors, states)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_states: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        inputs, _, h_0, _, _, _ = saved
        # One row of the rate's gradient for each environment, summed by torch: runs repeat bit by bit.
        grad_inputs = torch.empty_like(inputs)
        grad_rate, grad_h_0, grad_initial = (torch.empty_like(h_0) for _ in range(3))
        outputs = [grad_inputs, grad_rate, grad_h_0, grad_initial]
        run("gated_recurrence_backward", [*saved, grad_states.contiguous()], outputs)
        return grad_inputs, grad_rate.sum(0), grad_h_0, grad_initial, None


@launch("gated_recurrence")
def _launch(inputs: Sequence[Tensor], outputs: Sequence[Tensor], _: Sequence[int | float]) -> None:
    steps, rows, channels = outputs[0].shape
    grid = (rows, ceil_div(channels, CONSTANTS["BLOCK"]))
    kernels("gated_recurrence").forward[grid](*inputs, *outputs, steps, rows, D=channels, **CONSTANTS)


@launch("gated_recurrence_backward")
def _launch_backward(inputs: Sequence[Tensor], outputs: Sequence[Tensor], _: Sequence[int | float]) -> None:
    steps, rows, channels = inputs[-1].shape
    grid = (rows, ceil_div(channels, CONSTANTS["BLOCK"]))
    kernels("gated_recurrence").backward[grid](*inputs, *outputs, steps, rows, D=channels, **CONSTANTS)
