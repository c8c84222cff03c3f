"""The gated linear scan, forward and backward. Programs are divided as those of the gated recurrence."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["steps", "rows"])
def forward(
    decay, drive, h_0, initial, is_init, states, steps, rows,
    D: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Write the states h_t = a_t h_{t-1} + b_t, [T, B, D]."""
    b = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_channel = d < D
    h = tl.load(h_0 + b * D + d, mask=is_channel, other=0.0)
    first = tl.load(initial + b * D + d, mask=is_channel, other=0.0)
    for start in range(0, steps, UNROLL):
        decays = ()
        drives = ()
        resets = ()
        for i in tl.static_range(UNROLL):
            is_step = start + i < steps
            row = (start + i) * rows + b
            decays = decays + (tl.load(decay + row * D + d, mask=is_channel & is_step, other=0.0),)
            drives = drives + (tl.load(drive + row * D + d, mask=is_channel & is_step, other=0.0),)
            resets = resets + (tl.load(is_init + row, mask=is_step, other=0) != 0,)
        for i in tl.static_range(UNROLL):
            h = tl.fma(decays[i], tl.where(resets[i], first, h), drives[i])
            is_step = start + i < steps
            tl.store(states + ((start + i) * rows + b) * D + d, h, mask=is_channel & is_step)


@triton.jit(do_not_specialize=["steps", "rows"])
def backward(
    decay, h_0, initial, is_init, states, grad_states,
    grad_decay, grad_drive, grad_h_0, grad_initial, steps, rows,
    D: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Write all gradients."""
    b = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_channel = d < D
    stored = tl.load(h_0 + b * D + d, mask=is_channel, other=0.0)
    first = tl.load(initial + b * D + d, mask=is_channel, other=0.0)
    carry = tl.zeros([BLOCK], tl.float32)
    sum_initial = tl.zeros([BLOCK], tl.float32)
    for start in range(0, steps, UNROLL):
        decays = ()
        befores = ()
        grads = ()
        resets = ()
        for i in tl.static_range(UNROLL):
            t = steps - 1 - start - i
            is_step = t >= 0
            row = t * rows + b
            decays = decays + (tl.load(decay + row * D + d, mask=is_channel & is_step, other=0.0),)
            befores = befores + (tl.load(states + (row - rows) * D + d, mask=is_channel & (t > 0), other=0.0),)
            grads = grads + (tl.load(grad_states + row * D + d, mask=is_channel & is_step, other=0.0),)
            resets = resets + (tl.load(is_init + row, mask=is_step, other=0) != 0,)
        for i in tl.static_range(UNROLL):
            t = steps - 1 - start - i
            is_step = t >= 0
            before = tl.where(resets[i], first, tl.where(t == 0, stored, befores[i]))
            grad = grads[i] + carry
            back = decays[i] * grad
            sum_initial += tl.where(resets[i] & is_step, back, 0.0)
            carry = tl.where(is_step, tl.where(resets[i], 0.0, back), carry)
            at = (t * rows + b) * D + d
            tl.store(grad_decay + at, grad * before, mask=is_channel & is_step)
            tl.store(grad_drive + at, grad, mask=is_channel & is_step)
    tl.store(grad_h_0 + b * D + d, carry, mask=is_channel)
    tl.store(grad_initial + b * D + d, sum_initial, mask=is_channel)


@triton.jit(do_not_specialize=["steps", "rows"])
def advantage(
    reward, value_t, value_tp1, is_terminated, is_done, result, gamma, decay, steps, rows,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Write generalised advantages: a linear scan backwards in time. Time comes last, [N, T]."""
    n = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    is_row = n < rows
    running = tl.zeros([BLOCK], tl.float32)
    for start in range(0, steps, UNROLL):
        deltas = ()
        decays = ()
        for i in tl.static_range(UNROLL):
            t = steps - 1 - start - i
            mask = is_row & (t >= 0)
            at = n * steps + t
            terminated = tl.load(is_terminated + at, mask=mask, other=0) != 0
            done = tl.load(is_done + at, mask=mask, other=0) != 0
            following = gamma * tl.load(value_tp1 + at, mask=mask, other=0.0)
            # Products with 0 keep NaN and infinity visible, as in torch.
            following = following * tl.where(terminated, 0.0, 1.0)
            here = tl.load(value_t + at, mask=mask, other=0.0)
            deltas = deltas + (tl.load(reward + at, mask=mask, other=0.0) + following - here,)
            decays = decays + (tl.where(done, 0.0, decay),)
        for i in tl.static_range(UNROLL):
            t = steps - 1 - start - i
            running = tl.fma(decays[i], running, deltas[i])
            tl.store(result + n * steps + t, running, mask=is_row & (t >= 0))
