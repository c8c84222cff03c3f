"""The selective scan of `mamba` and `mamba2`, forward and backward.

A program computes all steps of BLOCK channels of one environment, in order. Its state is a tile [BLOCK, P], where P is
N padded to a power of two. WIDTH channels share a step size. With IS_SHARED they share a decay, too, for all N.

The forward pass saves the state before every CHUNK steps. The backward pass recomputes a chunk's states into a scratch.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(D: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr):
    """Return environment, channels, numbers and offsets of the program's tile in [D, N], and the three masks."""
    b = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, P)
    inside = d[:, None] * N + n[None, :]
    return b, d, n, inside, d < D, n < N, (d < D)[:, None] & (n < N)[None, :]


@triton.jit
def _matrix(a, d, n, mask_d, mask, N: tl.constexpr, WIDTH: tl.constexpr, IS_SHARED: tl.constexpr):
    """Return the state matrix of the tile, [BLOCK, P], or [BLOCK, 1] if channels share it."""
    if IS_SHARED:
        result = tl.load(a + d // WIDTH, mask=mask_d, other=0.0)[:, None]
    else:
        result = tl.load(a + d[:, None] * N + n[None, :], mask=mask, other=0.0)
    return result


@triton.jit(do_not_specialize=["steps", "rows"])
def forward(
    u, delta, a, b_t, c_t, h_0, initial, is_init, y, last, starts, steps, rows,
    D: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, IS_SHARED: tl.constexpr, SAVE: tl.constexpr,
    BLOCK: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Write the outputs [T, B, D] and the last state; and for the gradient the state before each chunk of steps."""
    b, d, n, inside, mask_d, mask_n, mask = _tile(D, N, BLOCK, P)
    at = b * (D * N) + inside
    decays = _matrix(a, d, n, mask_d, mask, N, WIDTH, IS_SHARED)
    h = tl.load(h_0 + at, mask=mask, other=0.0)
    first = tl.load(initial + at, mask=mask, other=0.0)
    for start in range(0, steps, UNROLL):
        us = ()
        deltas = ()
        bs = ()
        cs = ()
        resets = ()
        for i in tl.static_range(UNROLL):
            is_step = start + i < steps
            row = (start + i) * rows + b
            us = us + (tl.load(u + row * D + d, mask=mask_d & is_step, other=0.0),)
            deltas = deltas + (tl.load(delta + row * (D // WIDTH) + d // WIDTH, mask=mask_d & is_step, other=0.0),)
            bs = bs + (tl.load(b_t + row * N + n, mask=mask_n & is_step, other=0.0),)
            cs = cs + (tl.load(c_t + row * N + n, mask=mask_n & is_step, other=0.0),)
            resets = resets + (tl.load(is_init + row, mask=is_step, other=0) != 0,)
        if SAVE:
            if start % CHUNK == 0:
                tl.store(starts + (start // CHUNK * rows + b) * (D * N) + inside, h, mask=mask)
        for i in tl.static_range(UNROLL):
            is_step = start + i < steps
            # The state before a reset may be NaN, so it is replaced, not multiplied by zero.
            h = tl.where(resets[i], first, h)
            # Steps after the last one have size 0 and no input: they change nothing.
            decay = tl.exp(deltas[i][:, None] * decays)
            h = tl.fma(tl.broadcast_to(decay, (BLOCK, P)), h, (deltas[i] * us[i])[:, None] * bs[i][None, :])
            out = tl.sum(h * cs[i][None, :], 1)
            tl.store(y + ((start + i) * rows + b) * D + d, out, mask=mask_d & is_step)
    tl.store(last + at, h, mask=mask)


@triton.jit(do_not_specialize=["steps", "rows"])
def backward(
    u, delta, a, b_t, c_t, initial, is_init, starts, grad_y, grad_last, scratch,
    grad_u, grad_delta, grad_a, grad_b, grad_c, grad_h_0, grad_initial, steps, rows,
    D: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, IS_SHARED: tl.constexpr,
    BLOCK: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write all gradients, to be summed where programs share an argument.

    `grad_delta` [T, B, D] has one number for each channel. `grad_a` [B, D, N] (or [B, D]) has a row for each
    environment. `grad_b` and `grad_c` [blocks, T, B, N] have a row for each block of channels.
    """
    b, d, n, inside, mask_d, mask_n, mask = _tile(D, N, BLOCK, P)
    at = b * (D * N) + inside
    decays = _matrix(a, d, n, mask_d, mask, N, WIDTH, IS_SHARED)
    first = tl.load(initial + at, mask=mask, other=0.0)
    carry = tl.load(grad_last + at, mask=mask, other=0.0)
    sum_initial = tl.zeros([BLOCK, P], tl.float32)
    sum_a = tl.zeros([BLOCK, P], tl.float32)
    of_block = tl.program_id(1).to(tl.int64) * steps * rows
    chunks = tl.cdiv(steps, CHUNK)
    for k in range(chunks):
        start = (chunks - 1 - k) * CHUNK
        stop = tl.minimum(start + CHUNK, steps)
        h = tl.load(starts + ((chunks - 1 - k) * rows + b) * (D * N) + inside, mask=mask, other=0.0)
        # Threads may read what other threads of the program wrote, so both passes end with a barrier.
        for t in range(start, stop):
            row = t * rows + b
            u_d = tl.load(u + row * D + d, mask=mask_d, other=0.0)
            delta_d = tl.load(delta + row * (D // WIDTH) + d // WIDTH, mask=mask_d, other=0.0)
            b_n = tl.load(b_t + row * N + n, mask=mask_n, other=0.0)
            reset = tl.load(is_init + row) != 0
            h = tl.where(reset, first, h)
            tl.store(scratch + ((t - start) * rows + b) * (D * N) + inside, h, mask=mask)
            decay = tl.exp(delta_d[:, None] * decays)
            h = tl.fma(tl.broadcast_to(decay, (BLOCK, P)), h, (delta_d * u_d)[:, None] * b_n[None, :])
        tl.debug_barrier()
        for s in range(0, stop - start):
            t = stop - 1 - s
            row = t * rows + b
            u_d = tl.load(u + row * D + d, mask=mask_d, other=0.0)
            delta_d = tl.load(delta + row * (D // WIDTH) + d // WIDTH, mask=mask_d, other=0.0)
            b_n = tl.load(b_t + row * N + n, mask=mask_n, other=0.0)[None, :]
            c_n = tl.load(c_t + row * N + n, mask=mask_n, other=0.0)[None, :]
            g_d = tl.load(grad_y + row * D + d, mask=mask_d, other=0.0)[:, None]
            reset = tl.load(is_init + row) != 0
            before = tl.load(scratch + ((t - start) * rows + b) * (D * N) + inside, mask=mask, other=0.0)
            decay = tl.broadcast_to(tl.exp(delta_d[:, None] * decays), (BLOCK, P))
            drive = (delta_d * u_d)[:, None]
            after = tl.fma(decay, before, drive * b_n)
            tl.store(grad_c + (of_block + row) * N + n, tl.sum(g_d * after, 0), mask=mask_n)
            grad = carry + g_d * c_n
            tl.store(grad_b + (of_block + row) * N + n, tl.sum(grad * drive, 0), mask=mask_n)
            back = grad * decay
            grad_exponent = back * before
            grad_drive = tl.sum(grad * b_n, 1)
            tl.store(grad_u + row * D + d, grad_drive * delta_d, mask=mask_d)
            of_delta = tl.sum(grad_exponent * decays, 1) + grad_drive * u_d
            tl.store(grad_delta + row * D + d, of_delta, mask=mask_d)
            sum_a += grad_exponent * delta_d[:, None]
            sum_initial += tl.where(reset, back, 0.0)
            carry = tl.where(reset, 0.0, back)
        tl.debug_barrier()
    tl.store(grad_h_0 + at, carry, mask=mask)
    tl.store(grad_initial + at, sum_initial, mask=mask)
    if IS_SHARED:
        tl.store(grad_a + b * D + d, tl.sum(sum_a, 1), mask=mask_d)
    else:
        tl.store(grad_a + at, sum_a, mask=mask)
