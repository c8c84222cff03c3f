"""Resets in the loops over time of the torch paths."""

from __future__ import annotations

import importlib

import pytest
import torch

from cyborg_torchrl.cores.kernels import choice
from cyborg_torchrl.cores.resets import reset_steps
from cyborg_torchrl.registry import backbones

LOOPS = {"gru": "gru", "lstm": "lstm", "lru": "lru", "min_gru": "scan", "rnn": "rnn", "bistable": "bistable"}
LOOPS |= {"mamba": "selective_scan", "pmm": "pmm"}
"""The module with a backbone's loop."""


def test_flags_are_read_on_a_cpu_only() -> None:
    is_init = torch.tensor([[True, False], [False, False], [True, True]])
    assert reset_steps(is_init) == [True, False, True]
    assert reset_steps(is_init.to("meta")) == [True] * 3  # a tensor without numbers, whose reading is an error


@pytest.mark.parametrize("name", LOOPS)
def test_a_reset_without_flags_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "is_native", lambda tensor: False)
    torch.manual_seed(0)
    core = backbones.get(name)(3, hidden_size=8, **({"kernel": "torch"} if name == "mamba" else {}))
    x, is_init = torch.randn(2, 6, 3), torch.zeros(2, 6, dtype=torch.bool)
    is_init[0, 2] = is_init[1, 4] = True
    state = {key: torch.randn_like(value) for key, value in core.initial_state(2).items()}
    results, calls = [], []

    def every_step(flags: torch.Tensor) -> list[bool]:
        calls.append(flags)
        return [True] * len(flags)

    for function in (reset_steps, every_step):
        monkeypatch.setattr(importlib.import_module(f"cyborg_torchrl.cores.{LOOPS[name]}"), "reset_steps", function)
        y, last = core(x, state, is_init)
        loss = y.sum() + sum(value.sum() for value in last.values())
        grads = torch.autograd.grad(loss, [*core.parameters()], allow_unused=True)
        results.append([y, *last.values(), *(grad for grad in grads if grad is not None)])
    assert calls
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))
