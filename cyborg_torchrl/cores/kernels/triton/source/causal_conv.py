"""The causal convolution of four taps with silu, forward and backward.

Outputs do not depend on each other, so programs divide the steps, too. The gradient of an input needs the gradients
of the three steps after it. In the backward pass a program computes three steps more than it writes.
"""

import triton
import triton.language as tl


@triton.jit
def _tap(x, history, initial, is_init, t, b, d, rows, alive, since, mask, LAG: tl.constexpr, D: tl.constexpr):
    """Return the input LAG steps before t, if the window still reaches there, and steps since the last reset.

    Where an episode began within the window, older inputs come from the initial history.
    """
    reset = tl.load(is_init + (t - LAG + 1) * rows + b, mask=alive & (t - LAG + 1 >= 0), other=0) != 0
    since = tl.where(reset, LAG - 1, since)
    alive = alive & (reset == 0)
    is_here = t >= LAG
    value = tl.load(x + ((t - LAG) * rows + b) * D + d, mask=mask & alive & is_here, other=0.0)
    state = (b * D + d) * 4
    value += tl.load(history + state + (4 + t - LAG), mask=mask & alive & (is_here == 0), other=0.0)
    value += tl.load(initial + state + (4 - LAG + since), mask=mask & (alive == 0), other=0.0)
    return value, alive, since


@triton.jit
def _window(x, history, initial, is_init, t, b, d, rows, mask, D: tl.constexpr):
    """Return the input of step t, and those of one to three steps before."""
    alive = t >= 0
    here = tl.load(x + (t * rows + b) * D + d, mask=mask & alive, other=0.0)
    one, alive, since = _tap(x, history, initial, is_init, t, b, d, rows, alive, 0, mask, 1, D)
    two, alive, since = _tap(x, history, initial, is_init, t, b, d, rows, alive, since, mask, 2, D)
    three, alive, since = _tap(x, history, initial, is_init, t, b, d, rows, alive, since, mask, 3, D)
    return here, one, two, three


@triton.jit
def _taps(weight, d, mask):
    """Return the weights of an input of this step, and of one to three steps before."""
    at = weight + d * 4
    return (
        tl.load(at + 3, mask=mask, other=0.0),
        tl.load(at + 2, mask=mask, other=0.0),
        tl.load(at + 1, mask=mask, other=0.0),
        tl.load(at, mask=mask, other=0.0),
    )


@triton.jit
def _sum(here, one, two, three, w_0, w_1, w_2, w_3, offset):
    # The oldest input comes first, as in torch's path.
    total = tl.fma(two, w_2, three * w_3)
    total = tl.fma(one, w_1, total)
    return tl.fma(here, w_0, total) + offset


