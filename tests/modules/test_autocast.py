"""`torch.autocast` around acting, the loss, or both: every backbone works, and its memory stays float32."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from cyborg_torchrl.checks import check_recurrent
from cyborg_torchrl.config import load_config
from cyborg_torchrl.cores import Core
from cyborg_torchrl.registry import backbones
from cyborg_torchrl.training.builders import Training, build_trainer

BACKBONES = [*backbones.names(), "gru+pmm"]


def build(name: str) -> Training:
    backbone, _, memory = name.partition("+")
    return build_trainer(
        load_config(
            overrides=[
                f"backbone={backbone}", f"memory={memory or 'none'}", "env.num_envs=8", "env.horizon=6", "train=tbptt",
                "train.total_timesteps=128", "train.n_epochs=1", "train.num_minibatches=2", "train.seq_len=4",
            ]
        )
    )  # fmt: skip


def core_of(name: str) -> Core:
    torch.manual_seed(0)
    options: dict[str, Any] = {} if name == "stack" else {"hidden_size": 16}
    return backbones.get(name)(16, **options)


@pytest.mark.parametrize("name", backbones.names())
def test_a_core_computes_as_without_autocast(name: str) -> None:
    """Bfloat16 inputs and autocast give the float32 result of the rounded inputs; states and gradients are float32."""
    core, x = core_of(name), torch.randn(3, 7, 16).bfloat16()
    is_init = torch.zeros(3, 7, dtype=torch.bool)
    is_init[1, 4] = True

    def gradients(y: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(y.square().sum(), list(core.parameters()), allow_unused=True)
        return [gradient for gradient in found if gradient is not None]

    expected = core(x.float(), core.initial_state(3), is_init)
    expected_step = core.step(x[:, 0].float(), core.initial_state(3))
    with torch.autocast("cpu", torch.bfloat16):
        actual = core(x, core.initial_state(3), is_init)
        actual_step = core.step(x[:, 0], core.initial_state(3))
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(actual_step, expected_step)
    torch.testing.assert_close(gradients(actual[0]), gradients(expected[0]))
    assert {value.dtype for value in actual[1].values()} == {torch.float32}


@pytest.mark.parametrize("where", ["acting", "loss", "both"])
@pytest.mark.parametrize("name", BACKBONES)
def test_training_under_autocast(name: str, where: str) -> None:
    trainer, agent, _ = build(name)
    with torch.no_grad():
        for parameter in agent.policy_head.parameters():
            parameter.normal_(0.0, 0.05)  # so that the log-probs depend on the memory
    before = [parameter.clone() for parameter in agent.parameters()]
    autocast = torch.autocast("cpu", torch.bfloat16)
    with autocast if where != "loss" else nullcontext():
        rollout = trainer.collector.rollout()
    assert {value.dtype for value in rollout.stored_states.values(True, True)} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16) if where != "acting" else nullcontext():
        metrics = trainer.update(rollout)
    assert metrics["ratio_error"] <= 0.03
    if where != "both":
        assert metrics["ratio_error"] > 1e-5  # otherwise nothing was in reduced precision
    after = list(agent.parameters())
    assert all(new.dtype is torch.float32 and bool(new.isfinite().all()) for new in after)
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("name", ["lru", "gru", "mamba_gru", "pmm"])
def test_the_checker_allows_for_rounding_and_no_more(name: str) -> None:
    _, agent, env = build(name)
    with torch.no_grad():
        agent.policy_head.module.weight.normal_(0.0, 0.3)
    options: dict[str, Any] = {"steps": 16, "chunk_lengths": (1, 5), "drift_updates": 1}
    with torch.autocast("cpu", torch.bfloat16):
        report = check_recurrent(agent, env, **options)
    assert not [finding for finding in report.findings if finding.verdict == "failed"]
    assert 3e-2 in {finding.limit for finding in report.findings}
    assert 3e-2 not in {finding.limit for finding in check_recurrent(agent, env, **options).findings}
