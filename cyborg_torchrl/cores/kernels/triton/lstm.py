"""The recurrence of `lstm` in Triton, with its gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from cyborg_torchrl.cores.kernels.native import distinct, needs_gradient
from cyborg_torchrl.cores.kernels.triton.launch import ceil_div, launch, run
from cyborg_torchrl.cores.kernels.triton.loading import kernels
from cyborg_torchrl.cores.kernels.triton.resident import BLOCK, constants, is_resident


def lstm_triton(
    gates_x: Float[Tensor, "T B G"],
    weight_hh: Float[Tensor, "G D"],
    h_0: Float[Tensor, "B D"],
    c_0: Float[Tensor, "B D"],
    is_init: Bool[Tensor, "T B"],
    initial_h: Float[Tensor, "B D"],
    initial_c: Float[Tensor, "B D"],
) -> tuple[Float[Tensor, "T B D"], Float[Tensor, "T B D"]]:
    """Return the hidden and cell states of an `LSTMLayer`. Arguments are those of `lstm_cpp`, float32 on a GPU.

    If the weight fits into the shared memory of one program, a sequence is one launch. Otherwise a step is a matrix
    product and a launch.
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
    if is_resident(weight_hh, 3):
        weight_t = weight_hh.unflatten(0, (4, -1)).transpose(1, 2).contiguous()
        is_whole = is_resident(weight_hh, 4)
        run("lstm", [gates_x, weight_t, h_0, c_0, initial_h, initial_c, is_init], outputs, [is_whole])
        return
    hidden, cell, *saved = outputs
    gates, previous_h = saved or (None, torch.empty_like(hidden))
    sums, weight_t, previous_c = torch.empty_like(gates_x[0]), weight_hh.t(), torch.empty_like(c_0)
    mask = is_init[0].unsqueeze(-1)
    torch.where(mask, initial_h, h_0, out=previous_h[0])
    torch.where(mask, initial_c, c_0, out=previous_c)
    for t in range(gates_x.shape[0]):
        torch.addmm(gates_x[t], previous_h[t], weight_t, out=sums)
        following = slice(t + 1, t + 2)  # empty at the last step
        inputs = [sums, initial_h, initial_c, is_init[following]]
        outputs_t = [hidden[t], cell[t], previous_h[following], previous_c]
        run("lstm_step", inputs, outputs_t if gates is None else [*outputs_t, gates[t]])


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
        *inputs, previous_h = ctx.saved_tensors
        weight_hh, c_0, _, _, _, gates = inputs
        inputs += [grad_hidden.contiguous(), grad_cell.contiguous()]
        grad_gates = torch.empty_like(gates)
        if is_resident(weight_hh, 3):
            # the stored states h and c, then the initial states h and c
            grads = [torch.empty_like(c_0) for _ in range(4)]
            run("lstm_backward", inputs, [grad_gates, *grads], [is_resident(weight_hh, 4)])
        else:
            grads = _wide_backward(inputs, grad_gates)
        # One large matrix product for the weight is faster than a small one per step.
        grad_weight = grad_gates.flatten(0, 1).t() @ previous_h.flatten(0, 1)
        return grad_gates, grad_weight, *grads, None


def _wide_backward(inputs: Sequence[Tensor], grad_gates: Tensor) -> list[Tensor]:
    """Write the gradients of the gates, step by step. Return those of the stored and the initial states."""
    weight_hh, c_0, initial_c, is_init, cell, gates, grad_hidden, grad_cell = inputs
    back_h, back_c = torch.empty_like(c_0), torch.empty_like(c_0)
    grad_initial_h, grad_initial_c = torch.zeros_like(c_0), torch.zeros_like(c_0)
    before = torch.cat([c_0.unsqueeze(0), cell[:-1]])
    before = torch.where(is_init.unsqueeze(-1), initial_c, before)
    for t in reversed(range(cell.shape[0])):
        arguments = [gates[t], cell[t], before[t], grad_hidden[t], grad_cell[t], back_h, is_init[t + 1 : t + 2]]
        run("lstm_step_backward", arguments, [grad_gates[t], back_c, grad_initial_h, grad_initial_c])
        torch.mm(grad_gates[t], weight_hh, out=back_h)
    mask = is_init[0].unsqueeze(-1)
    grad_initial_h += back_h.masked_fill(~mask, 0.0)
    grad_initial_c += back_c.masked_fill(~mask, 0.0)
    return [back_h.masked_fill(mask, 0.0), back_c.masked_fill(mask, 0.0), grad_initial_h, grad_initial_c]


@launch("lstm")
def _launch(inputs: Sequence[Tensor], outputs: Sequence[Tensor], numbers: Sequence[int | float]) -> None:
    steps, rows, size = outputs[0].shape
    # Pointers have to be passed in any case. Without a gradient two of them are not used.
    tensors = [*outputs, outputs[0], outputs[0]][:4]
    chosen = constants(size)
    grid = (ceil_div(rows, chosen["ROWS"]),)
    kernel = kernels("lstm").forward[grid]
    kernel(*inputs, *tensors, steps, rows, IS_WHOLE=bool(numbers[0]), SAVE=len(outputs) > 2, **chosen)


@launch("lstm_backward")
def _launch_backward(inputs: Sequence[Tensor], outputs: Sequence[Tensor], numbers: Sequence[int | float]) -> None:
    steps, rows, size = inputs[-1].shape
    chosen = constants(size)
    grid = (ceil_div(rows, chosen["ROWS"]),)
    kernels("lstm").backward[grid](*inputs, *outputs, steps, rows, IS_WHOLE=bool(numbers[0]), **chosen)


@launch("lstm_step")
def _launch_step(inputs: Sequence[Tensor], outputs: Sequence[Tensor], _: Sequence[int | float]) -> None:
    sums, *others = inputs
    hidden, cell, next_h, previous_c, *gates = outputs
    rows, size = hidden.shape
    grid = (ceil_div(hidden.numel(), BLOCK),)
    # The cell state before the step is overwritten by the one before the next step.
    tensors = [sums, previous_c, *others, hidden, cell, next_h, previous_c, *(gates or [sums])]
    has_next, save = next_h.numel() > 0, bool(gates)
    kernels("lstm").step[grid](*tensors, rows, D=size, BLOCK=BLOCK, HAS_NEXT=has_next, SAVE=save)


@launch("lstm_step_backward")
def _launch_step_backward(inputs: Sequence[Tensor], outputs: Sequence[Tensor], _: Sequence[int | float]) -> None:
    before, next_init = inputs[2], inputs[-1]
    rows, size = before.shape
    grid = (ceil_div(before.numel(), BLOCK),)
    has_next = next_init.numel() > 0
    kernels("lstm").step_backward[grid](*inputs, *outputs, rows, D=size, BLOCK=BLOCK, HAS_NEXT=has_next)
