"""The options of heads, critic and masks, from a configuration through training."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn
from torchrl.modules import TanhNormal

from cyborg_torchrl.config import load_config
from cyborg_torchrl.training.builders import build_agent, build_env, build_trainer

SMALL = [
    "env.num_envs=4", "train.n_steps=30", "train.num_minibatches=3", "train.n_epochs=2", "train.total_timesteps=360",
    "encoder.features=16", "backbone.hidden_size=16",
]  # fmt: skip
MODES = {
    "none": ["train=none"],
    "tbptt": ["train=tbptt", "train.seq_len=7"],
    "burn_in": ["train=burn_in", "train.seq_len=5", "train.burn_in=4"],
    "stride": ["train=burn_in", "train.seq_len=3", "train.burn_in=2", "train.state_stride=9"],
    "refresh": ["train=tbptt", "train.seq_len=6", "train.refresh_states=true"],
    "episode": ["train=episode", "env.horizon=8"],
}


class Legal(gymnasium.Env):
    """Counts the illegal actions that it gets. The mask is in the info, or in the observation."""

    illegal = steps = 0

    def __init__(self, where: str = "info", many: bool = False) -> None:
        self.where, self.sizes = where, [3, 2] if many else [5]
        self.action_space = spaces.MultiDiscrete(self.sizes) if many else spaces.Discrete(5)
        self.observation_space = spaces.Box(-1, 1, (3,), np.float32)
        if where != "info":
            entries = {"seen": self.observation_space, where: spaces.MultiBinary(sum(self.sizes))}
            self.observation_space = spaces.Dict(entries)

    def _show(self):
        masks = [self.np_random.random(n) < 0.3 for n in self.sizes]
        for mask in masks:
            mask[self.np_random.integers(len(mask))] = True
        self.masks = masks
        seen = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        if self.where == "info":
            return seen, {"action_mask": tuple(masks) if len(masks) > 1 else masks[0].astype(np.int8)}
        return {"seen": seen, self.where: np.concatenate(masks).astype(np.int8)}, {}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self._show()

    def step(self, action):
        choices = np.atleast_1d(action)
        Legal.illegal += any(not mask[choice] for mask, choice in zip(self.masks, choices, strict=True))
        Legal.steps += 1
        self.time += 1
        seen, info = self._show()
        return seen, float(choices[0] == 0), self.time == 11, False, info


gymnasium.register("AgentOptions/Legal-v0", Legal)
LEGAL = ["env=gymnasium", "id=AgentOptions/Legal-v0"]


def train(*overrides: str) -> list[dict[str, float]]:
    config = "public_benchmark" if "env=gymnasium" in overrides else "memory_delayed_cue_recurrent"
    training = build_trainer(load_config(config, [*SMALL, *overrides]))
    try:
        return list(training.trainer.run())
    finally:
        training.trainer.close()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("collector", ["rollout", "fused", "single"])
def test_a_separate_critic_trains_in_every_mode(mode, collector):
    options = ["agent.separate_critic=true", "agent.policy_hidden_sizes=[8]", "agent.value_hidden_sizes=[8]"]
    updates = train("env.horizon=9", *MODES[mode], *options, f"collector={collector}", "backbone=gru")
    assert len(updates) == 3
    assert all(update["ratio_error"] <= 1e-5 for update in updates)


def test_the_actors_parameters_are_those_of_an_agent_without_a_separate_critic_at_the_start():
    agents = []
    for value in ("false", "true"):
        cfg = load_config(overrides=[*SMALL, "env.horizon=9", f"agent.separate_critic={value}"])
        torch.manual_seed(0)
        agents.append(build_agent(cfg, build_env(cfg)))
    shared, separate = agents
    for name, parameter in shared.backbone.named_parameters():
        assert torch.equal(parameter, separate.backbone.get_parameter(name))
    assert {id(p) for p in separate.backbone.parameters()}.isdisjoint(id(p) for p in separate.critic.parameters())


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("std_from_features", [False, True])
def test_continuous_actions(squash, std_from_features):
    updates = train(
        "env=gymnasium", "id=Pendulum-v1", "train=tbptt", "train.seq_len=10", f"agent.squash={squash}",
        f"agent.std_from_features={std_from_features}", "agent.log_std_init=-1",
    )  # fmt: skip
    assert all(update["ratio_error"] <= 1e-5 for update in updates)


def test_squashed_actions_stay_inside_and_start_with_the_given_deviation():
    cfg = load_config("public_benchmark", ["env=gymnasium", "id=Pendulum-v1", "agent.squash=true", *SMALL])
    env = build_env(cfg)
    agent = build_agent(cfg, env)
    assert issubclass(agent.sampler.distribution_class, TanhNormal)
    for _, backbone in agent.memories:
        env.append_transform(backbone.make_tensordict_primer())
    action = env.rollout(20, agent, break_when_any_done=False, auto_cast_to_device=True)["action"]
    assert action.abs().max() <= 2.0
    cfg = load_config("public_benchmark", ["env=gymnasium", "id=Pendulum-v1", "agent.log_std_init=-1.5", *SMALL])
    agent = build_agent(cfg, env)
    _, scale = agent.policy_head.module(torch.randn(3, 16))
    torch.testing.assert_close(scale, torch.full((3, 1), 2.0 * float(np.exp(-1.5))))  # the range is [-2, 2]


def test_hidden_layers_are_orthogonal():
    cfg = load_config(overrides=[*SMALL, "env.horizon=9", "agent.policy_hidden_sizes=[12,8]"])
    agent = build_agent(cfg, build_env(cfg))
    first, silu, second, _, last = agent.policy_head.module
    assert isinstance(silu, nn.SiLU)
    for linear in (first, second):
        gram = linear.weight @ linear.weight.t()
        torch.testing.assert_close(gram, 2.0 * torch.eye(len(gram)), rtol=0, atol=1e-5)
    assert last.in_features == 8


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("where", ["info", "action_mask", "legal"])
def test_no_illegal_action_in_training(where, many):
    Legal.illegal = Legal.steps = 0
    named = [] if where != "legal" else ["agent.action_mask=legal"]
    options = [f"+env.options.where={where}", f"+env.options.many={many}", "train.seq_len=10", *named]
    updates = train(*LEGAL, *options)
    assert all(update["ratio_error"] <= 1e-5 for update in updates)
    assert Legal.steps >= 360
    assert Legal.illegal == 0


def test_without_a_mask_illegal_actions_are_taken():
    """Shows that the count above can fail."""
    Legal.illegal = Legal.steps = 0
    with pytest.warns(UserWarning, match="does not read the environment's entry 'action_mask'"):
        train(*LEGAL, "train.seq_len=10", "agent.action_mask=null")
    assert Legal.illegal > 50


@pytest.mark.slow
def test_no_illegal_action_in_100_000_steps():
    Legal.illegal = Legal.steps = 0
    updates = train(*LEGAL, "env.num_envs=16", "train.n_steps=64", "train.total_timesteps=100352", "train.seq_len=16")
    assert Legal.steps >= 100_000
    assert Legal.illegal == 0
    assert max(update["ratio_error"] for update in updates) <= 1e-5


class Named(gymnasium.Env):
    """A Dict observation whose entries have names that TorchRL uses for other things."""

    action_space = spaces.Discrete(2)

    def __init__(self, names: tuple[str, ...]) -> None:
        self.observation_space = spaces.Dict({name: spaces.Box(-1, 1, (1,), np.float32) for name in names})

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


gymnasium.register("AgentOptions/Named-v0", Named)


@pytest.mark.parametrize(
    "names",
    [
        ("reward", "success", "done", "step_count", "is_init", "x"),
        ("state",),
        ("state", "goal"),
        ("state", "observation"),
    ],
    ids=" ".join,
)
def test_all_entries_of_a_dict_observation_are_read(names):
    options = ["env=gymnasium", "id=AgentOptions/Named-v0", f"+env.options.names=[{','.join(names)}]", *SMALL]
    cfg = load_config("public_benchmark", options)
    env = build_env(cfg)
    agent = build_agent(cfg, env)
    assert {key[-1] for key in agent.encoder.in_keys} == set(names)
    assert env.rollout(3)["observation"].keys() >= set(names)
