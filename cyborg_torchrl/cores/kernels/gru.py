"""The recurrence of `gru` in C++, with its gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from cyborg_torchrl.cores.kernels.native import distinct, needs_gradient, run


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
    if needs_gradient(tensors):
        return _GRU.apply(*distinct(tensors))
    states = gates_x.new_empty(gates_x.shape[0], *h_0.shape)
    _run(tensors, [states])
    return states


def _run(tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Write the states, and for the gradient the gates and the state before each step."""
    gates_x, weight_hh, bias_hh, h_0, initial, is_init = tensors
    # C++ reads the weight row by row, [D, G], while vectors run over the gates. One copy serves all steps.
    weight = weight_hh.t().contiguous()
    run("gru", outputs[0].shape, [gates_x, weight, bias_hh, h_0, initial], outputs, is_init)


class _GRU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, *tensors: Tensor) -> Tensor:
        gates_x, weight_hh, _, h_0, _, is_init = tensors
        states, previous = (gates_x.new_empty(gates_x.shape[0], *h_0.shape) for _ in range(2))
        # the gates r, u, n, and the state's part of n
        kept = gates_x.new_empty(*states.shape[:2], 4 * h_0.shape[-1])
        _run(tensors, [states, kept, previous])
        ctx.save_for_backward(weight_hh, is_init, kept, previous)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_states: Tensor) -> tuple[Tensor | None, ...]:
        weight_hh, is_init, kept, previous = ctx.saved_tensors
        grad_gates_x, grad_gates_h = (kept.new_empty(*kept.shape[:2], weight_hh.shape[0]) for _ in range(2))
        # C++ adds to these two. It overwrites the others.
        grad_h_0, grad_initial = torch.zeros_like(previous[0]), torch.zeros_like(previous[0])
        inputs = [grad_states.contiguous(), weight_hh, kept, previous]
        outputs = [grad_gates_x, grad_gates_h, grad_h_0, grad_initial]
        run("gru_backward", previous.shape, inputs, outputs, is_init)
        # One large matrix product for the weight is faster than a small one per step. It also needs no copy per thread.
        rows = grad_gates_h.flatten(0, 1)
        return grad_gates_x, rows.t() @ previous.flatten(0, 1), rows.sum(0), grad_h_0, grad_initial, None
