"""The scan of Mamba-2 (state space duality): matrix products within chunks of steps, a recurrence between chunks.

A block of chunks is computed at a time, as many as fit into a processor's cache. The backward pass recomputes them
from the state at the start of each chunk. Within a chunk time comes last, so that a head's channels form one matrix.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from cyborg_torchrl.cores.blocks import blocks
from cyborg_torchrl.cores.selective_scan import LOG2_E

CHUNK = 16
"""Steps of a chunk. Longer chunks mean more work within chunks and fewer steps of the recurrence between them."""
NEVER = -1e4
"""Logarithm that stands for a decay of zero: exp(NEVER) is exactly 0 in single and double precision."""


@lru_cache(maxsize=16)
def _between(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a matrix [L, L L] with 1 where j < k <= i, for row k and column (i, j).

    A product with it sums the steps between j and i. Differences of cumulative sums would lose digits, and could not
    exclude a restart.
    """
    k = torch.arange(length, device=device)
    is_between = (k[None, None, :] < k[:, None, None]) & (k[:, None, None] <= k[None, :, None])
    return is_between.to(dtype).flatten(1)


class _Chunks(NamedTuple):
    """Inputs of G chunks, time last."""

    u: Tensor
    """[G, B, H, P, L]."""
    delta: Tensor
    """[G, B, H, L]."""
    a: Tensor
    """[H]."""
    x: Tensor
    """delta u, the values to write."""
    b: Tensor
    """[G, B, N, L]."""
    c: Tensor
    """[G, B, N, L]."""
    is_init: Tensor | None
    """[G, B, L]; None if no episode begins."""

    @staticmethod
    def from_sequences(
        span: slice, u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, is_init: Tensor | None
    ) -> _Chunks:
        """Build the inputs of the chunks `span` from sequences [K, L, B, ...]."""
        u, delta = _time_last(u[span]).unflatten(2, (a.shape[0], -1)), _time_last(delta[span])
        resets = None if is_init is None or not bool(is_init[span].any()) else is_init[span].transpose(1, 2)
        return _Chunks(u, delta, a, u * delta.unsqueeze(3), _time_last(b[span]), _time_last(c[span]), resets)


def _time_last(sequences: Tensor) -> Tensor:
    """Return sequences with time last: [G, L, B, D] -> [G, B, D, L]. Two fast copies take less time than one."""
    return sequences.transpose(1, 2).contiguous().transpose(2, 3).contiguous()


class _Weights(NamedTuple):
    """Influence of steps on each other within a chunk.

    decay_ij = prod_{j < k <= i} a_k, for j <= i;    a_k = 0 where k restarts, so nothing crosses a restart
    weight_ij = decay_ij (c_i b_j), for j <= i;    to_end_j = decay_{L-1, j}
    from_start_i = prod_{k <= i} a_k;    since_reset_i = product from the last restart on, 0 without a restart
    """

    decay: Tensor
    """[G, B, H, L, L]; values above the diagonal are undefined."""
    weight: Tensor
    """[G, B, H, L, L]."""
    to_end: Tensor
    """[G, B, H, L]."""
    from_start: Tensor
    """[G, B, H, L]."""
    restarted: Tensor | None
    """[G, B, H, L], a_j where j restarts, else 0."""
    since_reset: Tensor | None
    """[G, B, H, L]."""

    @staticmethod
    def from_chunks(chunks: _Chunks) -> _Weights:
        """Compute the weights of the chunks."""
        length = chunks.x.shape[-1]
        # torch's exp2 is several times faster than its exp on a CPU
        log2_decay = chunks.delta * (chunks.a * LOG2_E).unsqueeze(-1)
        cut = log2_decay if chunks.is_init is None else log2_decay.masked_fill(chunks.is_init.unsqueeze(2), NEVER)
        between = _between(length, cut.dtype, cut.device)
        decay = torch.matmul(cut.flatten(0, -2), between).exp2_().view(*cut.shape, length)
        scores = torch.matmul(chunks.c.transpose(-1, -2), chunks.b).tril_()
        from_start = decay[..., 0] * torch.exp2(cut[..., :1])
        restarted = since_reset = None
        if chunks.is_init is not None:
            restarted = torch.exp2(log2_decay) * chunks.is_init.unsqueeze(2)
            since_reset = torch.matmul(decay.tril(), restarted.unsqueeze(-1)).squeeze(-1)
        return _Weights(decay, scores.unsqueeze(2) * decay, decay[..., -1, :], from_start, restarted, since_reset)


def _channels(x: Tensor) -> Tensor:
    """Join heads and their channels: [G, B, H, P, L] -> [G, B, H P, L]."""
    return x.flatten(2, 3)


