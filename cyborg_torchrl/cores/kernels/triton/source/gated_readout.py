"""The read-out of the Mamba family, forward and backward: (norm(y) + skip u) silu(z).

Tiles are those of the norm. A program of the backward pass computes several of them, to sum the gradient of `skip`.
"""

import triton
import triton.language as tl

from .group_norm import factors


@triton.jit
def _place(tile, rows, COUNT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, channel):
    """Return the offsets of a tile and its mask, without that of the channels."""
    row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]
    return row * (COUNT * WIDTH) + channel, row < rows


@triton.jit
def _channels(COUNT: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    group = tl.arange(0, GROUPS)[None, :, None]
    member = tl.arange(0, SIZE)[None, None, :]
    return group * WIDTH + member, (group < COUNT) & (member < WIDTH)


@triton.jit(do_not_specialize=["rows"])
def forward(
    y, u, z, skip, scales, out, rows, eps,
    COUNT: tl.constexpr, WIDTH: tl.constexpr, HAS_NORM: tl.constexpr, HAS_SCALES: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Write the gated read-out of rows [R, D]. D is COUNT groups of WIDTH channels."""
    channel, is_channel = _channels(COUNT, WIDTH, GROUPS, SIZE)
    at, is_row = _place(tl.program_id(0), rows, COUNT, WIDTH, ROWS, channel)
    mask = is_channel & is_row
    total = tl.load(y + at, mask=mask, other=0.0)
    if HAS_NORM:
        scale = 1.0
        if HAS_SCALES:
            scale = tl.load(scales + channel, mask=is_channel, other=0.0)
        total = total * factors(total, scale, eps, WIDTH)
    total = tl.load(u + at, mask=mask, other=0.0) * tl.load(skip + channel, mask=is_channel, other=0.0) + total
    z_r = tl.load(z + at, mask=mask, other=0.0)
    tl.store(out + at, total * z_r * tl.sigmoid(z_r), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def backward(
    y, u, z, skip, grad_out, scales, grad_y, grad_u, grad_z, grad_skip, rows, eps,
    COUNT: tl.constexpr, WIDTH: tl.constexpr, HAS_NORM: tl.constexpr, HAS_SCALES: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Write all gradients. `grad_skip` [programs, D] is to be summed."""
    channel, is_channel = _channels(COUNT, WIDTH, GROUPS, SIZE)
    skip_d = tl.load(skip + channel, mask=is_channel, other=0.0)
    scale = 1.0
    if HAS_SCALES:
        scale = tl.load(scales + channel, mask=is_channel, other=0.0)
    sum_skip = tl.zeros([ROWS, GROUPS, SIZE], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        at, is_row = _place(tile, rows, COUNT, WIDTH, ROWS, channel)
        mask = is_channel & is_row
        normed = tl.load(y + at, mask=mask, other=0.0)
        u_r = tl.load(u + at, mask=mask, other=0.0)
        z_r = tl.load(z + at, mask=mask, other=0.0)
        grad = tl.load(grad_out + at, mask=mask, other=0.0)
        if HAS_NORM:
            factor = factors(normed, scale, eps, WIDTH)
            normed = normed * factor
        gate = tl.sigmoid(z_r)
        grad_total = grad * (z_r * gate)
        slope = gate * (1.0 + z_r * (1.0 - gate))
        tl.store(grad_z + at, grad * (u_r * skip_d + normed) * slope, mask=mask)
        tl.store(grad_u + at, grad_total * skip_d, mask=mask)
        sum_skip += grad_total * u_r
        if HAS_NORM:
            mean = tl.expand_dims(tl.sum(grad_total * normed, 2), 2) / WIDTH
            grad_total = (grad_total - normed * mean) * factor
        tl.store(grad_y + at, grad_total, mask=mask)
    of_skip = grad_skip + tl.program_id(0) * (COUNT * WIDTH) + channel
    tl.store(of_skip, tl.expand_dims(tl.sum(sum_skip, 0), 0), mask=is_channel)
