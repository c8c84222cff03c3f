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