class _SSD(torch.autograd.Function):
    """The scan over u [K, L, B, H P]; delta [K, L, B, H]; a [H]; b, c [K, L, B, N]; states [B, H P, N]."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        u: Tensor,
        delta: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        h_0: Tensor,
        is_init: Tensor | None,
        initial: Tensor,
    ) -> tuple[Tensor, Tensor]:
        y = torch.empty_like(u)
        before = u.new_empty(u.shape[0], *h_0.shape)  # the state at the start of each chunk
        h_t = h_0
        for span in blocks(u, 2):
            chunks = _Chunks.from_sequences(span, u, delta, a, b, c, is_init)
            weights = _Weights.from_chunks(chunks)
            added = torch.matmul(_channels(chunks.x * weights.to_end.unsqueeze(3)), chunks.b.transpose(-1, -2))
            h_t = _states(h_t, added, weights, chunks, initial, before[span])
            read = torch.matmul(before[span], chunks.c).view_as(chunks.x)
            y_k = torch.matmul(chunks.x, weights.weight.transpose(-1, -2))
            if weights.since_reset is not None:
                read.masked_fill_((weights.from_start == 0.0).unsqueeze(3), 0.0)  # NaN times 0 is NaN
                afresh = torch.matmul(initial, chunks.c).view_as(chunks.x)
                y_k.addcmul_(afresh, weights.since_reset.unsqueeze(3))
            y_k.addcmul_(read, weights.from_start.unsqueeze(3))
            y[span] = _channels(y_k).permute(0, 3, 1, 2)
        ctx.save_for_backward(u, delta, a, b, c, is_init, initial, before)  # pyright: ignore[reportArgumentType]
        return y, h_t

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_y: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, a, b, c, is_init, initial, before = ctx.saved_tensors
        grads = torch.empty_like(u), torch.empty_like(delta), torch.empty_like(b), torch.empty_like(c)
        grad_a, grad_initial = torch.zeros_like(a), torch.zeros_like(initial)
        grad_h = grad_last
        for span in reversed(blocks(u, 2)):
            chunks = _Chunks.from_sequences(span, u, delta, a, b, c, is_init)
            grad_y_k = _time_last(grad_y[span]).view_as(chunks.x)
            grad_x, grad_log, grad_b, grad_c, grad_h = _block_backward(
                chunks, grad_y_k, grad_h, before[span], initial, grad_initial
            )
            grad_delta = torch.addcmul((grad_x * chunks.u).sum(3), grad_log, a.unsqueeze(-1))
            grad_a += (grad_log * chunks.delta).sum((0, 1, 3))
            grad_u = _channels(grad_x.mul_(chunks.delta.unsqueeze(3)))
            for grad, of_span in zip(grads, (grad_u, grad_delta, grad_b, grad_c), strict=True):
                grad[span] = of_span.permute(0, 3, 1, 2)
        return grads[0], grads[1], grad_a, grads[2], grads[3], grad_h, None, grad_initial


def _states(h_t: Tensor, added: Tensor, weights: _Weights, chunks: _Chunks, initial: Tensor, before: Tensor) -> Tensor:
    """Run the recurrence between chunks: write the state before each chunk to `before`, return the last state."""
    width = chunks.x.shape[3]
    kept = weights.from_start[..., -1].repeat_interleave(width, -1).unsqueeze(-1)
    for k, (added_k, kept_k, before_k) in enumerate(zip(added, kept, before, strict=True)):
        before_k.copy_(h_t)
        if chunks.is_init is not None and weights.since_reset is not None:
            h_t = h_t.masked_fill(chunks.is_init[k].any(-1)[:, None, None], 0.0)
            share = weights.since_reset[k, ..., -1].repeat_interleave(width, -1)
            added_k.addcmul_(share.unsqueeze(-1), initial)
        h_t = torch.addcmul(added_k, kept_k, h_t)
    return h_t


def _block_backward(
    chunks: _Chunks, grad_y: Tensor, grad_h: Tensor, before: Tensor, initial: Tensor, grad_initial: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return gradients of x, log decays, b, c (time last) and of the state before the block. Add to `grad_initial`."""
    x, b, c, is_init = chunks.x, chunks.b, chunks.c, chunks.is_init
    weights = _Weights.from_chunks(chunks)
    decay, weight, to_end, from_start, restarted, since_reset = weights
    heads, width = x.shape[2:4]
    if is_init is not None:  # no step of the chunk reads this state, and NaN times 0 is NaN
        before = before.masked_fill(is_init[..., 0, None, None], 0.0)
    # reads of the state before the chunk
    grad_read = _channels(grad_y * from_start.unsqueeze(3))
    grad_c = torch.matmul(before.transpose(-1, -2), grad_read)
    grad_before = torch.matmul(grad_read, c.transpose(-1, -2))
    grad_start = torch.matmul(before, c).view_as(x).mul_(grad_y).sum(3)
    grad_since = None
    if since_reset is not None:
        of_initial = _channels(grad_y * since_reset.unsqueeze(3))
        grad_c += torch.matmul(initial.transpose(-1, -2), of_initial)
        grad_initial += torch.matmul(of_initial, c.transpose(-1, -2)).sum(0)
        grad_since = torch.matmul(initial, c).view_as(x).mul_(grad_y).sum(3)
    # the recurrence between chunks
    kept = from_start[..., -1].repeat_interleave(width, -1).unsqueeze(-1)
    grad_added = torch.empty_like(before)
    for k in reversed(range(x.shape[0])):
        grad_added[k] = grad_h
        if since_reset is not None:
            grad_initial += grad_h * since_reset[k, ..., -1].repeat_interleave(width, -1).unsqueeze(-1)
        grad_h = torch.addcmul(grad_before[k], kept[k], grad_h)
    grad_start[..., -1] += (grad_added * before).sum(-1).unflatten(-1, (heads, width)).sum(-1)
    if grad_since is not None:
        grad_since[..., -1] += (grad_added * initial).sum(-1).unflatten(-1, (heads, width)).sum(-1)
    # contributions of chunks to the state
    grad_scaled = torch.matmul(grad_added, b).view_as(x)
    grad_b = torch.matmul(grad_added.transpose(-1, -2), _channels(x * to_end.unsqueeze(3)))
    grad_end = (grad_scaled * x).sum(3)
    # reads of writes within the same chunk
    grad_x = torch.matmul(grad_y, weight).addcmul_(grad_scaled, to_end.unsqueeze(3))
    grad_weight = torch.matmul(grad_y.transpose(-1, -2), x)
    grad_scores = torch.mul(grad_weight, decay).sum(2).tril_()  # [i, j]
    grad_c += torch.matmul(b, grad_scores.transpose(-1, -2))
    grad_b += torch.matmul(c, grad_scores)
    # share_ij is the gradient of log decay_ij, a sum of log decays over j < k <= i.
    share = grad_weight.mul_(weight)
    share[..., -1, :] += grad_end * to_end
    of_start = grad_start * from_start
    share[..., 0] += of_start
    grad_log = torch.zeros_like(from_start)
    if grad_since is not None and restarted is not None:
        of_since = grad_since.unsqueeze(-1) * decay.tril() * restarted.unsqueeze(-2)
        share += of_since
        grad_log += of_since.sum(-2)
    between = _between(x.shape[-1], x.dtype, x.device)
    grad_log += torch.matmul(share.flatten(0, 2).flatten(1), between.t()).view_as(grad_log)
    grad_log[..., 0] += of_start.sum(-1)
    return grad_x, grad_log, grad_b, grad_c, grad_h


