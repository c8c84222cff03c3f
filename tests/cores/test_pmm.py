"""The external memory: the slots that it writes next, and every core as its controller."""

from __future__ import annotations

import pytest
import torch

from cyborg_torchrl.cores import unroll
from cyborg_torchrl.cores.pmm import _allocate
from cyborg_torchrl.registry import backbones, memories


@pytest.mark.parametrize("name", [name for name in backbones.names() if name != "stack"])
def test_every_core_can_have_an_external_memory(name: str) -> None:
    controller = backbones.get(name)(16, hidden_size=16)
    core = memories.get("pmm")(controller, slots=4, slot_size=8)
    assert len(core.state_shapes) > len(controller.state_shapes)
    x, is_init = torch.randn(3, 12, 16), torch.rand(3, 12) < 0.2
    state = core.initial_state(3)
    with torch.no_grad():
        y, last = core(x, state, is_init)
        expected, expected_last = unroll(core, x, state, is_init)
    assert torch.allclose(y, expected, atol=1e-5)
    assert all(torch.allclose(last[name], expected_last[name], atol=1e-5) for name in last)


def test_weights() -> None:
    usage = torch.tensor([[0.5, 0.25, 1.0, 0.75]])
    # the least used slot: 1 - 0.25; then (1 - 0.5) 0.25, (1 - 0.75) 0.25 0.5, and zero for a full slot
    torch.testing.assert_close(_allocate(usage), torch.tensor([[0.125, 0.75, 0.0, 0.03125]]))


def test_equal_slots_stay_equal() -> None:
    usage = torch.full((1, 10), 1e-3)
    weights = _allocate(usage)
    torch.testing.assert_close(weights[0, :2], torch.tensor([0.999, 0.999e-3]))
    assert weights[0, 2:].eq(0.0).all()
