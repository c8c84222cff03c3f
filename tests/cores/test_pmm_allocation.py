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


def test_rounding_does_not_decide() -> None:
    """Ten unused slots are filled in their order, whatever the last digit of what is written to each."""
    for factor in (1.0, 1.0 + 2**-23, 1.0 - 2**-24):
        usage, order = torch.zeros(1, 10), []
        for _ in range(10):
            weights = _allocate(usage)
            order.append(int(weights.argmax()))
            for gate in (0.9, 0.01, 0.01):  # a write, and two steps at which next to nothing is written
                where = gate * factor * torch.lerp(torch.full((1, 10), 0.1), _allocate(usage), 0.95)
                usage = 0.9999 * (usage + where - usage * where)
        assert order == list(range(10))
