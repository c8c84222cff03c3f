"""The gated recurrence of `lru` in C++, as a torch operator."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cyborg_torchrl.cores.kernels.native import function, integers, needs_operator, pointers


def gated_recurrence_cpp(
    inputs: Float[Tensor, "T B I"],
    rate: Float[Tensor, " D"],
    h_0: Float[Tensor, "B D"],
    is_init: Bool[Tensor, "T B"],
    initial: Float[Tensor, "B D"],
) -> Float[Tensor, "T B D"]:
    """Return the states of an `LRULayer`. Environments are split over as many threads as torch uses.

        a_t = exp(-2 sigmoid(decay_gate_t) rate)
        h_t = a_t * h_{t-1} + sqrt(1 - a_t^2) * sigmoid(input_gate_t) * x_t,   h_{t-1} := initial where is_init_t

    Args:
        inputs: decay_gate, input_gate and x, joined; I = 3 D.
        rate: positive.
        h_0: the state before the first step.
        is_init: true where an episode begins. The state before it is dropped there, NaN included.
        initial: the state at the start of an episode.

    Raises:
        RuntimeError: if the C++ kernels were not built.
    """
    tensors = [tensor.contiguous() for tensor in (inputs, rate, h_0, initial, is_init)]
    # Without a gradient, skip the overhead of a torch operator: it counts in steps of small batches.
    return (_forward if needs_operator(tensors) else _run)(*tensors)


def _run(inputs: Tensor, rate: Tensor, h_0: Tensor, initial: Tensor, is_init: Tensor) -> Tensor:
    states = inputs.new_empty(inputs.shape[0], *h_0.shape)
    function("recur", inputs.dtype)(
        integers(*states.shape),
        torch.get_num_threads(),
        pointers(inputs, rate, h_0, initial),
        is_init.data_ptr(),
        states.data_ptr(),
    )
    return states


_INPUTS = "Tensor inputs, Tensor rate, Tensor h_0, Tensor initial, Tensor is_init"
_forward = torch.library.custom_op(
    "cyborg_torchrl::gated_recurrence", mutates_args=(), device_types="cpu", schema=f"({_INPUTS}) -> Tensor"
)(_run)


@torch.library.custom_op(
    "cyborg_torchrl::gated_recurrence_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor grad_states, {_INPUTS}, Tensor states) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad_states: Tensor,
    inputs: Tensor,
    rate: Tensor,
    h_0: Tensor,
    initial: Tensor,
    is_init: Tensor,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return gradients of the float arguments of the forward pass, in their order."""
    # Each thread sums the gradient of the rates in a separate row. So threads need no locks, and the result does not
    # depend on their timing.
    threads = max(1, min(torch.get_num_threads(), h_0.shape[0]))
    grad_rate = rate.new_zeros(threads, *rate.shape)
    grad_inputs, grad_h_0, grad_initial = torch.empty_like(inputs), torch.zeros_like(h_0), torch.zeros_like(initial)
    function("recur_backward", inputs.dtype)(
        integers(*states.shape),
        threads,
        pointers(inputs, rate, h_0, initial),
        is_init.data_ptr(),
        states.data_ptr(),
        grad_states.data_ptr(),
        pointers(grad_inputs, grad_h_0, grad_initial),
        grad_rate.data_ptr(),
    )
    return grad_inputs, grad_rate.sum(0), grad_h_0, grad_initial


def _fake_forward(inputs: Tensor, rate: Tensor, h_0: Tensor, *_: Any) -> Tensor:
    return inputs.new_empty(inputs.shape[0], *h_0.shape)


def _fake_backward(grad_states: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(tensor) for tensor in tensors[:4])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    # Only inputs and states are saved. The backward pass recomputes the gates, to save memory.
    ctx.save_for_backward(*inputs, output)


def _gradients(ctx: Any, grad_states: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(grad_states.contiguous(), *ctx.saved_tensors), None


_forward.register_fake(_fake_forward)
_backward.register_fake(_fake_backward)
_forward.register_autograd(_gradients, setup_context=_setup_context)