@triton.jit(do_not_specialize=["steps", "rows"])
def forward(
    x, weight, bias, history, initial, is_init, y, last, steps, rows,
    D: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the outputs [T, B, D], and the last four inputs [B, D, 4]."""
    row = tl.program_id(0).to(tl.int64)
    t = row // rows
    b = row % rows
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = d < D
    w_0, w_1, w_2, w_3 = _taps(weight, d, mask)
    offset = 0.0
    if HAS_BIAS:
        offset = tl.load(bias + d, mask=mask, other=0.0)
    here, one, two, three = _window(x, history, initial, is_init, t, b, d, rows, mask, D)
    total = _sum(here, one, two, three, w_0, w_1, w_2, w_3, offset)
    tl.store(y + row * D + d, total * tl.sigmoid(total), mask=mask)
    is_last = mask & (t == steps - 1)
    at = last + (b * D + d) * 4
    tl.store(at, three, mask=is_last)
    tl.store(at + 1, two, mask=is_last)
    tl.store(at + 2, one, mask=is_last)
    tl.store(at + 3, here, mask=is_last)


@triton.jit(do_not_specialize=["steps", "rows"])
def backward(
    x, weight, bias, history, initial, is_init, grad_y, grad_last,
    grad_x, grad_weight, grad_bias, grad_history, grad_initial, steps, rows,
    D: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Write all gradients. Those of weight, bias and initial history have a row for each SPAN of steps."""
    b = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = d < D
    begin = tl.program_id(2) * SPAN
    stop = tl.minimum(begin + SPAN, steps)
    w_0, w_1, w_2, w_3 = _taps(weight, d, mask)
    offset = 0.0
    if HAS_BIAS:
        offset = tl.load(bias + d, mask=mask, other=0.0)
    # back_k is the gradient so far of the input k steps before the step that was just computed.
    first = tl.minimum(stop + 2, steps - 1)
    state = (b * D + d) * 4
    is_end = mask & (first == steps - 1)
    back_1 = tl.load(grad_last + state + 3, mask=is_end, other=0.0)
    back_2 = tl.load(grad_last + state + 2, mask=is_end, other=0.0)
    back_3 = tl.load(grad_last + state + 1, mask=is_end, other=0.0)
    back_4 = tl.load(grad_last + state, mask=is_end, other=0.0)
    zeros = tl.zeros([BLOCK], tl.float32)
    sum_0, sum_1, sum_2, sum_3, sum_bias = zeros, zeros, zeros, zeros, zeros
    initial_1, initial_2, initial_3 = zeros, zeros, zeros
    for s in range(0, first + 1 - begin):
        t = first - s
        row = t * rows + b
        here, one, two, three = _window(x, history, initial, is_init, t, b, d, rows, mask, D)
        total = _sum(here, one, two, three, w_0, w_1, w_2, w_3, offset)
        gate = tl.sigmoid(total)
        grad = tl.load(grad_y + row * D + d, mask=mask, other=0.0) * gate * (1.0 + total * (1.0 - gate))
        is_own = t < stop
        own = tl.where(is_own, grad, 0.0)
        sum_0 += own * here
        sum_1 += own * one
        sum_2 += own * two
        sum_3 += own * three
        sum_bias += own
        tl.store(grad_x + row * D + d, tl.fma(w_0, grad, back_1), mask=mask & is_own)
        back_1 = tl.fma(w_1, grad, back_2)
        back_2 = tl.fma(w_2, grad, back_3)
        back_3 = tl.fma(w_3, grad, back_4)
        back_4 = zeros
        reset = tl.load(is_init + row) != 0
        initial_1 += tl.where(reset & is_own, back_1, 0.0)
        initial_2 += tl.where(reset & is_own, back_2, 0.0)
        initial_3 += tl.where(reset & is_own, back_3, 0.0)
        back_1 = tl.where(reset, 0.0, back_1)
        back_2 = tl.where(reset, 0.0, back_2)
        back_3 = tl.where(reset, 0.0, back_3)
    is_begin = mask & (begin == 0)
    tl.store(grad_history + state, zeros, mask=is_begin)
    tl.store(grad_history + state + 1, back_3, mask=is_begin)
    tl.store(grad_history + state + 2, back_2, mask=is_begin)
    tl.store(grad_history + state + 3, back_1, mask=is_begin)
    of_row = tl.program_id(2) * rows + b
    at = (of_row * D + d) * 4
    tl.store(grad_initial + at, zeros, mask=mask)
    tl.store(grad_initial + at + 1, initial_3, mask=mask)
    tl.store(grad_initial + at + 2, initial_2, mask=mask)
    tl.store(grad_initial + at + 3, initial_1, mask=mask)
    tl.store(grad_weight + at, sum_3, mask=mask)
    tl.store(grad_weight + at + 1, sum_2, mask=mask)
    tl.store(grad_weight + at + 2, sum_1, mask=mask)
    tl.store(grad_weight + at + 3, sum_0, mask=mask)
    tl.store(grad_bias + of_row * D + d, sum_bias, mask=mask)
