"""The choice of the slots of the external memory to write next."""

from __future__ import annotations

import torch

from cyborg_torchrl.cores.pmm import _allocate


def test_weights() -> None:
    usage = torch.tensor([[0.5, 0.25, 1.0, 0.75]])
    # the least used slot: 1 - 0.25; then (1 - 0.5) 0.25, (1 - 0.75) 0.25 0.5, and zero for a full slot
    torch.testing.assert_close(_allocate(usage), torch.tensor([[0.125, 0.75, 0.0, 0.03125]]))


def test_equal_slots_stay_equal() -> None:
    usage = torch.full((1, 10), 1e-3)
    weights = _allocate(usage)
    torch.testing.assert_close(weights[0, :2], torch.tensor([0.999, 0.999e-3]))
    assert weights[0, 2:].eq(0.0).all()
