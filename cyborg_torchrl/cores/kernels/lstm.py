"""The recurrence of `lstm` in C++, with its gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from cyborg_torchrl.cores.kernels.native import distinct, needs_gradient, run


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
    if needs_gradient(tensors):
        return _LSTM.apply(*distinct(tensors))
    hidden, cell = (gates_x.new_empty(gates_x.shape[0], *h_0.shape) for _ in range(2))
    _run(tensors, [hidden, cell])
    return hidden, cell


def _run(tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Write hidden and cell states, and for the gradient the gates and the hidden state before each step."""
    gates_x, weight_hh, h_0, c_0, initial_h, initial_c, is_init = tensors
    # C++ reads the weight row by row, [D, G], while vectors run over the gates. One copy serves all steps.
    weight = weight_hh.t().contiguous()
    run("lstm", outputs[0].shape, [gates_x, weight, h_0, c_0, initial_h, initial_c], outputs, is_init)


class _LSTM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        gates_x, weight_hh, h_0, c_0, _, initial_c, is_init = tensors
        hidden, cell, previous_h = (gates_x.new_empty(gates_x.shape[0], *h_0.shape) for _ in range(3))
        gates = torch.empty_like(gates_x)
        _run(tensors, [hidden, cell, gates, previous_h])
        # The cell state before a step is `cell` one step earlier, or c_0 or initial_c. So no copy of it is saved.
        ctx.save_for_backward(weight_hh, c_0, initial_c, is_init, cell, gates, previous_h)
        return hidden, cell

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_hidden: Tensor, grad_cell: Tensor) -> tuple[Tensor | None, ...]:
        weight_hh, c_0, initial_c, is_init, cell, gates, previous_h = ctx.saved_tensors
        grad_gates = torch.empty_like(gates)
        # C++ carries gradients in the first two states and adds to the others, so all four start at zero.
        grad_h, grad_c, grad_initial_h, grad_initial_c = (torch.zeros_like(c_0) for _ in range(4))
        inputs = [grad_hidden.contiguous(), grad_cell.contiguous(), weight_hh, gates, cell, c_0, initial_c]
        outputs = [grad_gates, grad_h, grad_c, grad_initial_h, grad_initial_c]
        run("lstm_backward", cell.shape, inputs, outputs, is_init)
        # One large matrix product for the weight is faster than a small one per step.
        grad_weight = grad_gates.flatten(0, 1).t() @ previous_h.flatten(0, 1)
        return grad_gates, grad_weight, grad_h, grad_c, grad_initial_h, grad_initial_c, None
