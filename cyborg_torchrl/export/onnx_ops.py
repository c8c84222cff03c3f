"""Functions in terms of ONNX's operations, exact where a slow memory needs it.

A memory that lasts for 10,000 steps writes a ten-thousandth of what it sees at each, and its read-out is normalised
until that is as loud as everything else: small numbers need the same relative precision as large ones. ONNX has no
`expm1` and `log1p`, and onnxruntime 1.32 computes `sigmoid` to an absolute error of 1e-7, which is a relative one of
1e-3 where it is 1e-4. (Its `exp`, `log`, `tanh` and `softplus` have relative errors below 3e-7.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

aten = torch.ops.aten


def expm1(x: Tensor) -> Tensor:
    """exp(x) - 1, of which nothing cancels where x is small."""
    return torch.tanh(0.5 * x) * (torch.exp(x) + 1.0)


def log1p(x: Tensor) -> Tensor:
    """log(1 + x).

    Source: Kahan's correction: what rounding 1 + x loses is given back by the factor x / (rounded - 1).
    """
    rounded = 1.0 + x
    is_lost = rounded == 1.0
    return torch.where(is_lost, x, x * torch.log(rounded) / torch.where(is_lost, 1.0, rounded - 1.0))


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + torch.exp(-x))


def silu(x: Tensor) -> Tensor:
    """The product of x and its sigmoid."""
    return x * sigmoid(x)


def sort_stable(
    x: Tensor, *, stable: bool | None = True, dim: int = -1, descending: bool = False
) -> tuple[Tensor, Tensor]:
    """ONNX's TopK puts the lower index first among equals: as a stable sort does."""
    del stable
    return torch.topk(x, x.shape[dim], dim=dim, largest=descending, sorted=True)


def cumprod(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """Products of all up to each, by a triangle of ones: for rows of a few numbers."""
    rows = (x if dtype is None else x.to(dtype)).movedim(dim, -1)
    size = rows.shape[-1]
    is_before = torch.ones(size, size, dtype=torch.bool).tril()
    return torch.where(is_before, rows.unsqueeze(-2), 1.0).prod(-1).movedim(-1, dim)


ACCURATE: dict[torch._ops.OperatorBase, Callable[..., object]] = {
    aten.cumprod.default: cumprod,
    aten.expm1.default: expm1,
    aten.log1p.default: log1p,
    aten.sigmoid.default: sigmoid,
    aten.silu.default: silu,
    aten.sort.stable: sort_stable,
}
"""What stands for torch's operations in an ONNX file."""
