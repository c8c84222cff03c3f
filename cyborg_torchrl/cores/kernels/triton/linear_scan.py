"""The gated linear scan in Triton, with its gradient, and generalised advantages."""

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


def linear_scan_triton(
    decay: Float[Tensor, "T B D"],
    drive: Float[Tensor, "T B D"],
    h_0: Float[Tensor, "B D"],
    is_init: Bool[Tensor, "T B"],
    initial: Float[Tensor, "B D"],
) -> Float[Tensor, "T B D"]:
    """Return the states of a linear recurrence. Arguments are those of `gated_linear_scan`, float32 on a GPU."""
    tensors = [tensor.contiguous() for tensor in (decay, drive, h_0, initial, is_init)]
    return _LinearScan.apply(*distinct(tensors)) if needs_gradient(tensors) else _run(*tensors)


def _run(decay: Tensor, drive: Tensor, h_0: Tensor, initial: Tensor, is_init: Tensor) -> Tensor:
    states = torch.empty_like(drive)
    run("linear_scan", [decay, drive, h_0, initial, is_init], [states])
    return states


class _LinearScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, *tensors: Tensor) -> Tensor:
        states = _run(*tensors)
        decay, _, *others = tensors
        ctx.save_for_backward(decay, *others, states)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_states: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        grad_decay, grad_drive = (torch.empty_like(saved[0]) for _ in range(2))
        grad_h_0, grad_initial = (torch.empty_like(saved[1]) for _ in range(2))
        outputs = [grad_decay, grad_drive, grad_h_0, grad_initial]
        run("linear_scan_backward", [*saved, grad_states.contiguous()], outputs)
        return grad_decay, grad_drive, grad_h_0, grad_initial, None


def generalized_advantage_triton(
    reward_t: Float[Tensor, "N T"],
    value_t: Float[Tensor, "N T"],
    value_tp1: Float[Tensor, "N T"],
    is_terminated_t: Bool[Tensor, "N T"],
    is_done_t: Bool[Tensor, "N T"],
    gamma: int | float,
    gae_lambda: int | float,
) -> Float[Tensor, "N T"]:
    """Return generalised advantages, without a gradient. Arguments are those of `generalized_advantage`."""
    inputs = [tensor.contiguous() for tensor in (reward_t, value_t, value_tp1, is_terminated_t, is_done_t)]
    result = torch.empty_like(inputs[0])
    run("advantage", inputs, [result], [gamma, gamma * gae_lambda])
    return result


@launch("linear_scan")
def _launch(inputs: Sequence[Tensor], outputs: Sequence[Tensor], _: Sequence[int | float]) -> None:
    steps, rows, channels = outputs[0].shape
    grid = (rows, ceil_div(channels, CONSTANTS["BLOCK"]))
    kernels("linear_scan").forward[grid](*inputs, *outputs, steps, rows, D=channels, **CONSTANTS)


@launch("linear_scan_backward")
def _launch_backward(inputs: Sequence[Tensor], outputs: Sequence[Tensor], _: Sequence[int | float]) -> None:
    steps, rows, channels = inputs[-1].shape
    grid = (rows, ceil_div(channels, CONSTANTS["BLOCK"]))
    kernels("linear_scan").backward[grid](*inputs, *outputs, steps, rows, D=channels, **CONSTANTS)


@launch("advantage")
def _launch_advantage(inputs: Sequence[Tensor], outputs: Sequence[Tensor], numbers: Sequence[int | float]) -> None:
    rows, steps = outputs[0].shape
    grid = (ceil_div(rows, CONSTANTS["BLOCK"]),)
    kernels("linear_scan").advantage[grid](*inputs, *outputs, *map(float, numbers), steps, rows, **CONSTANTS)
