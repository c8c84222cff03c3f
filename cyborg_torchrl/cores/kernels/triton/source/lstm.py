"""The recurrence of `lstm`: whole sequences with resident weights, and the step of wide layers.

Programs are divided as those of `gru`. If only three of the four gates' weights fit into shared memory, the fourth is
read again at each step, from the GPU's cache, in four parts.
"""

import triton
import triton.language as tl

from .functions import halves, matrix, tanh


@triton.jit
def _product_in_parts(x, weight, total, D: tl.constexpr, P: tl.constexpr):
    """Return total + x W, where W is read from memory, a quarter of its rows at a time."""
    even, odd = halves(x)
    part_0, part_2 = halves(even)
    part_1, part_3 = halves(odd)
    total = tl.dot(part_0, matrix(weight, D, P, 0, 4), total, input_precision="ieee")
    total = tl.dot(part_1, matrix(weight, D, P, 1, 4), total, input_precision="ieee")
    total = tl.dot(part_2, matrix(weight, D, P, 2, 4), total, input_precision="ieee")
    return tl.dot(part_3, matrix(weight, D, P, 3, 4), total, input_precision="ieee")


@triton.jit(do_not_specialize=["steps", "rows"])
def forward(
    gates_x, weight_t, h_0, c_0, initial_h, initial_c, is_init, hidden, cell, gates, previous_h, steps, rows,
    D: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, IS_WHOLE: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """Write hidden and cell states [T, B, D]; and for the gradient the gates, and the hidden state before each step.

    `weight_t` [4, D, D] has the transposed blocks of the weight. With IS_WHOLE all of them stay in shared memory.
    """
    b = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    is_row = b < rows
    j = tl.arange(0, P)[None, :]
    mask = is_row[:, None] & (j < D)
    of_state = b[:, None] * D + j
    h = tl.load(h_0 + of_state, mask=mask, other=0.0)
    c = tl.load(c_0 + of_state, mask=mask, other=0.0)
    even_i = matrix(weight_t, D, P, 0, 2)
    even_f = matrix(weight_t + D * D, D, P, 0, 2)
    even_g = matrix(weight_t + 2 * D * D, D, P, 0, 2)
    odd_i = matrix(weight_t, D, P, 1, 2)
    odd_f = matrix(weight_t + D * D, D, P, 1, 2)
    odd_g = matrix(weight_t + 2 * D * D, D, P, 1, 2)
    w_o = weight_t + 3 * D * D
    if IS_WHOLE:
        even_o = matrix(w_o, D, P, 0, 2)
        odd_o = matrix(w_o, D, P, 1, 2)
    reset = tl.load(is_init + b, mask=is_row, other=0) != 0
    for t in range(steps):
        row = t * rows + b
        at = row[:, None]
        # Loads come before the products that hide their latency. The reset is needed first: it is loaded a step ahead.
        x = gates_x + at * (4 * D) + j
        x_i = tl.load(x, mask=mask, other=0.0)
        x_f = tl.load(x + D, mask=mask, other=0.0)
        x_g = tl.load(x + 2 * D, mask=mask, other=0.0)
        x_o = tl.load(x + 3 * D, mask=mask, other=0.0)
        is_new = reset[:, None]
        h = tl.where(is_new, tl.load(initial_h + of_state, mask=mask & is_new, other=0.0), h)
        c = tl.where(is_new, tl.load(initial_c + of_state, mask=mask & is_new, other=0.0), c)
        reset = tl.load(is_init + row + rows, mask=is_row & (t + 1 < steps), other=0) != 0
        if SAVE:
            tl.store(previous_h + at * D + j, h, mask=mask)
        even, odd = halves(h)
        h_i = tl.dot(even, even_i, input_precision="ieee")
        h_f = tl.dot(even, even_f, input_precision="ieee")
        h_g = tl.dot(even, even_g, input_precision="ieee")
        if IS_WHOLE:
            h_o = tl.dot(even, even_o, input_precision="ieee")
        h_i = tl.dot(odd, odd_i, h_i, input_precision="ieee")
        h_f = tl.dot(odd, odd_f, h_f, input_precision="ieee")
        h_g = tl.dot(odd, odd_g, h_g, input_precision="ieee")
        if IS_WHOLE:
            h_o = tl.dot(odd, odd_o, h_o, input_precision="ieee")
        else:
            h_o = _product_in_parts(h, w_o, tl.zeros([ROWS, P], tl.float32), D, P)
        i = tl.sigmoid(x_i + h_i)
        f = tl.sigmoid(x_f + h_f)
        g = tanh(x_g + h_g)
        o = tl.sigmoid(x_o + h_o)
        # Explicit: a compiler may fuse either of the two products, and another one for acting than for training.
        c = tl.fma(f, c, i * g)
        h = o * tanh(c)
        tl.store(hidden + at * D + j, h, mask=mask)
        tl.store(cell + at * D + j, c, mask=mask)
        if SAVE:
            kept = gates + at * (4 * D) + j
            tl.store(kept, i, mask=mask)
            tl.store(kept + D, f, mask=mask)
            tl.store(kept + 2 * D, g, mask=mask)
            tl.store(kept + 3 * D, o, mask=mask)


@triton.jit
def _gate_gradients(grad_h, grad_c, i, f, g, o, c, before):
    """Return the gradients of the pre-activations of i, f, g and o, and of the cell state before the step."""
    c_tanh = tanh(c)
    grad_c += grad_h * o * (1.0 - c_tanh * c_tanh)
    grad_o = grad_h * c_tanh * o * (1.0 - o)
    grad_i = grad_c * g * i * (1.0 - i)
    grad_f = grad_c * before * f * (1.0 - f)
    return grad_i, grad_f, grad_c * i * (1.0 - g * g), grad_o, grad_c * f


@triton.jit
def _saved(gates, cell, grad_hidden, grad_cell, row, j, mask, D: tl.constexpr):
    """Return the gates of a step, its cell state, and the gradients of its states."""
    at = row[:, None]
    kept = gates + at * (4 * D) + j
    return (
        tl.load(kept, mask=mask, other=0.0),
        tl.load(kept + D, mask=mask, other=0.0),
        tl.load(kept + 2 * D, mask=mask, other=0.0),
        tl.load(kept + 3 * D, mask=mask, other=0.0),
        tl.load(cell + at * D + j, mask=mask, other=0.0),
        tl.load(grad_hidden + at * D + j, mask=mask, other=0.0),
        tl.load(grad_cell + at * D + j, mask=mask, other=0.0),
    )


@triton.jit(do_not_specialize=["steps", "rows"])
def backward(
    weight, c_0, initial_c, is_init, cell, gates, grad_hidden, grad_cell,
    grad_gates, grad_h_0, grad_c_0, grad_initial_h, grad_initial_c, steps, rows,
    D: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, IS_WHOLE: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the gates [T, B, 4 D], and of the stored and the initial states."""
    b = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    is_row = b < rows
    j = tl.arange(0, P)[None, :]
    mask = is_row[:, None] & (j < D)
    of_state = b[:, None] * D + j
    w_i = matrix(weight, D, P, 0, 1)
    w_f = matrix(weight + D * D, D, P, 0, 1)
    w_g = matrix(weight + 2 * D * D, D, P, 0, 1)
    w_o = weight + 3 * D * D
    if IS_WHOLE:
        whole_o = matrix(w_o, D, P, 0, 1)
    carry_h = tl.zeros([ROWS, P], tl.float32)
    carry_c = tl.zeros([ROWS, P], tl.float32)
    sum_h = tl.zeros([ROWS, P], tl.float32)
    sum_c = tl.zeros([ROWS, P], tl.float32)
    i, f, g, o, c, grad_h, grad_c = _saved(gates, cell, grad_hidden, grad_cell, (steps - 1) * rows + b, j, mask, D)
    for s in range(steps):
        t = steps - 1 - s
        row = t * rows + b
        at = row[:, None]
        reset = (tl.load(is_init + row, mask=is_row, other=0) != 0)[:, None]
        # The loads of the step before are hidden by the products of this one. They bring its cell state, too.
        next_i, next_f, next_g, next_o, next_c, next_grad_h, next_grad_c = _saved(
            gates, cell, grad_hidden, grad_cell, row - rows, j, mask & (t > 0), D
        )
        is_stored = (t == 0) & (reset == 0)
        before = tl.where(is_stored, tl.load(c_0 + of_state, mask=mask & is_stored, other=0.0), next_c)
        before = tl.where(reset, tl.load(initial_c + of_state, mask=mask & reset, other=0.0), before)
        grad_i, grad_f, grad_g, grad_o, back_c = _gate_gradients(
            grad_h + carry_h, grad_c + carry_c, i, f, g, o, c, before
        )
        of_gates = grad_gates + at * (4 * D) + j
        tl.store(of_gates, grad_i, mask=mask)
        tl.store(of_gates + D, grad_f, mask=mask)
        tl.store(of_gates + 2 * D, grad_g, mask=mask)
        tl.store(of_gates + 3 * D, grad_o, mask=mask)
        back_h = tl.dot(grad_i, w_i, input_precision="ieee")
        back_h = tl.dot(grad_f, w_f, back_h, input_precision="ieee")
        back_h = tl.dot(grad_g, w_g, back_h, input_precision="ieee")
        if IS_WHOLE:
            back_h = tl.dot(grad_o, whole_o, back_h, input_precision="ieee")
        else:
            back_h = _product_in_parts(grad_o, w_o, back_h, D, P)
        sum_h += tl.where(reset, back_h, 0.0)
        sum_c += tl.where(reset, back_c, 0.0)
        carry_h = tl.where(reset, 0.0, back_h)
        carry_c = tl.where(reset, 0.0, back_c)
        i, f, g, o = next_i, next_f, next_g, next_o
        c, grad_h, grad_c = next_c, next_grad_h, next_grad_c
    tl.store(grad_h_0 + of_state, carry_h, mask=mask)
    tl.store(grad_c_0 + of_state, carry_c, mask=mask)
    tl.store(grad_initial_h + of_state, sum_h, mask=mask)
    tl.store(grad_initial_c + of_state, sum_c, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def step(
    sums, c_before, initial_h, initial_c, next_init, hidden, cell, next_h, next_c, gates, rows,
    D: tl.constexpr, BLOCK: tl.constexpr, HAS_NEXT: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """Write the states after one step, given the sums of both parts of its gates, and those before the next step."""
    e = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    b = e // D
    mask = b < rows
    at = b * (4 * D) + e % D
    i = tl.sigmoid(tl.load(sums + at, mask=mask, other=0.0))
    f = tl.sigmoid(tl.load(sums + at + D, mask=mask, other=0.0))
    g = tanh(tl.load(sums + at + 2 * D, mask=mask, other=0.0))
    o = tl.sigmoid(tl.load(sums + at + 3 * D, mask=mask, other=0.0))
    if SAVE:
        tl.store(gates + at, i, mask=mask)
        tl.store(gates + at + D, f, mask=mask)
        tl.store(gates + at + 2 * D, g, mask=mask)
        tl.store(gates + at + 3 * D, o, mask=mask)
    c = tl.fma(f, tl.load(c_before + e, mask=mask, other=0.0), i * g)
    h = o * tanh(c)
    tl.store(hidden + e, h, mask=mask)
    tl.store(cell + e, c, mask=mask)
    if HAS_NEXT:
        reset = tl.load(next_init + b, mask=mask, other=0) != 0
        tl.store(next_h + e, tl.where(reset, tl.load(initial_h + e, mask=mask, other=0.0), h), mask=mask)
        tl.store(next_c + e, tl.where(reset, tl.load(initial_c + e, mask=mask, other=0.0), c), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def step_backward(
    gates, cell, c_before, grad_hidden, grad_cell, back_h, next_init,
    grad_gates, back_c, grad_initial_h, grad_initial_c, rows,
    D: tl.constexpr, BLOCK: tl.constexpr, HAS_NEXT: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one step's gates, and of the cell state before it.

    `back_h` and `back_c` are gradients of the states before the next step. If an episode begins there, they are those
    of the initial states.
    """
    e = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    b = e // D
    mask = b < rows
    grad_h = tl.load(grad_hidden + e, mask=mask, other=0.0)
    grad_c = tl.load(grad_cell + e, mask=mask, other=0.0)
    if HAS_NEXT:
        reset = tl.load(next_init + b, mask=mask, other=0) != 0
        carry_h = tl.load(back_h + e, mask=mask, other=0.0)
        carry_c = tl.load(back_c + e, mask=mask, other=0.0)
        sum_h = tl.load(grad_initial_h + e, mask=mask, other=0.0)
        sum_c = tl.load(grad_initial_c + e, mask=mask, other=0.0)
        tl.store(grad_initial_h + e, sum_h + tl.where(reset, carry_h, 0.0), mask=mask)
        tl.store(grad_initial_c + e, sum_c + tl.where(reset, carry_c, 0.0), mask=mask)
        grad_h += tl.where(reset, 0.0, carry_h)
        grad_c += tl.where(reset, 0.0, carry_c)
    at = b * (4 * D) + e % D
    i = tl.load(gates + at, mask=mask, other=0.0)
    f = tl.load(gates + at + D, mask=mask, other=0.0)
    g = tl.load(gates + at + 2 * D, mask=mask, other=0.0)
    o = tl.load(gates + at + 3 * D, mask=mask, other=0.0)
    c = tl.load(cell + e, mask=mask, other=0.0)
    before = tl.load(c_before + e, mask=mask, other=0.0)
    grad_i, grad_f, grad_g, grad_o, passed = _gate_gradients(grad_h, grad_c, i, f, g, o, c, before)
    tl.store(grad_gates + at, grad_i, mask=mask)
    tl.store(grad_gates + at + D, grad_f, mask=mask)
    tl.store(grad_gates + at + 2 * D, grad_g, mask=mask)
    tl.store(grad_gates + at + 3 * D, grad_o, mask=mask)
    tl.store(back_c + e, passed, mask=mask)
