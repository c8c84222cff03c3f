"""The recurrence of `gru`: whole sequences with resident weights, and the step of wide layers.

A program of `forward` or `backward` computes all steps of ROWS environments. The weights stay in shared memory. P is
the size of the state D, padded to a power of two. The sums of `tl.dot` run over the state in order and in float32,
so a row's result does not depend on the other rows.
"""

import triton
import triton.language as tl

from .functions import halves, matrix, tanh


@triton.jit(do_not_specialize=["steps", "rows"])
def forward(
    gates_x, weight_t, bias, h_0, initial, is_init, states, kept, previous, steps, rows,
    D: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """Write the states [T, B, D]; and for the gradient r, u, n and W_n h + b_n, and the state before each step.

    `weight_t` [3, D, D] has the transposed blocks of the weight.
    """
    b = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    is_row = b < rows
    j = tl.arange(0, P)[None, :]
    mask = is_row[:, None] & (j < D)
    of_state = b[:, None] * D + j
    h = tl.load(h_0 + of_state, mask=mask, other=0.0)
    first = tl.load(initial + of_state, mask=mask, other=0.0)
    even_r = matrix(weight_t, D, P, 0, 2)
    even_u = matrix(weight_t + D * D, D, P, 0, 2)
    even_n = matrix(weight_t + 2 * D * D, D, P, 0, 2)
    odd_r = matrix(weight_t, D, P, 1, 2)
    odd_u = matrix(weight_t + D * D, D, P, 1, 2)
    odd_n = matrix(weight_t + 2 * D * D, D, P, 1, 2)
    b_r = tl.load(bias + j, mask=j < D, other=0.0)
    b_u = tl.load(bias + D + j, mask=j < D, other=0.0)
    b_n = tl.load(bias + 2 * D + j, mask=j < D, other=0.0)
    reset = tl.load(is_init + b, mask=is_row, other=0) != 0
    for t in range(steps):
        row = t * rows + b
        # Loads come before the products that hide their latency. The reset is needed first: it is loaded a step ahead.
        x = gates_x + row[:, None] * (3 * D) + j
        x_r = tl.load(x, mask=mask, other=0.0)
        x_u = tl.load(x + D, mask=mask, other=0.0)
        x_n = tl.load(x + 2 * D, mask=mask, other=0.0)
        h = tl.where(reset[:, None], first, h)
        reset = tl.load(is_init + row + rows, mask=is_row & (t + 1 < steps), other=0) != 0
        even, odd = halves(h)
        h_r = tl.dot(even, even_r, input_precision="ieee")
        h_u = tl.dot(even, even_u, input_precision="ieee")
        h_n = tl.dot(even, even_n, input_precision="ieee")
        h_r = tl.dot(odd, odd_r, h_r, input_precision="ieee")
        h_u = tl.dot(odd, odd_u, h_u, input_precision="ieee")
        h_n = tl.dot(odd, odd_n, h_n, input_precision="ieee") + b_n
        r = tl.sigmoid(x_r + (h_r + b_r))
        u = tl.sigmoid(x_u + (h_u + b_u))
        n = tanh(x_n + r * h_n)
        at = row[:, None]
        if SAVE:
            tl.store(previous + at * D + j, h, mask=mask)
            gates = kept + at * (4 * D) + j
            tl.store(gates, r, mask=mask)
            tl.store(gates + D, u, mask=mask)
            tl.store(gates + 2 * D, n, mask=mask)
            tl.store(gates + 3 * D, h_n, mask=mask)
        h = tl.fma(u, n - h, h)
        tl.store(states + at * D + j, h, mask=mask)


@triton.jit
def _gate_gradients(grad, r, u, n, h_n, before):
    """Return the gradients of the pre-activations of r, u and n, and of the state's part of n."""
    grad_n = grad * u * (1.0 - n * n)
    return grad_n * h_n * r * (1.0 - r), grad * (n - before) * u * (1.0 - u), grad_n, grad_n * r


@triton.jit
def _saved(kept, previous, grad_states, is_init, row, j, is_row, mask, D: tl.constexpr):
    """Return the gates of a step, the state before it, the gradient of its state, and if an episode begins."""
    at = row[:, None]
    gates = kept + at * (4 * D) + j
    return (
        tl.load(gates, mask=mask, other=0.0),
        tl.load(gates + D, mask=mask, other=0.0),
        tl.load(gates + 2 * D, mask=mask, other=0.0),
        tl.load(gates + 3 * D, mask=mask, other=0.0),
        tl.load(previous + at * D + j, mask=mask, other=0.0),
        tl.load(grad_states + at * D + j, mask=mask, other=0.0),
        (tl.load(is_init + row, mask=is_row, other=0) != 0)[:, None],
    )


@triton.jit(do_not_specialize=["steps", "rows"])
def backward(
    weight, is_init, kept, previous, grad_states, grad_gates_x, grad_gates_h, grad_h_0, grad_initial, steps, rows,
    D: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write the gradients of both parts of the gates [T, B, 3 D], and of the stored and the initial state."""
    b = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    is_row = b < rows
    j = tl.arange(0, P)[None, :]
    mask = is_row[:, None] & (j < D)
    w_r = matrix(weight, D, P, 0, 1)
    w_u = matrix(weight + D * D, D, P, 0, 1)
    w_n = matrix(weight + 2 * D * D, D, P, 0, 1)
    carry = tl.zeros([ROWS, P], tl.float32)
    sum_initial = tl.zeros([ROWS, P], tl.float32)
    r, u, n, h_n, before, grad, reset = _saved(
        kept, previous, grad_states, is_init, (steps - 1) * rows + b, j, is_row, mask, D
    )
    for s in range(steps):
        row = (steps - 1 - s) * rows + b
        at = row[:, None]
        # The loads of the step before are hidden by the products of this one.
        is_next = s + 1 < steps
        next_r, next_u, next_n, next_h_n, next_before, next_grad, next_reset = _saved(
            kept, previous, grad_states, is_init, row - rows, j, is_row & is_next, mask & is_next, D
        )
        grad += carry
        grad_r, grad_u, grad_n, grad_h_n = _gate_gradients(grad, r, u, n, h_n, before)
        of_x = grad_gates_x + at * (3 * D) + j
        tl.store(of_x, grad_r, mask=mask)
        tl.store(of_x + D, grad_u, mask=mask)
        tl.store(of_x + 2 * D, grad_n, mask=mask)
        of_h = grad_gates_h + at * (3 * D) + j
        tl.store(of_h, grad_r, mask=mask)
        tl.store(of_h + D, grad_u, mask=mask)
        tl.store(of_h + 2 * D, grad_h_n, mask=mask)
        back = tl.dot(grad_r, w_r, grad * (1.0 - u), input_precision="ieee")
        back = tl.dot(grad_u, w_u, back, input_precision="ieee")
        back = tl.dot(grad_h_n, w_n, back, input_precision="ieee")
        sum_initial += tl.where(reset, back, 0.0)
        carry = tl.where(reset, 0.0, back)
        r, u, n, h_n = next_r, next_u, next_n, next_h_n
        before, grad, reset = next_before, next_grad, next_reset
    of_state = b[:, None] * D + j
    tl.store(grad_h_0 + of_state, carry, mask=mask)
    tl.store(grad_initial + of_state, sum_initial, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def step(
    gates_x, gates_h, before, initial, next_init, state, next_before, kept, rows,
    D: tl.constexpr, BLOCK: tl.constexpr, HAS_NEXT: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """Write the state after one step, given both parts of its gates, and the state before the next step."""
    e = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    b = e // D
    j = e % D
    mask = b < rows
    at = b * (3 * D) + j
    h = tl.load(before + e, mask=mask, other=0.0)
    r = tl.sigmoid(tl.load(gates_x + at, mask=mask, other=0.0) + tl.load(gates_h + at, mask=mask, other=0.0))
    u = tl.sigmoid(tl.load(gates_x + at + D, mask=mask, other=0.0) + tl.load(gates_h + at + D, mask=mask, other=0.0))
    h_n = tl.load(gates_h + at + 2 * D, mask=mask, other=0.0)
    n = tanh(tl.load(gates_x + at + 2 * D, mask=mask, other=0.0) + r * h_n)
    if SAVE:
        gates = kept + b * (4 * D) + j
        tl.store(gates, r, mask=mask)
        tl.store(gates + D, u, mask=mask)
        tl.store(gates + 2 * D, n, mask=mask)
        tl.store(gates + 3 * D, h_n, mask=mask)
    h = tl.fma(u, n - h, h)
    tl.store(state + e, h, mask=mask)
    if HAS_NEXT:
        reset = tl.load(next_init + b, mask=mask, other=0) != 0
        tl.store(next_before + e, tl.where(reset, tl.load(initial + e, mask=mask, other=0.0), h), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def step_backward(
    kept, before, grad_state, back, next_init, grad_gates_x, grad_gates_h, passed, grad_initial, rows,
    D: tl.constexpr, BLOCK: tl.constexpr, HAS_NEXT: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one step's gates, and the part of the state's gradient that passes the update gate.

    `back` is the gradient of the state before the next step. If an episode begins there, it is that of `initial`.
    """
    e = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    b = e // D
    j = e % D
    mask = b < rows
    grad = tl.load(grad_state + e, mask=mask, other=0.0)
    if HAS_NEXT:
        reset = tl.load(next_init + b, mask=mask, other=0) != 0
        carried = tl.load(back + e, mask=mask, other=0.0)
        summed = tl.load(grad_initial + e, mask=mask, other=0.0)
        tl.store(grad_initial + e, summed + tl.where(reset, carried, 0.0), mask=mask)
        grad += tl.where(reset, 0.0, carried)
    gates = kept + b * (4 * D) + j
    r = tl.load(gates, mask=mask, other=0.0)
    u = tl.load(gates + D, mask=mask, other=0.0)
    n = tl.load(gates + 2 * D, mask=mask, other=0.0)
    h_n = tl.load(gates + 3 * D, mask=mask, other=0.0)
    h = tl.load(before + e, mask=mask, other=0.0)
    grad_r, grad_u, grad_n, grad_h_n = _gate_gradients(grad, r, u, n, h_n, h)
    at = b * (3 * D) + j
    tl.store(grad_gates_x + at, grad_r, mask=mask)
    tl.store(grad_gates_x + at + D, grad_u, mask=mask)
    tl.store(grad_gates_x + at + 2 * D, grad_n, mask=mask)
    tl.store(grad_gates_h + at, grad_r, mask=mask)
    tl.store(grad_gates_h + at + D, grad_u, mask=mask)
    tl.store(grad_gates_h + at + 2 * D, grad_h_n, mask=mask)
    tl.store(passed + e, grad * (1.0 - u), mask=mask)
