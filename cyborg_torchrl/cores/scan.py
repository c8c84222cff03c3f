"""The gated linear recurrence and its gradient, written by hand.

Time comes first ([T, B, D]) in this module: one step is one contiguous block, which is what a loop wants.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


class _LinearRecurrence(torch.autograd.Function):
    """h_t = a_t h_{t-1} + b_t. Indexing inside a loop under autograd would cost O(T^2) backward; this is O(T)."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: FunctionCtx, decay: Tensor, drive: Tensor, h_0: Tensor
    ) -> Tensor:
        states = torch.empty_like(drive)
        h_t = h_0
        for a_t, b_t, out_t in zip(decay.unbind(0), drive.unbind(0), states.unbind(0), strict=True):
            h_t = torch.addcmul(b_t, a_t, h_t, out=out_t)
        ctx.save_for_backward(decay, states, h_0)
        return states

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: FunctionCtx, grad_states: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        decay, states, h_0 = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        grad_drive = torch.empty_like(grad_states)
        grad_t = torch.zeros_like(h_0)
        steps = zip(decay.unbind(0), grad_states.unbind(0), grad_drive.unbind(0), strict=True)
        a_tp1 = torch.zeros_like(h_0)
        for a_t, g_t, out_t in reversed(list(steps)):
            grad_t = torch.addcmul(g_t, a_tp1, grad_t, out=out_t)
            a_tp1 = a_t
        grad_decay = torch.empty_like(grad_drive)
        torch.mul(grad_drive[1:], states[:-1], out=grad_decay[1:])
        torch.mul(grad_drive[0], h_0, out=grad_decay[0])
        return grad_decay, grad_drive, decay[0] * grad_drive[0]


def gated_linear_scan(
    decay: Float[Tensor, "T B D"],
    drive: Float[Tensor, "T B D"],
    h_0: Float[Tensor, "B D"],
    is_init: Bool[Tensor, "T B"],
    initial: Float[Tensor, "B D"],
) -> Float[Tensor, "T B D"]:
    """Gated linear recurrence over a sequence, restarted where episodes begin.

        h_t = a_t * h_{t-1} + b_t,   h_{t-1} := initial where is_init_t

    Args:
        decay: a_t, in [0, 1].
        drive: b_t.
        h_0: the state before the first step.
        is_init: where an episode begins.
        initial: the state that episodes begin from.

    Returns:
        The states h_t. Gradients reach every float argument, and never cross a restart.

    Raises:
        ValueError: if there is no step.

    Cost: O(TBD) time and memory; first derivatives only.
    """
    if decay.shape[0] == 0:
        raise ValueError("gated_linear_scan needs at least one step; got T == 0.")
    if decay.is_cuda or bool(is_init.any()):  # on CUDA the branch would wait for the device
        mask = is_init.unsqueeze(-1)
        drive = torch.where(mask, torch.addcmul(drive, decay, initial.unsqueeze(0)), drive)
        decay = decay.masked_fill(mask, 0.0)
    return _LinearRecurrence.apply(decay.contiguous(), drive.contiguous(), h_0)  # pyright: ignore[reportReturnType]
