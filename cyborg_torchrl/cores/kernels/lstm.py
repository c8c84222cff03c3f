"""The recurrence of `lstm` in C++, as a torch operator."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cyborg_torchrl.cores.kernels.native import function, integers, needs_operator, pointers


def lstm_cpp(
    gates_x: Float[Tensor, "T B G"],
    weight_hh: Float[Tensor, "G D"],
    h_0: Float[Tensor, "B D"],
    c_0: Float[Tensor, "B D"],
    is_init: Bool[Tensor, "T B"],
    initial_h: Float[Tensor, "B D"],
    initial_c: Float[Tensor, "B D"],
) -> tuple[Float[Tensor, "T B D"], Float[Tensor, "T B D"]]:
    """Return the hidden and cell states of an `LSTMLayer`. It runs on as many threads as torch uses.

    Args:
        gates_x: the input's part of the gates i, f, g, o, joined; G = 4 D.
        weight_hh: the weight of the hidden state's part.
        h_0: the hidden state before the first step.
        c_0: the cell state before the first step.
        is_init: true where an episode begins. The state before it is dropped there, NaN included.
        initial_h: the hidden state at the start of an episode.
        initial_c: the cell state at the start of an episode.

    Raises:
        RuntimeError: if the C++ kernels were not built.
    """
    tensors = [tensor.contiguous() for tensor in (gates_x, weight_hh, h_0, c_0, initial_h, initial_c, is_init)]
    if needs_operator(tensors):
        hidden, cell, _, _ = _forward(*tensors)
    else:
        # Without a gradient: skip the overhead of a torch operator, and store no gates.
        hidden, cell = _states(gates_x, h_0)
        _run(tensors, hidden, cell, None, None)
    return hidden, cell


def _states(gates_x: Tensor, h_0: Tensor) -> tuple[Tensor, Tensor]:
    return gates_x.new_empty(gates_x.shape[0], *h_0.shape), gates_x.new_empty(gates_x.shape[0], *h_0.shape)


def _run(
    tensors: Any,
    hidden: Tensor,
    cell: Tensor,
    gates: Tensor | None,
    previous_h: Tensor | None,
) -> None:
    gates_x, weight_hh, h_0, c_0, initial_h, initial_c, is_init = tensors
    # C++ reads the weight row by row, [D, G], while vectors run over the gates. One copy serves all steps.
    weight = weight_hh.t().contiguous()
    function("lstm", gates_x.dtype)(
        integers(*hidden.shape),
        torch.get_num_threads(),
        pointers(gates_x, weight, h_0, c_0, initial_h, initial_c),
        is_init.data_ptr(),
        pointers(hidden, cell, gates, previous_h),
    )


_INPUTS = "Tensor gates_x, Tensor weight_hh, Tensor h_0, Tensor c_0, Tensor initial_h, Tensor initial_c, Tensor is_init"


@torch.library.custom_op(
    "cyborg_torchrl::lstm",
    mutates_args=(),
    device_types="cpu",
    schema=f"({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward(*tensors: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden and cell states, the gates, and the hidden state before each step."""
    gates_x, h_0 = tensors[0], tensors[2]
    hidden, cell = _states(gates_x, h_0)
    gates, previous_h = torch.empty_like(gates_x), torch.empty_like(hidden)
    _run(tensors, hidden, cell, gates, previous_h)
    return hidden, cell, gates, previous_h


@torch.library.custom_op(
    "cyborg_torchrl::lstm_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor grad_hidden, Tensor grad_cell, Tensor weight_hh, Tensor c_0, Tensor initial_c, Tensor is_init, "
    "Tensor cell, Tensor gates) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad_hidden: Tensor,
    grad_cell: Tensor,
    weight_hh: Tensor,
    c_0: Tensor,
    initial_c: Tensor,
    is_init: Tensor,
    cell: Tensor,
    gates: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return gradients of gates_x, h_0, c_0, initial_h and initial_c."""
    # C++ carries gradients in the first two states and adds to the others, so all four start at zero.
    grad_gates, states = torch.empty_like(gates), [torch.zeros_like(c_0) for _ in range(4)]
    function("lstm_backward", gates.dtype)(
        integers(*cell.shape),
        torch.get_num_threads(),
        pointers(grad_hidden, grad_cell, weight_hh, gates, cell, c_0, initial_c),
        is_init.data_ptr(),
        pointers(grad_gates, *states),
    )
    return grad_gates, states[0], states[1], states[2], states[3]


def _fake_forward(*tensors: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, cell = _states(tensors[0], tensors[2])
    return hidden, cell, torch.empty_like(tensors[0]), torch.empty_like(hidden)


def _fake_backward(*tensors: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(tensors[7]), *(torch.empty_like(tensors[3]) for _ in range(4))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, weight_hh, _, c_0, _, initial_c, is_init = inputs
    _, cell, gates, previous_h = output
    # The cell state before a step is `cell` one step earlier, or c_0 or initial_c. So no copy of it is saved.
    ctx.save_for_backward(weight_hh, c_0, initial_c, is_init, cell, gates, previous_h)
    ctx.mark_non_differentiable(gates, previous_h)


def _gradients(ctx: Any, grad_hidden: Tensor, grad_cell: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    weight_hh, *saved, previous_h = ctx.saved_tensors
    grads = _backward(grad_hidden.contiguous(), grad_cell.contiguous(), weight_hh, *saved)
    grad_gates, grad_h, grad_c, grad_initial_h, grad_initial_c = grads
    # One large matrix product for the weight is faster than a small one per step.
    grad_weight = grad_gates.flatten(0, 1).t() @ previous_h.flatten(0, 1)
    return grad_gates, grad_weight, grad_h, grad_c, grad_initial_h, grad_initial_c, None


_forward.register_fake(_fake_forward)
_backward.register_fake(_fake_backward)
_forward.register_autograd(_gradients, setup_context=_setup_context)
