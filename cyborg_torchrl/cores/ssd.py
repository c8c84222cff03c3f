"""The scan of Mamba-2 (state space duality): matrix products within chunks of steps, a recurrence between them."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

CHUNK = 16
"""Steps of a chunk. The work within grows with it, the number of steps of the recurrence between shrinks."""


class _WithinChunks(torch.autograd.Function):
    """What chunks do by themselves: reads of their own writes, what they add to the state, and their decays.

        D_ij = prod_{j < k <= i} a_k,  a_k = 0 where k restarts, so that nothing crosses a restart, exactly
        y_i = sum_{j <= i} D_ij (c_i b_j) x_j;    added = sum_j D_{L-1,j} x_j b_j^T
        from_start_i = prod_{k <= i} a_k;    since_reset_i = product from the last restart on; 0 where there was none

    Shapes, after any number of batch dimensions: c, b [L, N]; x, y [L, H P]; log_decay, from_start, since_reset
    [H, L]; added [H P, N]; is_init [L]; spread [H, H P], the matrix that repeats a number for all channels of a head.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: FunctionCtx,
        c: Tensor,
        b: Tensor,
        x: Tensor,
        log_decay: Tensor,
        is_init: Tensor,
        spread: Tensor,
        has_reset: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        single = log_decay.exp()
        cut = single.masked_fill(is_init.unsqueeze(-2), 0.0) if has_reset else single
        # row by row, as the recurrence itself would: no differences of sums, which lose digits
        decay = torch.zeros(*cut.shape, cut.shape[-1], dtype=cut.dtype, device=cut.device)
        decay.diagonal(dim1=-2, dim2=-1).fill_(1.0)
        for i in range(1, cut.shape[-1]):
            torch.mul(decay[..., i - 1, :i], cut[..., i, None], out=decay[..., i, :i])
        weight = torch.matmul(c, b.transpose(-1, -2)).unsqueeze(-3) * decay
        heads = _by_head(x, cut.shape[-2])
        y = _all_heads(torch.matmul(weight, heads))
        to_end = torch.matmul(decay[..., -1, :].transpose(-1, -2), spread)
        added = torch.matmul((x * to_end).transpose(-1, -2), b)
        from_start = decay[..., 0] * cut[..., :1]
        restarted = single * is_init.unsqueeze(-2)
        since_reset = torch.matmul(decay, restarted.unsqueeze(-1)).squeeze(-1) if has_reset else torch.zeros_like(cut)
        ctx.save_for_backward(c, b, x, heads, to_end, single, cut, decay, weight, is_init, spread)
        ctx.has_reset = has_reset  # pyright: ignore[reportAttributeAccessIssue]
        return y, added, from_start, since_reset

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: FunctionCtx, grad_y: Tensor, grad_added: Tensor, grad_from_start: Tensor, grad_since: Tensor
    ) -> tuple[Tensor | None, ...]:
        saved: tuple[Tensor, ...] = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        c, b, x, heads, to_end, single, cut, decay, weight, is_init, spread = saved
        has_reset: bool = ctx.has_reset  # pyright: ignore[reportAttributeAccessIssue]
        grad_heads = _by_head(grad_y, heads.shape[-3])
        grad_weight = torch.matmul(grad_heads, heads.transpose(-1, -2))
        grad_product = (grad_weight * decay).sum(-3)
        grad_scaled = torch.matmul(b, grad_added.transpose(-1, -2))
        grad_x = _all_heads(torch.matmul(weight.transpose(-1, -2), grad_heads)).addcmul_(grad_scaled, to_end)
        grad_b = torch.matmul(grad_product.transpose(-1, -2), c) + torch.matmul(x * to_end, grad_added)
        # share_ij: gradient to the logarithm of D_ij, which is a sum of log decays over j < k <= i
        share = grad_weight.mul_(weight)
        share[..., -1, :] += torch.matmul(grad_scaled * x, spread.t()).transpose(-1, -2) * decay[..., -1, :]
        grad_start = grad_from_start * decay[..., 0]  # from_start_i = D_i0 a_0
        share[..., 0] += grad_start * cut[..., :1]
        grad_log = torch.zeros_like(cut)
        grad_log[..., 0] = grad_start.sum(-1) * cut[..., 0]
        if has_reset:
            of_since = grad_since.unsqueeze(-1) * decay * (single * is_init.unsqueeze(-2)).unsqueeze(-2)
            share += of_since
            grad_log += of_since.sum(-2)
        difference = share.sum(-1) - share.sum(-2)
        if has_reset:
            # sums within an episode alone: not even rounding crosses a restart
            episode = is_init.cumsum(-1)
            is_same = (episode.unsqueeze(-1) == episode.unsqueeze(-2)).tril().to(cut.dtype)
            grad_log += torch.matmul(difference, is_same)
        else:
            grad_log += difference.flip(-1).cumsum(-1).flip(-1)
        return torch.matmul(grad_product, b), grad_b, grad_x, grad_log, None, None, None


