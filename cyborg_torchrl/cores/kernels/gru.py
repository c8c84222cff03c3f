"""The recurrence of `gru` in C++, as a torch operator."""

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
    """Return the states of a `GRULayer`. It runs on as many threads as torch uses.

        r, u = sigmoid(x + W h + b);   n = tanh(x + r (W h + b));   h := h + u (n - h)

    Args:
        gates_x: the input's part x of the gates r, u, n, joined; G = 3 D.
        weight_hh: W, the weight of the state's part.
        bias_hh: b, the bias of the state's part.
        h_0: the state before the first step.
        is_init: true where an episode begins. The state before it is dropped there, NaN included.
        initial: the state at the start of an episode.

    Raises:
        RuntimeError: if the C++ kernels were not built.
    """
    tensors = [tensor.contiguous() for tensor in (gates_x, weight_hh, bias_hh, h_0, initial, is_init)]
    if needs_operator(tensors):
        return _forward(*tensors)[0]
    states = gates_x.new_empty(gates_x.shape[0], *h_0.shape)
    # Without a gradient: skip the overhead of a torch operator, and store no gates.
    _run(tensors, states, None, None)
    return states


def _run(tensors: Any, states: Tensor, kept: Tensor | None, previous: Tensor | None) -> None:
    gates_x, weight_hh, bias_hh, h_0, initial, is_init = tensors
    # C++ reads the weight row by row, [D, G], while vectors run over the gates. One copy serves all steps.
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
    """Return the states, the gates r, u, n with the state's part of n, and the state before each step."""
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
    """Return gradients of gates_x, of the state's part of the gates, of h_0 and of the initial state."""
    grad_gates_x, grad_gates_h, grad_h_0, grad_initial = _fake_backward(grad_states, weight_hh)
    # C++ adds to these two. It overwrites the others.
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
    # One large matrix product for the weight is faster than a small one per step. It also needs no copy per thread.
    rows = grad_gates_h.flatten(0, 1)
    return grad_gates_x, rows.t() @ previous, rows.sum(0), grad_h_0, grad_initial, None


_forward.register_fake(_fake_forward)
_backward.register_fake(_fake_backward)
_forward.register_autograd(_gradients, setup_context=_setup_context)
