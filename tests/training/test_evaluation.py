"""Episodes are counted once each, and intervals are those of the textbooks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.data import Categorical, Composite, Unbounded
from torchrl.envs import EnvBase, StepCounter, TransformedEnv

from cyborg_torchrl.config import load_config
from cyborg_torchrl.cores import build_gru
from cyborg_torchrl.modules import PPOAgent
from cyborg_torchrl.modules.nan_check import NonFiniteError
from cyborg_torchrl.training import evaluation
from cyborg_torchrl.training.builders import build_agent, build_env
from cyborg_torchrl.training.evaluation import evaluate, longest_episode


def test_every_environment_gives_its_first_episodes(make_env: Callable, make_agent: Callable) -> None:
    agent = make_agent(build_gru(3, hidden_size=8))
    env = make_env(5, 0)
    env.append_transform(agent.backbone.make_tensordict_primer())
    seen: list[tuple[int, int]] = []
    result = evaluate(agent, env, 12, on_episodes=lambda finished, total: seen.append((finished, total)))

    again = make_env(5, 0)
    again.append_transform(agent.backbone.make_tensordict_primer())
    tensordict = again.reset()
    sums, lengths, found = [0.0] * 5, [0] * 5, [[] for _ in range(5)]
    from torchrl.envs.utils import ExplorationType, set_exploration_type

    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        while min(map(len, found)) < 3:
            played, tensordict = again.step_and_maybe_reset(agent(tensordict))
            for i in range(5):
                sums[i] += float(played["next", "reward"][i])
                lengths[i] += 1
                if played["next", "done"][i]:
                    found[i].append((lengths[i], sums[i]))
                    sums[i], lengths[i] = 0.0, 0
    expected = sorted(pair for episodes in found for pair in episodes[:3])
    assert result.episodes == 15
    ours = sorted(zip(result.lengths.tolist(), result.returns.tolist(), strict=True))
    assert [length for length, _ in ours] == [length for length, _ in expected]
    assert [total for _, total in ours] == pytest.approx([total for _, total in expected], abs=1e-5)
    assert result.mean_reward == pytest.approx(sum(total for _, total in expected) / 15, abs=1e-5)
    assert result.success_rate is None
    assert seen[-1] == (15, 15)
    assert [finished for finished, _ in seen] == sorted(finished for finished, _ in seen)


class Opaque(TensorDictModuleBase):
    """An agent that the collectors cannot split into its networks."""

    def __init__(self, agent: PPOAgent) -> None:
        super().__init__()
        self.agent, self.in_keys, self.out_keys = agent, agent.in_keys, agent.out_keys

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        return self.agent(tensordict)


@pytest.mark.parametrize("is_deterministic", [True, False])
@pytest.mark.parametrize("max_steps", [None, 4])
@pytest.mark.parametrize("task", [["env=delayed_cue", "backbone=lru"], ["env=n_back", "backbone=gru"], ["env=tmaze"]])
def test_evaluation_on_tensors_has_the_results_of_torchrl(
    task: list[str], max_steps: int | None, is_deterministic: bool
) -> None:
    results = []
    for wrap in (lambda agent: agent, Opaque):
        torch.manual_seed(0)
        cfg = load_config(overrides=[*task, "env.horizon=6", "env.num_envs=5"])
        env = build_env(cfg)
        agent = build_agent(cfg, env)
        torch.nn.init.normal_(agent.policy_head.module.weight)
        env.append_transform(agent.backbone.make_tensordict_primer())
        env.set_seed(1)
        torch.manual_seed(2)
        result = evaluate(wrap(agent), env, 30, is_deterministic=is_deterministic, max_steps=max_steps)
        results.append((result, torch.get_rng_state()))
    (ours, random_state), (theirs, random_state_too) = results
    assert torch.equal(random_state, random_state_too)
    for name in ("returns", "lengths", "successes"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


@pytest.mark.parametrize("is_deterministic", [True, False])
def test_an_agent_with_nan_is_refused(is_deterministic: bool) -> None:
    cfg = load_config(overrides=["env=delayed_cue", "env.horizon=6", "env.num_envs=5"])
    env = build_env(cfg)
    agent = build_agent(cfg, env)
    env.append_transform(agent.backbone.make_tensordict_primer())
    with torch.no_grad():
        agent.policy_head.module.bias.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="'logits' is nan in environment 0"):
        evaluate(agent, env, 5, is_deterministic=is_deterministic)


class Endless(EnvBase):
    """Environments of batch size [N] that count their steps; number i ends after ends[i] steps, 0: never."""

    def __init__(self, ends: list[int]) -> None:
        super().__init__(batch_size=[len(ends)])
        self.ends, shape = torch.tensor(ends).unsqueeze(-1), (len(ends), 1)
        self.observation_spec = Composite(observation=Unbounded(shape), shape=self.batch_size)
        self.action_spec = Categorical(2, shape=self.batch_size)
        self.reward_spec = Unbounded(shape)
        self.begun = torch.zeros(len(ends), dtype=torch.long)
        self.time = torch.zeros(shape)

    def _reset(self, tensordict: TensorDictBase | None = None, **_: object) -> TensorDict:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        mask = torch.ones_like(self.ends, dtype=torch.bool) if mask is None else mask
        self.begun += mask.reshape(-1)
        self.time = self.time.masked_fill(mask, 0.0)
        return TensorDict({"observation": self.time.clone()}, self.batch_size)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        self.time = self.time + 1
        done = self.time == self.ends
        entries = {"observation": self.time.clone(), "reward": torch.ones_like(self.time), "done": done}
        return TensorDict({**entries, "terminated": done.clone()}, self.batch_size)

    def _set_seed(self, seed: int | None) -> None:
        pass


class Zero(TensorDictModuleBase):
    """A policy that takes action 0, and notes the observations."""

    def __init__(self) -> None:
        super().__init__()
        self.in_keys, self.out_keys = ["observation"], ["action"]
        self.seen: list[list[float]] = []

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        self.seen.append(tensordict["observation"].flatten().tolist())
        return tensordict.set("action", torch.zeros(tensordict.batch_size, dtype=torch.long))


def test_episodes_that_never_end_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a limit an environment that was cut plays no more; the others play all their episodes."""
    monkeypatch.setattr(evaluation, "MAX_STEPS", 7)
    env, policy = Endless([0, 3, 0]), Zero()
    result = evaluate(policy, env, 12)
    assert sorted(result.lengths.tolist()) == [3, 3, 3, 3, 7, 7]
    assert sorted(result.returns.tolist()) == [3, 3, 3, 3, 7, 7]
    assert (result.episodes, result.num_cut) == (6, 2)
    assert result.cut_note == "2 of 6 episodes did not end within 7 steps and were cut"
    assert len(policy.seen) == 12, "as long as the environment that ends needs for four episodes"


