"""The selective scan of Mamba-1, with a gradient written by hand.

Time comes first ([T, B, D]), as in `scan`. Expanded quantities have N numbers for each number of the input. They exist
for one block of steps at a time, small enough for the cache. The backward pass recomputes them from the state at the
start of each block. So the gradient needs O(T B (D + N)) memory, not O(T B D N).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from cyborg_torchrl.cores.resets import reset_steps

LOG2_E = math.log2(math.e)
BLOCK_NUMEL = 2**19
"""Numbers in an expanded block. A few such blocks fit into the cache of one processor core."""


def _spans(steps: int, numel_per_step: int) -> list[slice]:
    """Return the blocks of steps, in order. Only the last may be shorter."""
    length = max(1, BLOCK_NUMEL // numel_per_step)
    return [slice(start, min(start + length, steps)) for start in range(0, steps, length)]


class _Block:
    """Storage for the expanded quantities of one block of steps, reused for each block.

    `states[0]` is the state before the block. `states[1 + i]` is the state after its i-th step.
    """

    def __init__(self, steps: int, like: Tensor) -> None:
        self.decay = like.new_empty(steps, *like.shape)
        self.states = like.new_empty(steps + 1, *like.shape)
        self.work = like.new_empty(steps, *like.shape)

    def recur(
        self, span: slice, h_0: Tensor, inputs: tuple[Tensor, ...], resets: list[bool], is_init: Tensor, initial: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return decays, states and a work buffer for the steps `span`."""
        u_dt, delta, a, b = inputs
        steps = u_dt[span].shape[0]
        # torch's exp2 is several times faster than its exp on a CPU
        decay = torch.mul(delta[span].unsqueeze(2), a * LOG2_E, out=self.decay[:steps]).exp2_()
        states = self.states[: steps + 1]
        torch.mul(u_dt[span].unsqueeze(2), b[span].unsqueeze(3), out=states[1:])
        states[0] = h_t = h_0
        for i, (a_t, out_t) in enumerate(zip(decay.unbind(0), states[1:].unbind(0), strict=True)):
            t = span.start + i
            if resets[t]:
                h_t = torch.where(is_init[t, :, None, None], initial, h_t)
            h_t = torch.addcmul(out_t, a_t, h_t, out=out_t)
        return decay, states, self.work[:steps]


class _SelectiveScan(torch.autograd.Function):
    """h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t;  y_t = C_t h_t. States are [B, N, D]: the long side is last."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        u: Tensor,
        delta: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        h_0: Tensor,
        is_init: Tensor,
        initial: Tensor,
    ) -> tuple[Tensor, Tensor]:
        spans = _spans(u.shape[0], h_0.numel())
        resets = reset_steps(is_init)
        inputs = (delta * u, delta, a, b)
        block = _Block(spans[0].stop, h_0)
        y = torch.empty_like(u)
        starts = [h_0]
        for span in spans:
            _, states, work = block.recur(span, starts[-1], inputs, resets, is_init, initial)
            torch.sum(torch.mul(states[1:], c[span].unsqueeze(3), out=work), 2, out=y[span])
            starts.append(states[-1].clone())
        ctx.save_for_backward(u, delta, a, b, c, is_init, initial, *starts[:-1])
        return y, starts[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_y: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, a, b, c, is_init, initial, *starts = ctx.saved_tensors
        spans = _spans(u.shape[0], initial.numel())
        resets = reset_steps(is_init)
        u_dt = delta * u
        block, grads = _Block(spans[0].stop, initial), initial.new_empty(spans[0].stop, *initial.shape)
        grad_u_dt, grad_delta = torch.empty_like(u), torch.empty_like(u)
        grad_a, grad_b, grad_c = torch.zeros_like(a), torch.empty_like(b), torch.empty_like(c)
        grad_initial = torch.zeros_like(initial)
        carried = grad_last.clone()  # gradient of the state after the block
        for span, start in reversed(list(zip(spans, starts, strict=True))):
            decay, states, work = block.recur(span, start, (u_dt, delta, a, b), resets, is_init, initial)
            torch.sum(torch.mul(states[1:], grad_y[span].unsqueeze(2), out=work), 3, out=grad_c[span])
            grad = torch.mul(grad_y[span].unsqueeze(2), c[span].unsqueeze(3), out=grads[: decay.shape[0]])
            for i, (a_t, grad_t) in reversed(list(enumerate(zip(decay.unbind(0), grad.unbind(0), strict=True)))):
                grad_t += carried
                torch.mul(a_t, grad_t, out=carried)
                t = span.start + i
                if resets[t]:
                    mask = is_init[t, :, None, None]
                    grad_initial += carried.masked_fill(~mask, 0.0)
                    carried.masked_fill_(mask, 0.0)
                    # from now on, this slot is the state before step t
                    states[i] = torch.where(mask, initial, states[i])
            torch.sum(torch.mul(grad, b[span].unsqueeze(3), out=work), 2, out=grad_u_dt[span])
            torch.sum(torch.mul(grad, u_dt[span].unsqueeze(2), out=work), 3, out=grad_b[span])
            grad_exponent = decay.mul_(grad).mul_(states[:-1])
            torch.sum(torch.mul(grad_exponent, a, out=work), 2, out=grad_delta[span])
            grad_a += grad_exponent.mul_(delta[span].unsqueeze(2)).sum((0, 1))
        grad_delta.addcmul_(grad_u_dt, u)
        return grad_u_dt.mul_(delta), grad_delta, grad_a, grad_b, grad_c, carried, None, grad_initial


def selective_scan(
    u: Float[Tensor, "T B D"],
    delta: Float[Tensor, "T B D"],
    a: Float[Tensor, "D N"],
    b: Float[Tensor, "T B N"],
    c: Float[Tensor, "T B N"],
    h_0: Float[Tensor, "B D N"],
    is_init: Bool[Tensor, "T B"],
    initial: Float[Tensor, "B D N"],
) -> tuple[Float[Tensor, "T B D"], Float[Tensor, "B D N"]]:
    """Run a selective state space model over a sequence, and restart where episodes begin.

        h_t = exp(delta_t A) * h_{t-1} + (delta_t u_t) B_t,   h_{t-1} := initial where is_init_t
        y_t = sum_n C_t h_t

    Args:
        u: input.
        delta: step sizes, positive.
        a: diagonal of the state matrix, negative.
        b: write vectors.
        c: read vectors.
        h_0: the state before the first step.
        is_init: true where an episode begins. The state before it is dropped there, NaN included.
        initial: the state at the start of an episode.

    Returns:
        The outputs y_t, and the last state. Gradients reach every float argument and never cross a restart.

    Raises:
        ValueError: if there is no step.

    Cost: O(T B D N) time, O(T B (D + N)) memory. Second derivatives are not supported.

    Source: Gu and Dao (2023), "Mamba", algorithm 2, with the simplified discretisation of B of the reference code.
    """
    if u.shape[0] == 0:
        raise ValueError("selective_scan needs at least one step; got T == 0.")
    floats = (u, delta, a.t(), b, c, h_0.transpose(1, 2))
    y, last = _SelectiveScan.apply(
        *(tensor.contiguous() for tensor in floats), is_init, initial.transpose(1, 2).contiguous()
    )
    return y, last.transpose(1, 2)
