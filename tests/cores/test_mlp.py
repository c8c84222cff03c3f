"""The layer of a stack without memory."""

from __future__ import annotations

import pytest
import torch

from cyborg_torchrl.config import ConfigError, load_config
from cyborg_torchrl.cores import MLPBlock, StackCore, build_stack
from cyborg_torchrl.training.builders import build_agent, build_env


def test_a_layer_by_hand() -> None:
    core = MLPBlock(2, expand=1)
    with torch.no_grad():
        core.in_proj.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
        core.out_proj.weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 2.0]]))
    hidden = 1 / (1 + torch.tensor(-1.0).exp()), -2 / (1 + torch.tensor(2.0).exp())  # silu(1), silu(-2)
    expected = torch.stack([hidden[0] + hidden[1], 2 * hidden[1]])
    torch.testing.assert_close(core.step(torch.tensor([[1.0, 2.0]]), {})[0][0], expected)


def test_a_stack_adds_it_as_a_residual() -> None:
    with_layer = build_stack(8, hidden_size=8, layers=["gru", "mlp"])
    without = StackCore([with_layer.cores[0]], 8, 8)
    x, is_init = torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    memory, _ = without(x, without.initial_state(2), is_init)
    expected = memory + with_layer.cores[1](torch.nn.functional.rms_norm(x + memory, (8,), eps=1e-5), {}, is_init)[0]
    torch.testing.assert_close(with_layer(x, with_layer.initial_state(2), is_init)[0], expected)
    assert set(with_layer.state_shapes) == set(without.state_shapes)


def test_layers_and_their_options_in_a_configuration() -> None:
    overrides = ["backbone=stack", "backbone.layers=[mlp,{name:lru,num_layers:2},{name:mlp,expand:3}]", "env.horizon=3"]
    cfg = load_config(overrides=overrides)
    core = build_agent(cfg, build_env(cfg)).backbone.core
    assert [type(layer).__name__ for layer in core.cores] == ["MLPBlock", "LayeredCore", "MLPBlock"]
    assert core.cores[2].in_proj.out_features == 3 * 64
    alone = load_config(overrides=["backbone=stack", "backbone.layers=[mlp]", "env.horizon=3"])
    agent = build_agent(alone, env := build_env(alone))
    assert not agent.backbone.state_keys
    assert env.rollout(3, agent).shape[1] == 3
    wrong = load_config(overrides=["backbone=stack", "backbone.layers=[{name:mlp,expand:0}]", "env.horizon=3"])
    with pytest.raises(ConfigError, match="backbone: expand must be >= 1; got 0"):
        build_agent(wrong, build_env(wrong))