def test_with_a_limit_each_episode_is_cut_and_a_new_one_begins() -> None:
    env, policy = Endless([0, 3, 4]), Zero()
    result = evaluate(policy, env, 9, max_steps=4)
    assert sorted(result.lengths.tolist()) == [3, 3, 3, 4, 4, 4, 4, 4, 4]
    assert (result.episodes, result.num_cut) == (9, 3)
    assert [seen[0] for seen in policy.seen] == [0, 1, 2, 3] * 3, "each episode begins with a reset"
    assert [seen[1] for seen in policy.seen] == [0, 1, 2] * 4


def test_memory_begins_anew_after_a_cut() -> None:
    """The policy sees the initial state and `is_init` at the first step of each episode, and nowhere else."""
    torch.manual_seed(0)
    cfg = load_config(overrides=["env=delayed_cue", "env.horizon=50", "env.num_envs=4", "backbone=gru"])
    env = build_env(cfg)
    agent = build_agent(cfg, env)
    env.append_transform(agent.backbone.make_tensordict_primer())
    firsts: list[bool] = []

    def note(_: object, inputs: tuple[TensorDictBase]) -> None:
        firsts.append(bool(inputs[0]["is_init"].all()))
        states = [inputs[0][key] for key in agent.backbone.state_keys.values()]
        assert firsts[-1] == (not any(bool(state.any()) for state in states))

    agent.backbone.register_forward_pre_hook(note)
    result = evaluate(agent, env, 12, max_steps=5)
    assert (result.num_cut, result.lengths.tolist()) == (12, [5] * 12)
    assert firsts == [True, False, False, False, False] * 3


def test_the_longest_episode_of_an_environment_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "MAX_STEPS", 5)
    counted = TransformedEnv(Endless([0, 0]), StepCounter(max_steps=30))
    result = evaluate(Zero(), counted, 4)
    assert (result.lengths.tolist(), result.num_cut) == ([30] * 4, 0)
    cfg = load_config(overrides=["env=delayed_cue", "env.horizon=40", "env.num_envs=2"])
    env = build_env(cfg)
    assert longest_episode(env) == 42
    agent = build_agent(cfg, env)
    env.append_transform(agent.backbone.make_tensordict_primer())
    result = evaluate(agent, env, 2)
    assert (result.lengths.tolist(), result.num_cut) == ([42, 42], 0)


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="max_steps must be >= 1; got 0"):
        evaluate(Zero(), Endless([1]), 1, max_steps=0)
