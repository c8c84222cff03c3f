"""The selective scan in C++, with its gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from cyborg_torchrl.cores.kernels.native import distinct, needs_gradient, run, threads_for

LENGTH = 24
"""Steps per stored state. The backward pass recomputes the states in between.

Storing every state would need N times the memory of the input. With N = 16, the backward pass needs about 100 kB per
thread for 24 steps, which fits into the cache of one processor core.
"""


def selective_scan_cpp(
    u: Float[Tensor, "T B D"],
    delta: Float[Tensor, "T B D"],
    a: Float[Tensor, "D N"],
    b: Float[Tensor, "T B N"],
    c: Float[Tensor, "T B N"],
    h_0: Float[Tensor, "B D N"],
    is_init: Bool[Tensor, "T B"],
    initial: Float[Tensor, "B D N"],
) -> tuple[Float[Tensor, "T B D"], Float[Tensor, "B D N"]]:
    """Run `selective_scan` in C++. Environments are split over as many threads as torch uses.

    Args:
        u: this and all other arguments are those of `selective_scan`, float32 or float64, on a CPU.

    Raises:
        ValueError: if there is no step.
        RuntimeError: if the C++ kernels were not built.
    """
    if u.shape[0] == 0:
        raise ValueError("selective_scan needs at least one step; got T == 0.")
    # C++ has N before D in states: neighbouring channels fill the lanes of a vector.
    tensors = (u, delta, a.t(), b, c, h_0.transpose(1, 2), initial.transpose(1, 2), is_init)
    tensors = [tensor.contiguous() for tensor in tensors]
    if needs_gradient(tensors):
        y, last = _SelectiveScan.apply(*distinct(tensors))
    else:
        y, last = torch.empty_like(tensors[0]), torch.empty_like(tensors[5])
        _run(tensors, [y, last])
    return y, last.transpose(1, 2)


def _run(tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Write the outputs [T, B, D], the last state [B, N, D], and for the gradient the state before every chunk."""
    *inputs, is_init = tensors
    run("scan_forward", _sizes(tensors), inputs, outputs, is_init)


def _sizes(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return *tensors[0].shape, tensors[3].shape[-1], LENGTH


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        u, h_0 = tensors[0], tensors[5]
        y, last = torch.empty_like(u), torch.empty_like(h_0)
        starts = u.new_empty(math.ceil(u.shape[0] / LENGTH), *h_0.shape)
        _run(tensors, [y, last, starts])
        # The inputs and one state per chunk are enough to recompute all other states.
        ctx.save_for_backward(*tensors, starts)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_y: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, is_init, starts = ctx.saved_tensors
        u, delta, a, b, c, h_0, initial = inputs
        grad_u, grad_delta, grad_b, grad_c, grad_h_0 = (torch.empty_like(tensor) for tensor in (u, delta, b, c, h_0))
        threads = threads_for(u.shape[1])
        grad_a, grad_initial = a.new_empty(threads, *a.shape), torch.zeros_like(initial)
        run(
            "scan_backward",
            _sizes(inputs),
            [*inputs, starts, grad_y.contiguous(), grad_last.contiguous()],
            [grad_u, grad_delta, grad_a, grad_b, grad_c, grad_h_0, grad_initial],
            is_init,
            threads=threads,
        )
        return grad_u, grad_delta, grad_a.sum(0), grad_b, grad_c, grad_h_0, grad_initial, None
