"""Transforms by configuration, against cases computed by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch.nn.functional import one_hot
from torchrl.data import Binary, Bounded, Categorical, Composite, MultiCategorical, OneHot, TensorSpec, Unbounded
from torchrl.envs import Compose, EnvBase, InitTracker, RewardSum, TransformedEnv
from torchrl.envs.utils import check_env_specs

from cyborg_torchrl.config import ConfigError, load_config
from cyborg_torchrl.envs.transforms.build import PreviousAction, build_transforms
from cyborg_torchrl.envs.transforms.normalization import (
    NormalizeReward,
    RunningMoments,
    freeze_statistics,
    statistics_of,
)
from cyborg_torchrl.training.builders import build_agent, build_env, build_trainer
from cyborg_torchrl.training.checkpoint import load_checkpoint
from cyborg_torchrl.training.experiment import evaluate_agent, run_experiment

LENGTHS = (2, 3, 5)


class CountingEnv(EnvBase):
    """Shows 10 episode + t in environments whose episodes last 2, 3 and 5 steps; the reward is t."""

    def __init__(self, shown: TensorSpec, action_spec: TensorSpec | None = None, key: str = "observation") -> None:
        count = len(LENGTHS)
        super().__init__(device="cpu", batch_size=[count])
        self.key, self.shown_shape = key, shown.shape[1:]
        self.observation_spec = Composite({key: shown}, shape=[count])
        self.action_spec = Categorical(3, shape=[count]) if action_spec is None else action_spec
        self.reward_spec = Unbounded((count, 1))
        ends = ("done", "terminated", "truncated")
        self.done_spec = Composite({key: Binary(1, (count, 1), dtype=torch.bool) for key in ends}, shape=[count])
        self.episode, self.time = torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.long)
        self.shown: list[float] = []

    def _see(self, mask: torch.Tensor) -> torch.Tensor:
        value = 10 * self.episode + self.time
        self.shown += value[mask].tolist()
        expanded = value.reshape(-1, *[1] * len(self.shown_shape)).expand(-1, *self.shown_shape)
        return expanded.to(self.observation_spec[self.key].dtype).clone()

    def _reset(self, tensordict: TensorDictBase | None = None, **_: object) -> TensorDict:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        mask = torch.ones_like(self.time, dtype=torch.bool) if mask is None else mask.reshape(-1)
        self.episode, self.time = self.episode + mask, self.time.masked_fill(mask, 0)
        ends = {key: torch.zeros(len(LENGTHS), 1, dtype=torch.bool) for key in self.done_spec.keys()}
        return TensorDict({self.key: self._see(mask), **ends}, self.batch_size)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        self.time = self.time + 1
        done = (self.time >= torch.tensor(LENGTHS)).unsqueeze(-1)
        entries = {"done": done, "terminated": done, "truncated": torch.zeros_like(done)}
        reward = self.time.float().unsqueeze(-1)
        shown = self._see(torch.ones_like(self.time, dtype=torch.bool))
        return TensorDict({self.key: shown, "reward": reward, **entries}, self.batch_size)

    def _set_seed(self, seed: int | None) -> None:
        pass


def vectors(size: int = 2) -> TensorSpec:
    return Unbounded((len(LENGTHS), size))


def transformed(env: EnvBase, **options: object) -> TransformedEnv:
    built = build_transforms(env, gamma=0.5, **options)
    return TransformedEnv(env, Compose(InitTracker(), RewardSum(), *built))


def test_running_moments_equal_those_of_everything_at_once() -> None:
    batches = [torch.randn(n, 3) * scale + 5 for n, scale in ((1, 1.0), (7, 3.0), (50, 0.1))]
    moments = RunningMoments((3,))
    for batch in batches:
        moments.update(batch)
    everything = torch.cat(batches).double().numpy()
    np.testing.assert_allclose(moments.mean, everything.mean(0), rtol=1e-4)
    np.testing.assert_allclose(moments.var, everything.var(0), rtol=1e-3)


@pytest.mark.parametrize(
    ("spec", "action", "expected"),
    [
        (Categorical(3, shape=[2]), torch.tensor([2, 0]), [[0, 0, 1], [1, 0, 0]]),
        (
            MultiCategorical([2, 3]).expand(2, 2),
            torch.tensor([[1, 0], [0, 2]]),
            [[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]],
        ),
        (OneHot(2, shape=[2, 2]), torch.tensor([[True, False], [False, True]]), [[1, 0], [0, 1]]),
        (Bounded(-2.0, 6.0, (2, 1)), torch.tensor([[4.0], [-9.0]]), [[0.5], [-1.0]]),
        (Unbounded((2, 2)), torch.tensor([[4.0, 1.0], [-9.0, 0.0]]), [[4, 1], [-9, 0]]),
    ],
    ids=["categorical", "multi-categorical", "one-hot", "bounded", "unbounded"],
)
def test_actions_as_vectors(spec: TensorSpec, action: torch.Tensor, expected: list[list[float]]) -> None:
    encoded = PreviousAction(spec).encode(action)
    assert encoded.dtype == torch.float32
    assert encoded.tolist() == expected


def test_previous_action_and_reward_are_those_of_the_step_before_and_zero_where_there_was_none() -> None:
    env = transformed(CountingEnv(vectors()), previous_action=True, previous_reward=True)
    check_env_specs(env)
    steps = env.rollout(12, break_when_any_done=False)
    is_init = steps["is_init"]
    assert is_init[:, 1:].any(1).all()
    assert not is_init[:, 1:].all(0).any()  # resets were partial
    before = one_hot(steps["action"], 3).float()[:, :-1]
    assert torch.equal(steps["previous_action"][:, 1:], before.masked_fill(is_init[:, 1:], 0.0))
    assert torch.equal(steps["next", "previous_action"], one_hot(steps["action"], 3).float())
    rewards = steps["next", "reward"]
    assert torch.equal(steps["previous_reward"][:, 1:], rewards[:, :-1].masked_fill(is_init[:, 1:], 0.0))
    assert not steps["previous_action"][:, 0].any()
    assert not steps["previous_reward"][:, 0].any()


def test_the_first_step_of_an_episode_has_a_flag() -> None:
    env = transformed(CountingEnv(vectors()), first_step=True)
    check_env_specs(env)
    steps = env.rollout(12, break_when_any_done=False)
    assert torch.equal(steps["first_step"], steps["is_init"].float())
    assert not steps["next", "first_step"].any()


def test_previous_reward_is_raw_and_rewards_are_clipped_after_all() -> None:
    env = transformed(CountingEnv(vectors()), previous_reward=True, clip_reward=1.5)
    steps = env.rollout(6, break_when_any_done=False)
    assert steps["next", "reward"][2, :5, 0].tolist() == [1.0, 1.5, 1.5, 1.5, 1.5]
    assert steps["next", "previous_reward"][2, :5, 0].tolist() == [1, 2, 3, 4, 5]
    assert steps["next", "episode_reward"][2, 4].item() == 15


def test_rewards_are_scaled_before_they_are_clipped_and_returns_stay_raw() -> None:
    env = transformed(CountingEnv(vectors()), previous_reward=True, reward_scale=0.5, clip_reward=1.5)
    check_env_specs(env)
    steps = env.rollout(6, break_when_any_done=False)
    assert steps["next", "reward"][2, :5, 0].tolist() == [0.5, 1.0, 1.5, 1.5, 1.5]
    assert steps["next", "previous_reward"][2, :5, 0].tolist() == [1, 2, 3, 4, 5]
    assert steps["next", "episode_reward"][2, 4].item() == 15


@pytest.mark.parametrize(
    ("shown", "key", "frame"),
    [
        (vectors(1), "observation", (...,)),
        (Bounded(0, 255, (3, 33, 34, 1), dtype=torch.uint8), "pixels", (slice(None), slice(None), 0, 0)),
        (
            Bounded(0, 255, (3, 1, 33, 34), dtype=torch.uint8),
            "pixels",
            (slice(None), slice(None), slice(None), 0, 0),
        ),
    ],
    ids=["vector", "channels last", "channels first"],
)
def test_frames_are_stacked_within_each_episode(shown: TensorSpec, key: str, frame: tuple) -> None:
    env = transformed(CountingEnv(shown, key=key), frame_stack=3)
    check_env_specs(env)
    env.base_env.episode.zero_()
    steps = env.rollout(5, break_when_any_done=False)
    assert steps[key].dtype == shown.dtype
    stacked, after = steps[key][frame], steps["next", key][frame]
    assert stacked[0].tolist() == [[10, 10, 10], [10, 10, 11], [20, 20, 20], [20, 20, 21], [30, 30, 30]]
    assert stacked[1].tolist() == [[10, 10, 10], [10, 10, 11], [10, 11, 12], [20, 20, 20], [20, 20, 21]]
    assert stacked[2].tolist() == [[10, 10, 10], [10, 10, 11], [10, 11, 12], [11, 12, 13], [12, 13, 14]]
    assert after[0].tolist() == [[10, 10, 11], [10, 11, 12], [20, 20, 21], [20, 21, 22], [30, 30, 31]]


def test_every_observation_is_counted_once_and_shown_as_it_was_normalised() -> None:
    env = transformed(CountingEnv(vectors()), normalize_observation=True)
    steps = env.rollout(40, break_when_any_done=False)
    (moments,) = statistics_of(env)["observation"]
    seen = np.array(env.base_env.shown)
    assert len(seen) == 3 * 41 + int(steps["is_init"][:, 1:].sum())
    assert moments.count.item() == pytest.approx(len(seen))
    np.testing.assert_allclose(moments.mean, [seen.mean()] * 2, rtol=1e-5)
    np.testing.assert_allclose(moments.var, [seen.var()] * 2, rtol=1e-4)
    # the last observation is normalised by all that was seen
    expected = (seen[-3:] - seen.mean()) / seen.std()
    np.testing.assert_allclose(steps["next", "observation"][:, -1, 0], expected, rtol=1e-4)
    is_same_episode = ~steps["is_init"][:, 1:, 0]
    before, now = steps["next", "observation"][:, :-1], steps["observation"][:, 1:]
    assert torch.equal(before[is_same_episode], now[is_same_episode])


def test_rewards_are_divided_by_the_deviation_of_the_discounted_return() -> None:
    env = transformed(CountingEnv(vectors()), normalize_reward=True)
    steps = env.rollout(9, break_when_any_done=False)
    returns = np.zeros(3)
    time, everything, peaks = np.zeros(3, dtype=int), [], []
    for t in range(9):
        time += 1
        returns = 0.5 * returns + time
        everything.append(returns.copy())
        # an episode's largest reward is its last one
        size = max(np.std(everything), np.sqrt(np.mean(np.square(peaks))) if peaks else 0.0)
        if t:  # at the first step the assumed item of variance 1 still counts
            np.testing.assert_allclose(steps["next", "reward"][:, t, 0], time / size, rtol=2e-3)
        assert (np.sign(steps["next", "reward"][:, t, 0].numpy()) == 1).all()  # never centred
        is_done = time == np.array(LENGTHS)
        peaks += list(time[is_done])
        returns[is_done], time[is_done] = 0.0, 0
    done = steps["next", "done"]
    assert set(steps["next", "episode_reward"][done].tolist()) == {3.0, 6.0, 15.0}


def normalised(rewards: Tensor, length: int, gamma: float = 0.99) -> Tensor:
    """Return the normalised rewards of episodes of a length, [N, T], in which `rewards` are paid."""
    transform = NormalizeReward(Unbounded((len(rewards), 1)), gamma)
    found = []
    for t in range(rewards.shape[1]):
        entries = {"reward": rewards[:, t : t + 1].clone()}
        transform.after_step({}, entries)
        found.append(entries["reward"])
        if (t + 1) % length == 0:
            transform.after_reset({}, torch.ones(len(rewards), dtype=torch.bool))
    return torch.cat(found, 1)


def test_one_reward_at_an_episodes_end_keeps_its_size() -> None:
    length, count = 100, 20
    paid = torch.zeros(4, length * count)
    paid[:2, length - 1 :: length] = 5.0  # two environments never succeed
    ends = normalised(paid, length)[:2, length - 1 :: length]
    # the deviation of the discounted return alone would give sqrt(2 * length) = 14
    assert torch.allclose(ends[:, 1:], torch.ones(2, count - 1), rtol=1e-3)


def test_a_reward_at_every_step_is_divided_by_the_deviation_alone() -> None:
    torch.manual_seed(0)
    paid = torch.rand(4, 2000)
    returns, everything = torch.zeros(4), []
    for t in range(2000):
        returns = 0.99 * (returns if t % 200 else 0.0) + paid[:, t]
        everything.append(returns)
    expected = paid[:, -1] / torch.stack(everything).std(correction=0)
    assert torch.allclose(normalised(paid, 200)[:, -1], expected, rtol=1e-4)


def test_frozen_statistics_stay() -> None:
    env = transformed(CountingEnv(vectors()), normalize_observation=True, normalize_reward=True)
    env.rollout(10, break_when_any_done=False)
    other = transformed(CountingEnv(vectors()), normalize_observation=True, normalize_reward=True)
    freeze_statistics(other, statistics_of(env))
    before = {name: value.clone() for name, value in statistics_of(env).state_dict().items()}
    assert len(before) == 9
    steps = other.rollout(10, break_when_any_done=False)
    for name, value in statistics_of(other).state_dict().items():
        assert torch.equal(value, before[name])
    mean, std = before["observation.0.mean"][0], before["observation.0.var"][0].sqrt()
    assert steps["observation"][0, 0, 0].item() == pytest.approx(((10 - mean) / std).item(), rel=1e-5)


def test_what_cannot_be_normalised_or_stacked_is_refused() -> None:
    pixels = Bounded(0, 255, (3, 33, 34, 1), dtype=torch.uint8)
    with pytest.raises(ValueError, match="normalize_observation needs observations that are floats"):
        transformed(CountingEnv(pixels, key="pixels"), normalize_observation=True)
    with pytest.raises(ValueError, match="frame_stack stacks pixels and vectors; the observation observation is Cat"):
        transformed(CountingEnv(Categorical(100, shape=[3])), frame_stack=2)
    env = transformed(CountingEnv(vectors()), normalize_reward=True)
    with pytest.raises(ValueError, match="the agent was built for one that does not"):
        freeze_statistics(env, None)


SMALL = [
    "env.horizon=4",
    "env.num_envs=8",
    "train.num_minibatches=2",
    "train.n_epochs=2",
    "train.total_timesteps=144",
    "encoder.features=8",
    "backbone.hidden_size=8",
    "logger.progress=false",
    "logger.tensorboard=false",
    "logger.eval_episodes=16",
]
ALL = [
    "transforms.previous_action=true",
    "transforms.previous_reward=true",
    "transforms.first_step=true",
    "transforms.frame_stack=2",
    "transforms.normalize_observation=true",
    "transforms.normalize_reward=true",
    "transforms.clip_reward=5",
]


def test_native_tasks_take_all_of_them_and_the_update_sees_what_the_agent_saw() -> None:
    cfg = load_config(overrides=[*SMALL, *ALL])
    env = build_env(cfg)
    check_env_specs(env)
    # cue, flags and their predecessors; one-hot action; reward
    assert set(build_agent(cfg, env).encoder.in_keys) == {
        "observation",
        "previous_action",
        "previous_reward",
        "first_step",
    }
    trainer = build_trainer(cfg).trainer
    metrics = list(trainer.run())
    assert len(metrics) == 3
    assert all(update["ratio_error"] < 1e-5 for update in metrics)
    assert all(update["mean_reward"] in np.arange(-8, 9, 2) / 8 for update in metrics)  # raw: +1 or -1 each


def test_statistics_are_saved_with_the_agent_and_used_frozen_in_evaluation(tmp_path: Path) -> None:
    cfg = load_config(overrides=[*SMALL, *ALL, f"logger.base_dir={tmp_path}", "logger.run_name=a"])
    summary = run_experiment(cfg)
    saved = load_checkpoint(tmp_path / "a" / "checkpoints" / "last.pt")["agent"]
    statistics = {name: value for name, value in saved.items() if name.startswith("env_statistics")}
    # at construction and at each of 3 x 6 steps 8 environments were seen, and the 24 episodes' beginnings
    assert statistics["env_statistics.observation.0.count"].item() == pytest.approx(8 * 19 + 24)
    agent = build_agent(cfg, build_env(cfg))
    agent.load_state_dict(saved)
    result = evaluate_agent(cfg, agent, 16)
    assert result.mean_reward == summary["mean_reward"]
    assert result.mean_reward in np.arange(-16, 17, 2) / 16
    assert torch.equal(agent.state_dict()["env_statistics.reward.mean"], statistics["env_statistics.reward.mean"])


def test_torchrls_collector_fills_the_agents_statistics_too(tmp_path: Path) -> None:
    cfg = load_config(overrides=[*SMALL, *ALL, "collector=single", f"logger.base_dir={tmp_path}"])
    run_experiment(cfg)
    (run,) = tmp_path.iterdir()
    saved = load_checkpoint(run / "checkpoints" / "last.pt")["agent"]
    assert saved["env_statistics.observation.0.count"] >= 8 * 18


def test_an_agent_without_normalisation_has_no_statistics() -> None:
    cfg = load_config(overrides=SMALL)
    assert not [name for name in build_agent(cfg, build_env(cfg)).state_dict() if "statistics" in name]


@pytest.mark.parametrize("option", ["normalize_observation", "normalize_reward"])
def test_statistics_over_several_processes_are_refused(option: str) -> None:
    cfg = load_config(overrides=[*SMALL, "collector=multi_sync", f"transforms.{option}=true"])
    with pytest.raises(ConfigError, match=f"transforms.{option} keeps one statistic .* use collector=rollout"):
        build_trainer(cfg)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("transforms.frame_stack=0", "transforms.frame_stack must be greater than 0"),
        ("transforms.clip_reward=-1", "transforms.clip_reward must be greater than 0"),
        ("transforms.clip_reward=nan", "transforms.clip_reward must be a finite number; got nan"),
        ("transforms.previous_acton=true", "did you mean 'transforms.previous_action'"),
    ],
)
def test_bad_values(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=[override])


def test_exploration_noise_is_standard_normal_at_each_step_and_correlated_over_steps() -> None:
    options = ["env=gymnasium", "id=Pendulum-v1", "env.num_envs=64", "transforms.noise_steps=5"]
    env = build_env(load_config(overrides=[*options, "env.max_episode_steps=7"]))
    torch.manual_seed(0)
    steps = env.rollout(210, break_when_any_done=False)
    noise, starts = steps["exploration_noise"][..., 0], steps["is_init"][..., 0]
    assert abs(float(noise.mean())) < 0.1
    assert abs(float(noise.std()) - 1.0) < 0.05
    within = ~starts[:, 1:]
    inside = (noise[:, 1:] * noise[:, :-1])[within].mean(), (noise[:, 1:] * noise[:, :-1])[~within].mean()
    torch.testing.assert_close(torch.stack(inside), torch.tensor([0.8, 0.0]), atol=0.1, rtol=0.0)  # 1 - 1 / 5


@pytest.mark.parametrize("squash", [False, True])
def test_actions_take_their_randomness_from_the_noise(squash: bool) -> None:
    options = ["env=gymnasium", "id=Pendulum-v1", "env.num_envs=4", f"agent.squash={str(squash).lower()}"]
    cfg = load_config(overrides=[*options, "transforms.noise_steps=8", "train.total_timesteps=1024"])
    trainer, agent, _ = build_trainer(cfg)
    step = agent(trainer.collector.env.reset())
    before = step["loc"] + step["scale"] * step["exploration_noise"]
    expected = 2.0 * torch.tanh(before) if squash else before  # Pendulum's actions are in [-2, 2]
    torch.testing.assert_close(step["action"], expected)
    alone = torch.distributions.Normal(step["loc"], step["scale"]).log_prob(before)
    if squash:  # change of variables
        alone = alone - torch.log(2.0 * (1.0 - torch.tanh(before) ** 2))
    torch.testing.assert_close(step["action_log_prob"], alone.sum(-1), atol=1e-4, rtol=1e-4)
    for metrics in trainer.run():
        assert metrics["ratio_error"] < 1e-5
    trainer.close()


def test_noise_needs_continuous_actions() -> None:
    with pytest.raises(ConfigError, match="noise_steps needs continuous actions"):
        build_env(load_config(overrides=["env=gymnasium", "id=CartPole-v1", "transforms.noise_steps=8"]))
