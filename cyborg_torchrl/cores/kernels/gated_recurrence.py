"""The gated recurrence of `lru` in C++, with its gradient."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from cyborg_torchrl.cores.kernels.native import distinct, needs_gradient, run, threads_for


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
    return _GatedRecurrence.apply(*distinct(tensors)) if needs_gradient(tensors) else _run(*tensors)


def _run(inputs: Tensor, rate: Tensor, h_0: Tensor, initial: Tensor, is_init: Tensor) -> Tensor:
    states = inputs.new_empty(inputs.shape[0], *h_0.shape)
    run("recur", states.shape, [inputs, rate, h_0, initial], [states], is_init)
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
        inputs, rate, h_0, initial, is_init, states = ctx.saved_tensors
        grad_inputs, grad_h_0, grad_initial = torch.empty_like(inputs), torch.zeros_like(h_0), torch.zeros_like(initial)
        threads = threads_for(h_0.shape[0])
        grad_rate = rate.new_zeros(threads, *rate.shape)
        run(
            "recur_backward",
            states.shape,
            [inputs, rate, h_0, initial, states, grad_states.contiguous()],
            [grad_inputs, grad_h_0, grad_initial, grad_rate],
            is_init,
            threads=threads,
        )
        return grad_inputs, grad_rate.sum(0), grad_h_0, grad_initial, None