def _by_head(x: Tensor, heads: int) -> Tensor:
    """[..., L, H P] -> [..., H, L, P]."""
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3).contiguous()


def _all_heads(x: Tensor) -> Tensor:
    """[..., H, L, P] -> [..., L, H P]."""
    return x.transpose(-2, -3).flatten(-2)


def ssd_scan(
    x: Float[Tensor, "T B H P"],
    log_decay: Float[Tensor, "T B H"],
    b: Float[Tensor, "T B N"],
    c: Float[Tensor, "T B N"],
    h_0: Float[Tensor, "B H P N"],
    is_init: Bool[Tensor, "T B"],
    initial: Float[Tensor, "B H P N"],
    chunk: int = CHUNK,
) -> tuple[Float[Tensor, "T B H P"], Float[Tensor, "B H P N"]]:
    """State space model with one decay a head over a sequence, restarted where episodes begin.

        h_t = exp(log_decay_t) h_{t-1} + x_t B_t^T,   h_{t-1} := initial where is_init_t
        y_t = h_t C_t

    Args:
        x: input, already times the step size.
        log_decay: logarithm of what is kept, at most 0.
        b: how the input is written; the same for all heads.
        c: how the state is read.
        h_0: the state before the first step.
        is_init: where an episode begins; whatever was before it, NaN too, is forgotten.
        initial: the state that episodes begin from.
        chunk: steps that are computed at once, as matrix products.

    Returns:
        What is read at each step, and the last state. Gradients reach every float argument, and never cross a
        restart.

    Raises:
        ValueError: if there is no step.

    Cost: O(T B H (chunk (chunk + P) / chunk + P N)) time and O(T B H (chunk + P)) memory; first derivatives only.

    Source: Dao and Gu (2024), "Transformers are SSMs", section 6; resets and stored states are ours.
    """
    steps, _, heads, width = x.shape
    if steps == 0:
        raise ValueError("ssd_scan needs at least one step; got T == 0.")
    chunk = min(chunk, steps)
    padding = -steps % chunk
    x = x.flatten(2)
    if padding:  # steps that keep everything and write nothing
        x, log_decay, b, c, is_init = (
            F.pad(tensor, (0, 0) * (tensor.ndim - 1) + (0, padding)) for tensor in (x, log_decay, b, c, is_init)
        )
    x, log_decay, b, c, is_init = (
        tensor.unflatten(0, (-1, chunk)).transpose(1, 2).contiguous() for tensor in (x, log_decay, b, c, is_init)
    )  # [K, B, L, ...]
    has_reset = bool(is_init.any())
    spread = torch.eye(heads, dtype=x.dtype, device=x.device).repeat_interleave(width, 1)
    y, added, from_start, since_reset = _WithinChunks.apply(  # pyright: ignore[reportGeneralTypeIssues]
        c, b, x, log_decay.transpose(-1, -2), is_init, spread, has_reset
    )
    from_start = torch.matmul(from_start.transpose(-1, -2), spread)  # [K, B, L, H P]
    since_reset = torch.matmul(since_reset.transpose(-1, -2), spread) if has_reset else since_reset
    initial = initial.flatten(1, 2)
    if has_reset:
        added = added + since_reset[..., -1, :, None] * initial
    kept = from_start[..., -1, :, None]
    before: list[Tensor] = []
    h_t = h_0.flatten(1, 2)
    for kept_k, added_k, restarts in zip(kept.unbind(0), added.unbind(0), is_init.any(-1).unbind(0), strict=True):
        before.append(h_t)
        if has_reset:
            h_t = h_t.masked_fill(restarts[:, None, None], 0.0)
        h_t = torch.addcmul(added_k, kept_k, h_t)
    state = torch.stack(before)  # [K, B, H P, N]
    if has_reset:
        state = state.masked_fill(is_init[..., 0, None, None], 0.0)
    y = torch.addcmul(y, from_start, torch.matmul(c, state.transpose(-1, -2)))
    if has_reset:
        y = torch.addcmul(y, since_reset, torch.matmul(c, initial.transpose(-1, -2)))
    y = y.transpose(1, 2).flatten(0, 1)
    return y[:steps].unflatten(-1, (heads, width)), h_t.unflatten(1, (heads, width))
