"""The selective scans of `mamba` and `mamba2` in Triton, with their gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from cyborg_torchrl.cores.kernels.native import distinct, needs_gradient
from cyborg_torchrl.cores.kernels.triton.launch import ceil_div, launch, next_power_of_2, run
from cyborg_torchrl.cores.kernels.triton.loading import kernels

CHUNK = 16
"""Steps per stored state. The backward pass recomputes the states in between."""
TILE = 512
"""Numbers of the state of one program."""
MAX_BLOCK = 32
"""Channels of one program, as many as a warp has threads."""


def selective_scan_triton(
    u: Float[Tensor, "T B D"],
    delta: Float[Tensor, "T B D"],
    a: Float[Tensor, "D N"],
    b: Float[Tensor, "T B N"],
    c: Float[Tensor, "T B N"],
    h_0: Float[Tensor, "B D N"],
    is_init: Bool[Tensor, "T B"],
    initial: Float[Tensor, "B D N"],
) -> tuple[Float[Tensor, "T B D"], Float[Tensor, "B D N"]]:
    """Run `selective_scan` in Triton.

    Args:
        u: this and all other arguments are those of `selective_scan`, float32 on a GPU.

    Raises:
        ValueError: if there is no step.
    """
    return _scan(u, delta, a, b, c, h_0, initial, is_init)


def ssd_scan_triton(
    u: Float[Tensor, "T B H P"],
    delta: Float[Tensor, "T B H"],
    a: Float[Tensor, " H"],
    b: Float[Tensor, "T B N"],
    c: Float[Tensor, "T B N"],
    h_0: Float[Tensor, "B H P N"],
    is_init: Bool[Tensor, "T B"],
    initial: Float[Tensor, "B H P N"],
) -> tuple[Float[Tensor, "T B H P"], Float[Tensor, "B H P N"]]:
    """Run `ssd_scan` in Triton, step by step.

    Args:
        u: this and all other arguments are those of `ssd_scan`, float32 on a GPU.

    Raises:
        ValueError: if there is no step.
    """
    y, last = _scan(u.flatten(2), delta, a, b, c, h_0.flatten(1, 2), initial.flatten(1, 2), is_init)
    return y.view(u.shape), last.view(h_0.shape)


def _scan(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    tensors = tuple(tensor.contiguous() for tensor in tensors)
    u, h_0 = tensors[0], tensors[5]
    if u.shape[0] == 0:
        raise ValueError("the selective scan needs at least one step; got T == 0.")
    if needs_gradient(tensors):
        return _SelectiveScan.apply(*distinct(tensors))
    y, last = torch.empty_like(u), torch.empty_like(h_0)
    run("selective_scan", tensors, [y, last])
    return y, last


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        u, h_0 = tensors[0], tensors[5]
        y, last = torch.empty_like(u), torch.empty_like(h_0)
        starts = u.new_empty(ceil_div(u.shape[0], CHUNK), *h_0.shape)
        run("selective_scan", tensors, [y, last, starts])
        # The inputs and one state per chunk are enough to recompute all other states.
        ctx.save_for_backward(*tensors[:5], *tensors[6:], starts)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_y: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        u, delta, a, b, _, initial, _, _ = saved
        scratch = u.new_empty(min(CHUNK, u.shape[0]), *initial.shape)
        blocks = ceil_div(u.shape[2], _constants(u, delta, a, b)["BLOCK"])
        # Programs write rows that torch sums, in an order that does not change: runs repeat bit by bit.
        grad_u, grad_delta = torch.empty_like(u), torch.empty_like(u)
        grad_a = torch.empty_like(initial) if a.ndim == 2 else torch.empty_like(u[0])
        grad_b, grad_c = (u.new_empty(blocks, *b.shape) for _ in range(2))
        grad_h_0, grad_initial = torch.empty_like(initial), torch.empty_like(initial)
        run(
            "selective_scan_backward",
            [*saved, grad_y.contiguous(), grad_last.contiguous()],
            [scratch, grad_u, grad_delta, grad_a, grad_b, grad_c, grad_h_0, grad_initial],
        )
        grad_a = grad_a.sum(0)
        if a.ndim == 1:  # heads of several channels
            grad_delta = grad_delta.unflatten(-1, (a.shape[0], -1)).sum(-1)
            grad_a = grad_a.unflatten(-1, (a.shape[0], -1)).sum(-1)
        return grad_u, grad_delta, grad_a, grad_b.sum(0), grad_c.sum(0), grad_h_0, grad_initial, None


def _constants(u: Tensor, delta: Tensor, a: Tensor, b: Tensor) -> dict[str, Any]:
    channels, numbers = u.shape[-1], b.shape[-1]
    padded = next_power_of_2(numbers)
    return {
        "D": channels,
        "N": numbers,
        "WIDTH": channels // delta.shape[-1],
        "IS_SHARED": a.ndim == 1,
        "BLOCK": min(MAX_BLOCK, max(1, TILE // padded)),
        "P": padded,
        "CHUNK": CHUNK,
        "num_warps": 1,
    }


@launch("selective_scan")
def _launch(inputs: Sequence[Tensor], outputs: Sequence[Tensor], _: Sequence[int | float]) -> None:
    u, delta, a, b, *_others = inputs
    y, last, *starts = outputs
    steps, rows, channels = u.shape
    chosen = _constants(u, delta, a, b)
    grid = (rows, ceil_div(channels, chosen["BLOCK"]))
    # A pointer has to be passed in any case. Without a gradient it is not used.
    tensors = [*inputs, y, last, *(starts or [last])]
    kernels("selective_scan").forward[grid](*tensors, steps, rows, SAVE=bool(starts), UNROLL=4, **chosen)


@launch("selective_scan_backward")
def _launch_backward(inputs: Sequence[Tensor], outputs: Sequence[Tensor], _: Sequence[int | float]) -> None:
    u, delta, a, b, *_others = inputs
    steps, rows, channels = u.shape
    chosen = _constants(u, delta, a, b)
    grid = (rows, ceil_div(channels, chosen["BLOCK"]))
    kernels("selective_scan").backward[grid](*inputs, *outputs, steps, rows, **chosen)
