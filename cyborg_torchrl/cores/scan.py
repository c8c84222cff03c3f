"""The gated linear recurrence, with a gradient written by hand.

Time comes first ([T, B, D]) in this module. So one step is one contiguous block of memory, which makes loops fast.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Inexact
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from cyborg_torchrl.cores.kernels.triton.linear_scan import linear_scan_triton
from cyborg_torchrl.cores.kernels.triton.loading import is_triton
from cyborg_torchrl.cores.resets import reset_steps


class _LinearRecurrence(torch.autograd.Function):
    """h_t = a_t h_{t-1} + b_t. The backward pass costs O(T). Indexing in a loop under autograd would cost O(T^2).

    Numbers are real or complex; `conj` does nothing to real ones.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, decay: Tensor, drive: Tensor, h_0: Tensor, is_init: Tensor, initial: Tensor
    ) -> Tensor:
        states = torch.empty_like(drive)
        resets = reset_steps(is_init)
        h_t = h_0
        rows = zip(decay.unbind(0), drive.unbind(0), states.unbind(0), strict=True)
        for t, (a_t, b_t, out_t) in enumerate(rows):
            if resets[t]:
                h_t = torch.where(is_init[t].unsqueeze(-1), initial, h_t)
            h_t = torch.addcmul(b_t, a_t, h_t, out=out_t)
        ctx.save_for_backward(decay, states, h_0, is_init, initial)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_states: Tensor) -> tuple[Tensor | None, ...]:
        decay, states, h_0, is_init, initial = ctx.saved_tensors
        resets = reset_steps(is_init)
        grad_drive = torch.empty_like(states)
        grad_initial, grad_t, a_tp1 = torch.zeros_like(h_0), torch.zeros_like(h_0), torch.zeros_like(h_0)
        rows = zip(decay.conj().resolve_conj().unbind(0), grad_states.unbind(0), grad_drive.unbind(0), strict=True)
        for t, (a_t, g_t, out_t) in reversed(list(enumerate(rows))):
            grad_t = torch.addcmul(g_t, a_tp1, grad_t, out=out_t)
            a_tp1 = a_t
            if resets[t]:
                mask = is_init[t].unsqueeze(-1)
                grad_initial += (a_t * grad_t).masked_fill(~mask, 0.0)
                a_tp1 = a_t.masked_fill(mask, 0.0)
        previous = torch.cat([h_0.unsqueeze(0), states[:-1]])
        if any(resets):
            previous = torch.where(is_init.unsqueeze(-1), initial, previous)
        return previous.conj() * grad_drive, grad_drive, a_tp1 * grad_t, None, grad_initial


def gated_linear_scan(
    decay: Inexact[Tensor, "T B D"],
    drive: Inexact[Tensor, "T B D"],
    h_0: Inexact[Tensor, "B D"],
    is_init: Bool[Tensor, "T B"],
    initial: Inexact[Tensor, "B D"],
) -> Inexact[Tensor, "T B D"]:
    """Run a gated linear recurrence over a sequence, and restart where episodes begin.

        h_t = a_t * h_{t-1} + b_t,   h_{t-1} := initial where is_init_t

    Args:
        decay: a_t, of absolute value at most 1.
        drive: b_t.
        h_0: the state before the first step.
        is_init: true where an episode begins. The state before it is dropped there, NaN included.
        initial: the state at the start of an episode.

    Returns:
        The states h_t. Gradients reach every float argument and never cross a restart.

    Raises:
        ValueError: if there is no step.

    Cost: O(T B D) time and memory. Second derivatives are not supported.
    """
    if decay.shape[0] == 0:
        raise ValueError("gated_linear_scan needs at least one step; got T == 0.")
    if is_triton(drive):
        return linear_scan_triton(decay, drive, h_0, is_init, initial)
    return _LinearRecurrence.apply(decay.contiguous(), drive.contiguous(), h_0, is_init, initial)


def gated_linear_step(
    decay: Inexact[Tensor, "B D"], drive: Inexact[Tensor, "B D"], h_tm1: Inexact[Tensor, "B D"]
) -> Inexact[Tensor, "B D"]:
    """Return the state after one step. It rounds as a step of `gated_linear_scan`."""
    if is_triton(drive):  # the kernel of sequences
        is_init = torch.zeros(1, drive.shape[0], dtype=torch.bool, device=drive.device)
        return linear_scan_triton(decay.unsqueeze(0), drive.unsqueeze(0), h_tm1, is_init, h_tm1).squeeze(0)
    return torch.addcmul(drive, decay, h_tm1)
