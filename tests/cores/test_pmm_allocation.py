"""Which slots of the external memory are written next."""

from __future__ import annotations

import torch

from cyborg_torchrl.cores.pmm import _allocate


def test_weights() -> None:
    usage = torch.tensor([[0.5, 0.25, 1.0, 0.75]])
    # the least used: 1 - .25; then (1 - .5) .25, (1 - .75) .25 .5, and nothing for what is full
    torch.testing.assert_close(_allocate(usage), torch.tensor([[0.125, 0.75, 0.0, 0.03125]]))


def test_slots_that_are_alike_stay_alike() -> None:
    usage = torch.full((1, 10), 1e-3)
    weights = _allocate(usage)
    torch.testing.assert_close(weights[0, :2], torch.tensor([0.999, 0.999e-3]))
    assert weights[0, 2:].eq(0.0).all()