def ssd_scan(
    u: Float[Tensor, "T B H P"],
    delta: Float[Tensor, "T B H"],
    a: Float[Tensor, " H"],
    b: Float[Tensor, "T B N"],
    c: Float[Tensor, "T B N"],
    h_0: Float[Tensor, "B H P N"],
    is_init: Bool[Tensor, "T B"],
    initial: Float[Tensor, "B H P N"],
    chunk: int = CHUNK,
) -> tuple[Float[Tensor, "T B H P"], Float[Tensor, "B H P N"]]:
    """Run a state space model with one decay per head over a sequence, and restart where episodes begin.

        h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t^T,   h_{t-1} := initial where is_init_t
        y_t = h_t C_t

    Args:
        u: input.
        delta: step sizes, positive.
        a: the state matrix, a negative number per head.
        b: write vectors, the same for all heads.
        c: read vectors, the same for all heads.
        h_0: the state before the first step.
        is_init: true where an episode begins. The state before it is dropped there, NaN included.
        initial: the state at the start of an episode.
        chunk: steps of a chunk, computed as matrix products.

    Returns:
        The outputs y_t, and the last state. Gradients reach every float argument and never cross a restart.

    Raises:
        ValueError: if there is no step.

    Cost: O(T B H (chunk + P) (P + N)) time. The gradient stores the inputs and one state per chunk. Second
    derivatives are not supported.

    Source: Dao and Gu (2024), "Transformers are SSMs", section 6. Resets and stored states are ours.
    """
    steps, _, heads, width = u.shape
    if steps == 0:
        raise ValueError("ssd_scan needs at least one step; got T == 0.")
    chunk = min(chunk, steps)
    padding = -steps % chunk
    sequences = [u.flatten(2), delta, b, c]
    resets = is_init if bool(is_init.any()) else None
    if padding:  # steps of size 0 keep the state and write nothing
        sequences = [F.pad(tensor, (0, 0, 0, 0, 0, padding)) for tensor in sequences]
        resets = None if resets is None else F.pad(resets, (0, 0, 0, padding))
    u, delta, b, c = (tensor.unflatten(0, (-1, chunk)) for tensor in sequences)
    resets = None if resets is None else resets.unflatten(0, (-1, chunk))
    y, last = _SSD.apply(u, delta, a, b, c, h_0.flatten(1, 2), resets, initial.flatten(1, 2))
    return y.flatten(0, 1)[:steps].unflatten(-1, (heads, width)), last.unflatten(1, (heads, width))
