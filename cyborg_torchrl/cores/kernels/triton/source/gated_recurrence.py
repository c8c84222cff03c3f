"""The gated recurrence of `lru`, forward and backward.

A program computes all steps of BLOCK channels of one environment, in order. So a sequence rounds like its steps.
The inputs of UNROLL steps are loaded together: the program waits for memory once for all of them.
"""

import triton
import triton.language as tl

from .functions import expm1_negative


@triton.jit
def _gates(decay_gate, input_gate, double_rate):
    opening = tl.sigmoid(decay_gate)
    gate = tl.sigmoid(input_gate)
    # loss = a - 1. It gives 1 - a^2 without cancellation.
    loss = expm1_negative(-opening * double_rate)
    power = tl.sqrt_rn(-loss * (2.0 + loss))
    return opening, gate, loss, power


# One program serves all lengths and batches. A variant for T = 1 could round differently.
@triton.jit(do_not_specialize=["steps", "rows"])
def forward(
    inputs, rate, h_0, initial, is_init, states, steps, rows,
    D: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Write the states [T, B, D], given the gates' inputs [T, B, 3 D]."""
    b = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_channel = d < D
    double_rate = 2.0 * tl.load(rate + d, mask=is_channel, other=1.0)
    h = tl.load(h_0 + b * D + d, mask=is_channel, other=0.0)
    first = tl.load(initial + b * D + d, mask=is_channel, other=0.0)
    for start in range(0, steps, UNROLL):
        decay_gates = ()
        input_gates = ()
        xs = ()
        resets = ()
        for i in tl.static_range(UNROLL):
            is_step = start + i < steps
            row = (start + i) * rows + b
            at = inputs + row * (3 * D) + d
            decay_gates = decay_gates + (tl.load(at, mask=is_channel & is_step, other=0.0),)
            input_gates = input_gates + (tl.load(at + D, mask=is_channel & is_step, other=0.0),)
            xs = xs + (tl.load(at + 2 * D, mask=is_channel & is_step, other=0.0),)
            resets = resets + (tl.load(is_init + row, mask=is_step, other=0) != 0,)
        for i in tl.static_range(UNROLL):
            _, gate, loss, power = _gates(decay_gates[i], input_gates[i], double_rate)
            # The state before a reset may be NaN, so it is replaced, not multiplied by zero.
            h = tl.where(resets[i], first, h)
            h = tl.fma(1.0 + loss, h, power * gate * xs[i])
            is_step = start + i < steps
            tl.store(states + ((start + i) * rows + b) * D + d, h, mask=is_channel & is_step)


@triton.jit(do_not_specialize=["steps", "rows"])
def backward(
    inputs, rate, h_0, initial, is_init, states, grad_states,
    grad_inputs, grad_rate, grad_h_0, grad_initial, steps, rows,
    D: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Write all gradients. `grad_rate` [B, D] has one row for each environment, to be summed."""
    b = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_channel = d < D
    double_rate = 2.0 * tl.load(rate + d, mask=is_channel, other=1.0)
    stored = tl.load(h_0 + b * D + d, mask=is_channel, other=0.0)
    first = tl.load(initial + b * D + d, mask=is_channel, other=0.0)
    carry = tl.zeros([BLOCK], tl.float32)
    sum_rate = tl.zeros([BLOCK], tl.float32)
    sum_initial = tl.zeros([BLOCK], tl.float32)
    for start in range(0, steps, UNROLL):
        decay_gates = ()
        input_gates = ()
        xs = ()
        befores = ()
        grads = ()
        resets = ()
        for i in tl.static_range(UNROLL):
            t = steps - 1 - start - i
            is_step = t >= 0
            row = t * rows + b
            at = inputs + row * (3 * D) + d
            decay_gates = decay_gates + (tl.load(at, mask=is_channel & is_step, other=0.0),)
            input_gates = input_gates + (tl.load(at + D, mask=is_channel & is_step, other=0.0),)
            xs = xs + (tl.load(at + 2 * D, mask=is_channel & is_step, other=0.0),)
            befores = befores + (tl.load(states + (row - rows) * D + d, mask=is_channel & (t > 0), other=0.0),)
            grads = grads + (tl.load(grad_states + row * D + d, mask=is_channel & is_step, other=0.0),)
            resets = resets + (tl.load(is_init + row, mask=is_step, other=0) != 0,)
        for i in tl.static_range(UNROLL):
            t = steps - 1 - start - i
            is_step = t >= 0
            opening, gate, loss, power = _gates(decay_gates[i], input_gates[i], double_rate)
            decay = 1.0 + loss
            before = tl.where(resets[i], first, tl.where(t == 0, stored, befores[i]))
            grad = grads[i] + carry
            back = decay * grad
            sum_initial += tl.where(resets[i] & is_step, back, 0.0)
            carry = tl.where(is_step, tl.where(resets[i], 0.0, back), carry)
            grad_gated = grad * gate
            grad_x = grad_gated * power
            # a d/da (h a + sqrt(1 - a^2) v) = a h - a^2 v / sqrt(1 - a^2)
            slope = decay * (grad_gated * xs[i]) / tl.maximum(power, 1e-18)
            grad_log = (grad * before - slope) * decay * opening
            sum_rate += tl.where(is_step, grad_log, 0.0)
            at = grad_inputs + (t * rows + b) * (3 * D) + d
            tl.store(at, -grad_log * (1.0 - opening) * double_rate, mask=is_channel & is_step)
            tl.store(at + D, grad_x * xs[i] * (1.0 - gate), mask=is_channel & is_step)
            tl.store(at + 2 * D, grad_x, mask=is_channel & is_step)
    tl.store(grad_h_0 + b * D + d, carry, mask=is_channel)
    tl.store(grad_initial + b * D + d, sum_initial, mask=is_channel)
    tl.store(grad_rate + b * D + d, -2.0 * sum_rate, mask=is_channel)
