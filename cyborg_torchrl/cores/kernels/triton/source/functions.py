"""Functions of numbers that several kernels use.

Triton's library of such functions is not used: its interpreter, which tests run without a GPU, does not have it.
"""

import triton
import triton.language as tl


@triton.jit
def expm1_negative(x):
    """Return exp(x) - 1 for x <= 0, with a relative error of at most 1e-7."""
    # Taylor's series where exp(x) - 1 would cancel.
    p = 2.7557319e-6 * x + 2.4801587e-5
    p = p * x + 1.9841270e-4
    p = p * x + 1.3888889e-3
    p = p * x + 8.3333333e-3
    p = p * x + 4.1666667e-2
    p = p * x + 1.6666667e-1
    p = p * x + 0.5
    p = p * x * x + x
    return tl.where(x > -0.5, p, tl.exp(x) - 1.0)


@triton.jit
def tanh(x):
    """Return the hyperbolic tangent, with a relative error near 1e-7."""
    large = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    large = tl.where(x < 0, -large, large)
    # Taylor's series where the difference would cancel.
    s = x * x
    p = 0.021869488 - s * 0.0088632355
    p = 0.13333333 + s * (-0.053968254 + s * p)
    small = x * (1.0 + s * (-0.33333333 + s * p))
    return tl.where(tl.abs(x) < 0.3, small, large)


@triton.jit
def matrix(start, D: tl.constexpr, P: tl.constexpr, FIRST: tl.constexpr, PARTS: tl.constexpr):
    """Return rows FIRST, FIRST + PARTS, ... of a matrix [D, D], padded with zeros to [P / PARTS, P]."""
    i = FIRST + PARTS * tl.arange(0, P // PARTS)[:, None]
    j = tl.arange(0, P)[None, :]
    return tl.load(start + i * D + j, mask=(i < D) & (j < D), other=0.0)


@triton.jit
def halves(x):
    """Return the even and the odd columns of a matrix.

    A product of half the columns needs half the registers. The sum of two such products is the product.
    """
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
