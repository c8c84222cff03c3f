"""Reads from a memory while acting have the digits of double precision."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from cyborg_torchrl.cores.kernels import memory_read
from cyborg_torchrl.cores.kernels.memory_read import read_memory
from cyborg_torchrl.cores.kernels.native import IS_BUILT


def cancelling(numbers: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return a memory and a query whose products nearly cancel, and their exact sum, computed with fractions."""
    generator = torch.Generator().manual_seed(0)
    memory = torch.randn(3, 40, numbers, generator=generator).to(dtype)
    query = torch.randn(3, numbers, generator=generator).to(dtype)
    others = torch.matmul(memory[..., 1:].double(), query[:, 1:].double().unsqueeze(-1)).squeeze(-1)
    memory[..., 0] = (-others / query[:, :1].double() * (1 + 1e-4)).to(dtype)
    exact = [
        [
            sum(Fraction(h) * Fraction(c) for h, c in zip(row, by, strict=True))
            for row in rows
        ]
        for rows, by in zip(memory.tolist(), query.tolist(), strict=True)
    ]  # fmt: skip
    return memory, query, torch.tensor([[float(each) for each in row] for row in exact], dtype=torch.float64)


def relative(value: Tensor, reference: Tensor) -> float:
    return float(((value.double() - reference) / reference).abs().max())


@pytest.mark.parametrize("is_built", [pytest.param(True, marks=pytest.mark.skipif(not IS_BUILT, reason="C++")), False])
@pytest.mark.parametrize("numbers", [2, 5, 16, 64])
def test_products_that_cancel(numbers: int, is_built: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_built:
        monkeypatch.setattr(memory_read, "is_native", lambda tensor: False)
    memory, query, exact = cancelling(numbers)
    with torch.no_grad():
        assert relative(read_memory(memory, query), exact) < 1e-7
        assert relative(read_memory(memory.transpose(0, 1).contiguous().transpose(0, 1), query), exact) < 1e-7
    assert relative(torch.matmul(memory, query.unsqueeze(-1)).squeeze(-1), exact) > 1e-5, "it is needed"


@pytest.mark.skipif(not IS_BUILT, reason="nothing is built in C++ here")
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_and_double_precision(threads: int) -> None:
    memory, query, _ = cancelling(16, torch.float64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = read_memory(memory, query)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found, torch.einsum("bdn,bn->bd", memory, query))


def test_gradients_are_those_of_a_product() -> None:
    memory, query, _ = cancelling(16)
    leaves = [memory.requires_grad_(), query.requires_grad_()]
    weights = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((read_memory(memory, query) * weights).sum(), leaves)
    torch.testing.assert_close(found[0], weights.unsqueeze(-1) * query.detach().unsqueeze(1))
    torch.testing.assert_close(found[1], (weights.unsqueeze(-1) * memory.detach()).sum(1))
