"""The recurrence of `gru` in Triton, with its gradient."""

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


def gru_triton(
    gates_x: Float[Tensor, "T B G"],
    weight_hh: Float[Tensor, "G D"],
    bias_hh: Float[Tensor, " G"],
    h_0: Float[Tensor, "B D"],
    is_init: Bool[Tensor, "T B"],
    initial: Float[Tensor, "B D"],
) -> Float[Tensor, "T B D"]:
    """Return the states of a `GRULayer`. Arguments are those of `gru_cpp`, float32 on a GPU.

    If the weight fits into the shared memory of one program, a sequence is one launch. Otherwise a step is a matrix
    product and a launch.
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
    if is_resident(weight_hh, 3):
        weight_t = weight_hh.unflatten(0, (3, -1)).transpose(1, 2).contiguous()
        run("gru", [gates_x, weight_t, bias_hh, h_0, initial, is_init], outputs)
        return
    states, *saved = outputs
    previous = saved[1] if saved else torch.empty_like(states)
    gates_h, weight_t = gates_x.new_empty(gates_x.shape[1:]), weight_hh.t()
    torch.where(is_init[0].unsqueeze(-1), initial, h_0, out=previous[0])
    for t in range(gates_x.shape[0]):
        torch.addmm(bias_hh, previous[t], weight_t, out=gates_h)
        following = slice(t + 1, t + 2)  # empty at the last step
        inputs = [gates_x[t], gates_h, previous[t], initial, is_init[following]]
        run("gru_step", inputs, [states[t], previous[following], *(each[t] for each in saved[:1])])


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
        inputs = [weight_hh, is_init, kept, previous, grad_states.contiguous()]
        if is_resident(weight_hh, 3):
            grad_h_0, grad_initial = (torch.empty_like(previous[0]) for _ in range(2))
            run("gru_backward", inputs, [grad_gates_x, grad_gates_h, grad_h_0, grad_initial])
        else:
            grad_h_0, grad_initial = _wide_backward(inputs, grad_gates_x, grad_gates_h)
        # One large matrix product for the weight is faster than a small one per step.
        rows = grad_gates_h.flatten(0, 1)
        return grad_gates_x, rows.t() @ previous.flatten(0, 1), rows.sum(0), grad_h_0, grad_initial, None


def _wide_backward(inputs: Sequence[Tensor], grad_gates_x: Tensor, grad_gates_h: Tensor) -> tuple[Tensor, Tensor]:
    """Write the gradients of the gates, step by step. Return those of the stored and the initial state."""
    weight_hh, is_init, kept, previous, grad_states = inputs
    back, passed = (torch.empty_like(previous[0]) for _ in range(2))
    grad_initial = torch.zeros_like(previous[0])
    for t in reversed(range(kept.shape[0])):
        arguments = [kept[t], previous[t], grad_states[t], back, is_init[t + 1 : t + 2]]
        run("gru_step_backward", arguments, [grad_gates_x[t], grad_gates_h[t], passed, grad_initial])
        torch.addmm(passed, grad_gates_h[t], weight_hh, out=back)
    mask = is_init[0].unsqueeze(-1)
    return back.masked_fill(mask, 0.0), grad_initial + back.masked_fill(~mask, 0.0)


@launch("gru")
def _launch(inputs: Sequence[Tensor], outputs: Sequence[Tensor], _: Sequence[int | float]) -> None:
    steps, rows, size = outputs[0].shape
    # Pointers have to be passed in any case. Without a gradient two of them are not used.
    states, kept, previous = [*outputs, outputs[0], outputs[0]][:3]
    chosen = constants(size)
    grid = (ceil_div(rows, chosen["ROWS"]),)
    kernel = kernels("gru").forward[grid]
    kernel(*inputs, states, kept, previous, steps, rows, SAVE=len(outputs) > 1, **chosen)


@launch("gru_backward")
def _launch_backward(inputs: Sequence[Tensor], outputs: Sequence[Tensor], _: Sequence[int | float]) -> None:
    steps, rows, size = inputs[-1].shape
    chosen = constants(size)
    grid = (ceil_div(rows, chosen["ROWS"]),)
    kernels("gru").backward[grid](*inputs, *outputs, steps, rows, **chosen)


@launch("gru_step")
def _launch_step(inputs: Sequence[Tensor], outputs: Sequence[Tensor], _: Sequence[int | float]) -> None:
    state, next_before, *kept = outputs
    rows, size = state.shape
    kernels("gru").step[(ceil_div(state.numel(), BLOCK),)](
        *inputs,
        state,
        next_before,
        *(kept or [state]),
        rows,
        D=size,
        BLOCK=BLOCK,
        HAS_NEXT=next_before.numel() > 0,
        SAVE=bool(kept),
    )


@launch("gru_step_backward")
def _launch_step_backward(inputs: Sequence[Tensor], outputs: Sequence[Tensor], _: Sequence[int | float]) -> None:
    before, next_init = inputs[1], inputs[-1]
    rows, size = before.shape
    kernels("gru").step_backward[(ceil_div(before.numel(), BLOCK),)](
        *inputs, *outputs, rows, D=size, BLOCK=BLOCK, HAS_NEXT=next_init.numel() > 0
    )
