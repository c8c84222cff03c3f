"""Functions in terms of ONNX's operations: relative errors against double precision."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cyborg_torchrl.export import onnx_ops as accurate

SIZES = torch.logspace(-7, 1.9, 400)
BOTH = torch.cat([-SIZES.flip(0), torch.zeros(1), SIZES])


@pytest.mark.parametrize(
    ("ours", "reference", "x"),
    [
        (accurate.expm1, torch.expm1, BOTH[BOTH < 80]),
        (accurate.log1p, torch.log1p, BOTH[BOTH > -0.9]),
        (accurate.sigmoid, torch.sigmoid, BOTH),
        (accurate.silu, F.silu, BOTH),
    ],
    ids=["expm1", "log1p", "sigmoid", "silu"],
)
def test_relative_errors(ours: Callable[[Tensor], Tensor], reference: Callable[[Tensor], Tensor], x: Tensor) -> None:
    expected = reference(x.double())
    is_normal = expected.abs() > 1e-30
    torch.testing.assert_close(ours(x)[is_normal].double(), expected[is_normal], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(ours(x).double(), expected, rtol=1e-6, atol=1e-30)


def test_sort_is_stable() -> None:
    x = torch.tensor([[2.0, 0.0, 1.0, 0.0, 2.0, 0.0]])
    values, order = accurate.sort_stable(x)
    assert values.tolist() == [[0.0, 0.0, 0.0, 1.0, 2.0, 2.0]]
    assert sorted(order[0, :3].tolist()) == [1, 3, 5]


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_cumprod(dim: int) -> None:
    x = torch.rand(5, 6)
    torch.testing.assert_close(accurate.cumprod(x, dim), x.cumprod(dim))
