"""The read-out of the Mamba family in Triton, with its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from cyborg_torchrl.cores.kernels.native import distinct, needs_gradient
from cyborg_torchrl.cores.kernels.triton.group_norm import tile_constants
from cyborg_torchrl.cores.kernels.triton.launch import ceil_div, launch, run
from cyborg_torchrl.cores.kernels.triton.loading import kernels

MAX_PROGRAMS = 512
"""Programs of the backward pass, each with a row of the gradient of `skip`."""


def gated_readout_triton(
    y: Float[Tensor, "*B D"],
    u: Float[Tensor, "*B D"],
    z: Float[Tensor, "*B D"],
    skip: Float[Tensor, " D"],
    scales: Float[Tensor, " D"] | None,
    groups: int,
    eps: float,
) -> Float[Tensor, "*B D"]:
    """Return the output of `gated_readout`, float32 on a GPU.

    Args:
        y: output of the memory.
        u: current input of the memory.
        z: input of the gate.
        skip: weight of the present.
        scales: factors of the channels before the norm. None: no factors.
        groups: number of groups of the norm. 0: no norm.
        eps: floor of the norm's mean square.
    """
    tensors = [tensor.contiguous() for tensor in (y, u, z, skip)]
    numbers = (groups, eps)
    if needs_gradient(tensors):
        return _GatedReadout.apply(*distinct(tensors), scales, numbers)
    return _run(tensors, scales, numbers)


def _run(tensors: Sequence[Tensor], scales: Tensor | None, numbers: Sequence[int | float]) -> Tensor:
    out = torch.empty_like(tensors[0])
    run("gated_readout", [*tensors, *_optional(scales)], [out], numbers)
    return out


def _optional(scales: Tensor | None) -> list[Tensor]:
    return [] if scales is None else [scales]


class _GatedReadout(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        y: Tensor,
        u: Tensor,
        z: Tensor,
        skip: Tensor,
        scales: Tensor | None,
        numbers: tuple[int | float, ...],
    ) -> Tensor:
        ctx.save_for_backward(y, u, z, skip)
        ctx.scales, ctx.numbers = scales, numbers
        return _run([y, u, z, skip], scales, numbers)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        y, skip = saved[0], saved[3]
        grads = [torch.empty_like(y) for _ in range(3)]
        rows = y.numel() // y.shape[-1]
        programs = min(MAX_PROGRAMS, ceil_div(rows, tile_constants(y, int(ctx.numbers[0]))["ROWS"]))
        grad_skip = skip.new_empty(programs, *skip.shape)
        inputs = [*saved, grad_out.contiguous(), *_optional(ctx.scales)]
        run("gated_readout_backward", inputs, [*grads, grad_skip], ctx.numbers)
        return *grads, grad_skip.sum(0), None, None


def _constants(y: Tensor, scales: Sequence[Tensor], groups: int) -> dict[str, Any]:
    return {**tile_constants(y, groups), "HAS_NORM": groups > 0, "HAS_SCALES": bool(scales)}


@launch("gated_readout")
def _launch(inputs: Sequence[Tensor], outputs: Sequence[Tensor], numbers: Sequence[int | float]) -> None:
    y, u, z, skip, *scales = inputs
    rows = y.numel() // y.shape[-1]
    chosen = _constants(y, scales, int(numbers[0]))
    grid = (ceil_div(rows, chosen["ROWS"]),)
    # A pointer has to be passed in any case. Without scales it is not read.
    tensors = [y, u, z, skip, *(scales or [skip]), *outputs]
    kernels("gated_readout").forward[grid](*tensors, rows, float(numbers[1]), **chosen)


@launch("gated_readout_backward")
def _launch_backward(inputs: Sequence[Tensor], outputs: Sequence[Tensor], numbers: Sequence[int | float]) -> None:
    y, u, z, skip, grad_out, *scales = inputs
    rows = y.numel() // y.shape[-1]
    chosen = _constants(y, scales, int(numbers[0]))
    grid = (outputs[-1].shape[0],)
    tensors = [y, u, z, skip, grad_out, *(scales or [skip]), *outputs]
    kernels("gated_readout").backward[grid](*tensors, rows, float(numbers[1]), **chosen)
