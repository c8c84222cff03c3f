"""The selective scan in C++, as a torch operator."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cyborg_torchrl.cores.kernels.native import function, integers, needs_operator, pointers

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
    arguments: list[Any] = [tensor.contiguous() for tensor in tensors]
    if needs_operator(arguments):
        y, last, _ = _forward(*arguments, LENGTH)
    else:
        # Without a gradient: skip the overhead of a torch operator, and store no states.
        arguments.append(0)
        y, last, _ = _run(*arguments)
    return y, last.transpose(1, 2)


def _run(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    h_0: Tensor,
    initial: Tensor,
    is_init: Tensor,
    length: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the outputs [T, B, D], the last state [B, N, D] and the states before every `length`-th step.

    With `length` 0 no states are stored. States have N before D, and all tensors must be contiguous.
    """
    y, last = torch.empty_like(u), torch.empty_like(h_0)
    starts = _starts(u, h_0, length)
    function("scan_forward", u.dtype)(
        integers(*u.shape, b.shape[-1], max(length, 1)),
        torch.get_num_threads(),
        pointers(u, delta, a, b, c, h_0, initial),
        is_init.data_ptr(),
        y.data_ptr(),
        last.data_ptr(),
        starts.data_ptr() if length else None,
    )
    return y, last, starts


_forward = torch.library.custom_op(
    "cyborg_torchrl::selective_scan",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor u, Tensor delta, Tensor a, Tensor b, Tensor c, Tensor h_0, Tensor initial, Tensor is_init, "
    "int length) -> (Tensor, Tensor, Tensor)",
)(_run)


@torch.library.custom_op(
    "cyborg_torchrl::selective_scan_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor grad_y, Tensor grad_last, Tensor u, Tensor delta, Tensor a, Tensor b, Tensor c, Tensor h_0, "
    "Tensor initial, Tensor is_init, Tensor starts, int length) -> (" + ", ".join(["Tensor"] * 7) + ")",
)
def _backward(
    grad_y: Tensor,
    grad_last: Tensor,
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    h_0: Tensor,
    initial: Tensor,
    is_init: Tensor,
    starts: Tensor,
    length: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return gradients of the float arguments of the forward pass, in their order."""
    # Each thread sums the gradient of `a` separately. So threads need no locks, and sums have a fixed order.
    # No more threads than rows: C++ leaves the sums of idle threads unset.
    threads = min(torch.get_num_threads(), u.shape[1])
    grad_a = a.new_empty(threads, *a.shape)
    grads = [torch.empty_like(tensor) for tensor in (u, delta, b, c, h_0)]
    grad_u, grad_delta, grad_b, grad_c, grad_h_0 = grads
    grad_initial = torch.zeros_like(initial)
    function("scan_backward", u.dtype)(
        integers(*u.shape, b.shape[-1], max(length, 1)),
        threads,
        pointers(u, delta, a, b, c, h_0, initial),
        is_init.data_ptr(),
        starts.data_ptr(),
        grad_y.data_ptr(),
        grad_last.data_ptr(),
        pointers(grad_u, grad_delta, grad_a, grad_b, grad_c, grad_h_0, grad_initial),
    )
    return grad_u, grad_delta, grad_a.sum(0), grad_b, grad_c, grad_h_0, grad_initial


def _starts(u: Tensor, h_0: Tensor, length: int) -> Tensor:
    return u.new_empty((u.shape[0] + length - 1) // length if length else 0, *h_0.shape)


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    u, h_0, length = arguments[0], arguments[5], arguments[-1]
    return torch.empty_like(u), torch.empty_like(h_0), _starts(u, h_0, length)


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(tensor) for tensor in arguments[2:9])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # The inputs and one state per chunk are enough to recompute all other states.
    *tensors, ctx.length = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])


def _gradients(ctx: Any, grad_y: Tensor, grad_last: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    *tensors, starts = ctx.saved_tensors
    grads = _backward(grad_y.contiguous(), grad_last.contiguous(), *tensors, starts, ctx.length)
    return *grads, None, None


_forward.register_fake(_fake_forward)
_backward.register_fake(_fake_backward)
_forward.register_autograd(_gradients, setup_context=_setup_context)
