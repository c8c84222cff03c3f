"""The recurrence of `gru` in C++ as an operator of torch."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cyborg_torchrl.cores.kernels.native import function, integers, needs_operator, pointers


def gru_cpp(
    gates_x: Float[Tensor, "T B G"],
    weight_hh: Float[Tensor, "G D"],
    bias_hh: Float[Tensor, " G"],
    h_0: Float[Tensor, "B D"],
    is_init: Bool[Tensor, "T B"],
    initial: Float[Tensor, "B D"],
) -> Float[Tensor, "T B D"]:
    """The states of a `GRULayer`, on as many threads as torch uses.

        r, u = sigmoid(x + W h + b);   n = tanh(x + r (W h + b));   h := h + u (n - h)

    Args:
        gates_x: what the input adds to the gates r, u, n, side by side; G = 3 D.
        weight_hh: what the state adds to them.
        bias_hh: what is added to that.
        h_0: the state before the first step.
        is_init: where an episode begins; whatever was before it, NaN too, is forgotten.
        initial: the state that episodes begin from.

    Raises:
        RuntimeError: if it was not built here.
    """
    tensors = [tensor.contiguous() for tensor in (gates_x, weight_hh, bias_hh, h_0, initial, is_init)]
    if needs_operator(tensors):
        return _forward(*tensors)[0]
    states = gates_x.new_empty(gates_x.shape[0], *h_0.shape)
    _run(tensors, states, None, None)  # without what an operator costs, and what a gradient needs
    return states


def _run(tensors: Any, states: Tensor, kept: Tensor | None, previous: Tensor | None) -> None:
    gates_x, weight_hh, bias_hh, h_0, initial, is_init = tensors
    weight = weight_hh.t().contiguous()
    function("gru", gates_x.dtype)(
        integers(*states.shape),
        torch.get_num_threads(),
        pointers(gates_x, weight, bias_hh, h_0, initial),
        is_init.data_ptr(),
        pointers(states, kept, previous),
    )


@torch.library.custom_op(
    "cyborg_torchrl::gru",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor gates_x, Tensor weight_hh, Tensor bias_hh, Tensor h_0, Tensor initial, Tensor is_init)"
    " -> (Tensor, Tensor, Tensor)",
)
def _forward(*tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The states, the gates with what the state adds to the last, and the state before each step."""
    states, kept, previous = _fake_forward(*tensors)
    _run(tensors, states, kept, previous)
    return states, kept, previous


@torch.library.custom_op(
    "cyborg_torchrl::gru_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor grad_states, Tensor weight_hh, Tensor is_init, Tensor kept, Tensor previous)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad_states: Tensor, weight_hh: Tensor, is_init: Tensor, kept: Tensor, previous: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gates_x, of what the state adds to the gates, of h_0, and of the initial state."""
    grad_gates_x, grad_gates_h, grad_h_0, grad_initial = _fake_backward(grad_states, weight_hh)
    grad_h_0.zero_()
    grad_initial.zero_()
    function("gru_backward", kept.dtype)(
        integers(*previous.shape),
        torch.get_num_threads(),
        pointers(grad_states, weight_hh, kept, previous),
        is_init.data_ptr(),
        pointers(grad_gates_x, grad_gates_h, grad_h_0, grad_initial),
    )
    return grad_gates_x, grad_gates_h, grad_h_0, grad_initial


def _fake_forward(*tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
    gates_x, h_0 = tensors[0], tensors[3]
    states, previous = (gates_x.new_empty(gates_x.shape[0], *h_0.shape) for _ in range(2))
    return states, gates_x.new_empty(*states.shape[:2], 4 * h_0.shape[-1]), previous


def _fake_backward(grad_states: Tensor, weight_hh: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gates_x, gates_h = (grad_states.new_empty(*grad_states.shape[:2], weight_hh.shape[0]) for _ in range(2))
    h_0, initial = (grad_states.new_empty(grad_states.shape[1:]) for _ in range(2))
    return gates_x, gates_h, h_0, initial


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, weight_hh, _, _, _, is_init = inputs
    _, kept, previous = output
    ctx.save_for_backward(weight_hh, is_init, kept, previous)
    ctx.mark_non_differentiable(kept, previous)


def _gradients(ctx: Any, grad_states: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    previous = ctx.saved_tensors[-1].flatten(0, 1)
    grad_gates_x, grad_gates_h, grad_h_0, grad_initial = _backward(grad_states.contiguous(), *ctx.saved_tensors)
    rows = grad_gates_h.flatten(0, 1)
    return grad_gates_x, rows.t() @ previous, rows.sum(0), grad_h_0, grad_initial, None


_forward.register_fake(_fake_forward)
_backward.register_fake(_fake_backward)
_forward.register_autograd(_gradients, setup_context=_setup_context)
