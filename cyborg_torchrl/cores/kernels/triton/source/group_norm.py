"""The norm over groups of channels, forward and backward.

A program normalises ROWS rows. A tile is [ROWS, GROUPS, SIZE], padded to powers of two, so a group is one of its lines.
"""

import triton
import triton.language as tl


@triton.jit
def _place(
    rows, COUNT: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Return the offsets in a row and in all rows, and the masks of both."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]
    group = tl.arange(0, GROUPS)[None, :, None]
    member = tl.arange(0, SIZE)[None, None, :]
    channel = group * WIDTH + member
    is_channel = (group < COUNT) & (member < WIDTH)
    return channel, row * (COUNT * WIDTH) + channel, is_channel, is_channel & (row < rows)


@triton.jit
def factors(x, scale, EPS, WIDTH: tl.constexpr):
    """Return the factor of each channel. It is zero for a group that is exactly zero."""
    scaled = x * scale
    mean_square = tl.expand_dims(tl.sum(scaled * scaled, 2), 2) / WIDTH
    return scale * tl.where(mean_square == 0.0, 0.0, tl.rsqrt(mean_square + EPS))


@triton.jit(do_not_specialize=["rows"])
def forward(
    x, scales, y, rows, eps, COUNT: tl.constexpr, WIDTH: tl.constexpr, HAS_SCALES: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Write the normalised rows [R, D]. D is COUNT groups of WIDTH channels."""
    channel, at, is_channel, is_inside = _place(rows, COUNT, WIDTH, ROWS, GROUPS, SIZE)
    x_r = tl.load(x + at, mask=is_inside, other=0.0)
    scale = 1.0
    if HAS_SCALES:
        scale = tl.load(scales + channel, mask=is_channel, other=0.0)
    tl.store(y + at, x_r * factors(x_r, scale, eps, WIDTH), mask=is_inside)


@triton.jit(do_not_specialize=["rows"])
def backward(
    x, grad_y, scales, grad_x, rows, eps, COUNT: tl.constexpr, WIDTH: tl.constexpr, HAS_SCALES: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Write the gradient of x, f (g - y mean(g y)), where f is the factor of the forward pass."""
    channel, at, is_channel, is_inside = _place(rows, COUNT, WIDTH, ROWS, GROUPS, SIZE)
    x_r = tl.load(x + at, mask=is_inside, other=0.0)
    grad = tl.load(grad_y + at, mask=is_inside, other=0.0)
    scale = 1.0
    if HAS_SCALES:
        scale = tl.load(scales + channel, mask=is_channel, other=0.0)
    factor = factors(x_r, scale, eps, WIDTH)
    y_r = x_r * factor
    mean = tl.expand_dims(tl.sum(grad * y_r, 2), 2) / WIDTH
    tl.store(grad_x + at, (grad - y_r * mean) * factor, mask=is_inside)
