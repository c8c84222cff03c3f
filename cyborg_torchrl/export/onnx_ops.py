"""Functions built from ONNX operations, with the relative precision that a slow memory needs.

A memory that lasts for 10,000 steps writes one ten-thousandth of its input at each step. Its read-out is normalised, so
small numbers need the same relative precision as large ones. ONNX has no `expm1` and `log1p`. onnxruntime 1.32 computes
`sigmoid` with an absolute error of 1e-7, which is a relative error of 1e-3 at a value of 1e-4. Its `exp`, `log`, `tanh`
and `softplus` have relative errors below 3e-7.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

aten = torch.ops.aten


def expm1(x: Tensor) -> Tensor:
    """Return exp(x) - 1, without cancellation for small x."""
    return torch.tanh(0.5 * x) * (torch.exp(x) + 1.0)


def log1p(x: Tensor) -> Tensor:
    """Return log(1 + x).

    Source: Kahan's correction. The factor x / (rounded - 1) restores the digits that rounding 1 + x loses.
    """
    rounded = 1.0 + x
    is_lost = rounded == 1.0
    return torch.where(is_lost, x, x * torch.log(rounded) / torch.where(is_lost, 1.0, rounded - 1.0))


def sigmoid(x: Tensor) -> Tensor:
    """Return 1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + torch.exp(-x))


def silu(x: Tensor) -> Tensor:
    """Return x times its sigmoid."""
    return x * sigmoid(x)


def sort_stable(
    x: Tensor, *, stable: bool | None = True, dim: int = -1, descending: bool = False
) -> tuple[Tensor, Tensor]:
    """Sort by ONNX's TopK, which puts the lower index first among equal values, as a stable sort does."""
    del stable
    return torch.topk(x, x.shape[dim], dim=dim, largest=descending, sorted=True)


def cumprod(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """Return cumulative products, by a triangular mask; meant for rows of a few numbers."""
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
"""Replacements of torch's operations in an ONNX file."""
