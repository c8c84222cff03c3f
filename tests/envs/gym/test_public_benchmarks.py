"""Public benchmarks by their ids: what TorchRL sees is what the packages themselves give."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Binary, Bounded, Categorical, MultiCategorical
from torchrl.envs import Compose, EnvBase, InitTracker, RewardSum, TransformedEnv
from torchrl.envs.utils import check_env_specs

from cyborg_torchrl import keys
from cyborg_torchrl.config import ConfigError, load_config
from cyborg_torchrl.envs.gym.environment import build_gymnasium
from cyborg_torchrl.envs.gym.public_benchmarks import build_bsuite, build_memory_gym, build_minigrid, build_popgym
from cyborg_torchrl.registry import environments
from cyborg_torchrl.training.builders import build_env, build_trainer, rollout_length
from cyborg_torchrl.training.experiment import run_experiment

gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is not installed: pip install 'cyborg-torchrl[gym]'")

BUILDERS = {
    "popgym": (partial(build_popgym, native=False), "popgym-RepeatFirstEasy-v0"),
    "bsuite": (build_bsuite, "memory_len/10"),
    "minigrid": (build_minigrid, "MiniGrid-MemoryS7-v0"),
    "memory_gym": (build_memory_gym, "MysteryPath-Grid-v0"),
    "gymnasium": (build_gymnasium, "CartPole-v1"),
}
NEEDS = {"popgym": "popgym", "bsuite": "bsuite", "minigrid": "minigrid", "memory_gym": "memory_gym"}


def need(name: str) -> None:
    package = NEEDS.get(name, "gymnasium")
    try:
        importlib.import_module(package)
    except ImportError:
        pytest.skip(f"{package} is not installed: see docs/public_benchmarks.md")


@pytest.fixture(params=sorted(BUILDERS))
def case(request: pytest.FixtureRequest) -> tuple[str, Callable[..., EnvBase], str]:
    need(request.param)
    return (request.param, *BUILDERS[request.param])


def plain_env(name: str, env_id: str) -> Any:
    """One environment as its package makes it."""
    if name == "bsuite":
        import bsuite.bsuite
        import bsuite.sweep
        from shimmy.bsuite_compatibility import BSuiteCompatibilityV0

        return BSuiteCompatibilityV0(bsuite.bsuite.load(env_id.split("/")[0], bsuite.sweep.SETTINGS[env_id]))
    return gymnasium.make(env_id, disable_env_checker=True)


def seen(observation: TensorDict, index: int) -> np.ndarray:
    """What one environment shows of a tensordict, as its package gave it: the image alone of a dictionary."""
    shown = observation["pixels" if "pixels" in observation.keys() else "observation"]
    return (shown if isinstance(shown, torch.Tensor) else shown["image"])[index].numpy()


def test_batch_equals_each_environment_by_itself(case: tuple[str, Callable[..., EnvBase], str]) -> None:
    """Observations, rewards and ends, with resets, of three environments against one after the other."""
    name, build, env_id = case
    steps, count = 150, 3
    env = build(id=env_id, num_envs=count, seed=7)
    check_env_specs(env)
    env.set_seed(7)
    torch.manual_seed(0)
    actions = env.action_spec.space.n
    taken = torch.randint(actions, (steps, count))
    tensordict, rows = env.reset(), []
    for t in range(steps):
        played, following = env.step_and_maybe_reset(tensordict.set("action", taken[t]))
        rows.append(played)
        tensordict = following
    seeds = np.random.SeedSequence(7).generate_state(count)
    resets = 0
    for index in range(count):
        alone = plain_env(name, env_id)
        observation, _ = alone.reset(seed=int(seeds[index]))
        number = 0
        for t in range(steps):
            shown = observation["image"] if isinstance(observation, dict) else observation
            np.testing.assert_array_equal(seen(rows[t], index), shown)
            observation, reward, terminated, truncated, _ = alone.step(int(taken[t, index]))
            shown = observation["image"] if isinstance(observation, dict) else observation
            after = rows[t]["next"]
            np.testing.assert_array_equal(seen(after, index), shown)
            assert after["reward"][index].item() == pytest.approx(float(reward), abs=1e-7)
            assert after["done"][index].item() == (terminated or truncated)
            if name != "memory_gym":  # its time limit is told apart, below
                assert after["terminated"][index].item() == terminated
            if terminated or truncated:
                number += 1
                again = np.random.SeedSequence([int(seeds[index]), number]).generate_state(1)[0]
                observation, _ = alone.reset(seed=int(again))
                resets += 1
    assert resets >= (1 if name == "minigrid" else count)


def test_seeds(case: tuple[str, Callable[..., EnvBase], str]) -> None:
    """The same seed repeats, another differs, and so do the environments of one batch."""
    _, build, env_id = case

    def first_observations(seed: int) -> list[bytes]:
        env = build(id=env_id, num_envs=8, seed=seed)
        tensordict = env.rollout(12, lambda td: td.set("action", torch.zeros(8, dtype=torch.long)))
        return [tensordict["observation" if "observation" in tensordict.keys() else "pixels"][i] for i in range(8)]

    def as_bytes(parts: list[Any]) -> list[bytes]:
        return [(part["image"] if hasattr(part, "keys") else part).numpy().tobytes() for part in parts]

    one, again, other = (as_bytes(first_observations(seed)) for seed in (3, 3, 4))
    assert one == again
    assert one != other
    assert len(set(one)) > 1
    assert sorted(one)[1:] != sorted(other)[:-1]


def test_seeding_leaves_the_running_episodes_alone() -> None:
    """TorchRL's own wrapper would reset here, and what a collector holds would no longer be what it acts on."""
    env, same = (build_gymnasium(num_envs=2, seed=0) for _ in range(2))
    tensordicts = [e.reset() for e in (env, same)]
    env.set_seed(5)
    action = torch.tensor([0, 1])
    stepped = [e.step(td.set("action", action)) for e, td in zip((env, same), tensordicts, strict=True)]
    assert torch.equal(stepped[0]["next", "observation"], stepped[1]["next", "observation"])
    fresh = build_gymnasium(num_envs=2, seed=5)
    assert torch.equal(env.reset()["observation"], fresh.reset()["observation"])


def test_partial_resets_touch_only_those_asked() -> None:
    env = build_gymnasium(num_envs=3, seed=0)
    tensordict = env.step(env.reset().set("action", torch.zeros(3, dtype=torch.long)))["next"]
    before = tensordict["observation"].clone()
    tensordict.set("_reset", torch.tensor([[False], [True], [False]]))
    after = env.reset(tensordict)["observation"]
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert not torch.equal(after[1], before[1])


def test_time_limits_are_truncations() -> None:
    env = build_gymnasium(num_envs=2, max_episode_steps=3, seed=0)
    assert env.max_episode_steps == 3
    steps = env.rollout(3)
    assert steps["next", "truncated"][:, :, 0].tolist() == [[False, False, True]] * 2
    assert not steps["next", "terminated"].any()
    assert build_gymnasium(num_envs=1).max_episode_steps == 500  # CartPole's own


def test_frame_skip_sums_rewards_and_stops_at_the_end() -> None:
    env = build_gymnasium(num_envs=1, frame_skip=4, seed=0)
    assert env.max_episode_steps == 125
    env.set_seed(0)
    steps = env.rollout(20, lambda td: td.set("action", torch.zeros(1, dtype=torch.long)))
    alone = gymnasium.make("CartPole-v1")
    alone.reset(seed=int(np.random.SeedSequence(0).generate_state(1)[0]))
    length, terminated = 0, False
    while not terminated:
        _, _, terminated, _, _ = alone.step(0)
        length += 1
    expected = [4.0] * (length // 4) + ([float(length % 4)] if length % 4 else [])
    assert length % 4
    assert steps["next", "reward"].flatten().tolist() == expected


def test_continuous_actions_are_clipped_and_keep_their_bounds() -> None:
    env = build_gymnasium(id="Pendulum-v1", num_envs=2, seed=0)
    assert isinstance(env.action_spec, Bounded)
    assert env.action_spec.space.high.flatten().tolist() == [2.0, 2.0]
    far, near = (build_gymnasium(id="Pendulum-v1", num_envs=1, seed=0) for _ in range(2))
    stepped = [e.step(e.reset().set("action", torch.tensor([[a]]))) for e, a in ((far, 50.0), (near, 2.0))]
    assert torch.equal(stepped[0]["next", "observation"], stepped[1]["next", "observation"])
    assert torch.equal(stepped[0]["next", "reward"], stepped[1]["next", "reward"])


class Zoo(gymnasium.Env):
    """One of each kind of space; shows what it was told."""

    observation_space = gymnasium.spaces.Dict(
        {
            "pair": gymnasium.spaces.Tuple(
                (gymnasium.spaces.Discrete(3, start=5), gymnasium.spaces.MultiDiscrete([2, 4]))
            ),
            "bits": gymnasium.spaces.MultiBinary(2),
            "text": gymnasium.spaces.Text(5),
        }
    )
    action_space = gymnasium.spaces.MultiDiscrete([2, 3])

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self._shown(np.array([1, 3])), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self._shown(np.array([action[0], action[1] + 1])), float(action[1]), False, False, {}

    def _shown(self, pair: np.ndarray) -> dict[str, Any]:
        return {"pair": (5 + pair[0], pair), "bits": np.array([1, 0], dtype=np.int8), "text": "word"}


@pytest.fixture
def zoo() -> str:
    gymnasium.register("CyborgTests/Zoo-v0", entry_point=Zoo)
    yield "CyborgTests/Zoo-v0"
    del gymnasium.registry["CyborgTests/Zoo-v0"]


def test_every_kind_of_space(zoo: str) -> None:
    env = build_gymnasium(id=zoo, num_envs=2, seed=0)
    check_env_specs(env)
    spec = env.observation_spec["observation"]
    assert set(spec.keys(True, True)) == {("pair", "0"), ("pair", "1"), "bits"}
    assert isinstance(spec["pair", "0"], Categorical)
    assert spec["pair", "0"].n == 3
    assert isinstance(spec["pair", "1"], MultiCategorical)
    assert isinstance(spec["bits"], Binary)
    assert isinstance(env.action_spec, MultiCategorical)
    stepped = env.step(env.reset().set("action", torch.tensor([[1, 2], [0, 1]])))["next"]
    assert stepped["observation", "pair", "0"].tolist() == [1, 0]  # starts at 0
    assert stepped["observation", "pair", "1"].tolist() == [[1, 3], [0, 2]]
    assert stepped["observation", "bits"].tolist() == [[1, 0]] * 2
    assert stepped["reward"].tolist() == [[2.0], [1.0]]


def test_unknown_lengths_get_a_rollout_of_128_steps(zoo: str) -> None:
    cfg = load_config(overrides=["env=gymnasium", f"id={zoo}"])
    assert rollout_length(cfg, build_env(cfg)) == 128


def play(env: EnvBase, policy: Callable[[TensorDict, TensorDict | None], torch.Tensor], steps: int) -> torch.Tensor:
    """Returns of the episodes that a policy of all that was seen ends within some steps."""
    env = TransformedEnv(env, Compose(InitTracker(), RewardSum()))
    tensordict, first = env.reset(), None
    returns = []
    for _ in range(steps):
        is_init = tensordict["is_init"]
        shown = tensordict["observation"].reshape(env.batch_size[0], -1).float()
        first = shown if first is None else torch.where(is_init, shown, first)
        played, tensordict = env.step_and_maybe_reset(tensordict.set("action", policy(shown, first)))
        returns.append(played["next", "episode_reward"][played["next", "done"]])
    return torch.cat(returns)


def test_oracle_of_repeat_first() -> None:
    need("popgym")
    returns = play(build_popgym(num_envs=8, seed=0), lambda shown, first: first[:, 0].long(), 153)
    assert len(returns) == 24
    assert returns.tolist() == pytest.approx([1.0] * 24)


def test_oracle_of_memory_length() -> None:
    need("bsuite")
    env = build_bsuite(num_envs=8, seed=0)
    assert env.max_episode_steps == 13
    returns = play(env, lambda shown, first: (first[:, 2] > 0).long(), 39)
    assert returns.tolist() == [1.0] * 24
    longer = build_bsuite(num_envs=1, seed=0, options={"memory_length": 30})
    assert longer.max_episode_steps == 31


def test_minigrid_success_is_a_termination_with_a_reward() -> None:
    """Forward twice, right, forward twice reaches the goal of the empty 5 x 5 room."""
    need("minigrid")
    env = build_minigrid(id="MiniGrid-Empty-5x5-v0", num_envs=2, seed=0)
    assert env.max_episode_steps == 100
    path = iter([2, 2, 1, 2, 2])
    steps = env.rollout(5, lambda td: td.set("action", torch.tensor([next(path), 0])))
    assert steps["next", "success"][:, :, 0].tolist() == [[False] * 4 + [True], [False] * 5]
    assert steps["next", "terminated"][0, -1]
    assert steps["next", "reward"][0, -1].item() == pytest.approx(1 - 0.9 * 5 / 100)
    assert steps["observation", "direction"][0].tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize(("options", "shape"), [({"rgb": True}, (56, 56, 3)), ({"fully_observable": True}, (5, 5, 3))])
def test_minigrid_views(options: dict[str, bool], shape: tuple[int, ...]) -> None:
    need("minigrid")
    env = build_minigrid(id="MiniGrid-Empty-5x5-v0", num_envs=2, seed=0, **options)
    shown = env.reset()["pixels" if "rgb" in options else ("observation", "image")]
    assert shown.shape == (2, *shape)
    assert shown.dtype == torch.uint8


def test_memory_gym_time_limit_is_a_truncation() -> None:
    need("memory_gym")
    env = build_memory_gym(id="MysteryPath-Grid-v0", num_envs=2, options={"max_steps": 4}, seed=0)
    assert env.max_episode_steps == 4
    steps = env.rollout(4, lambda td: td.set("action", torch.zeros(2, dtype=torch.long)))
    assert steps["next", "truncated"][:, :, 0].tolist() == [[False] * 3 + [True]] * 2
    assert not steps["next", "terminated"].any()
    assert not steps["next", "success"].any()
    again = env.rollout(4, lambda td: td.set("action", torch.zeros(2, dtype=torch.long)))  # options hold
    assert again["next", "truncated"][:, -1].all()


def test_memory_gym_outlives_the_closing_of_another() -> None:
    need("memory_gym")
    env, other = (build_memory_gym(num_envs=2, seed=seed) for seed in (0, 1))
    tensordict = env.reset()
    other.reset()
    other.close()
    assert env.step(tensordict.set("action", torch.zeros(2, dtype=torch.long)))["next", "pixels"].any()


def test_memory_gym_death_is_a_termination() -> None:
    """One who never moves fails the first command of Mortar Mayhem that asks to move."""
    need("memory_gym")
    env = build_memory_gym(num_envs=4, seed=0, options={"command_count": [2]})
    steps = env.rollout(40, lambda td: td.set("action", torch.zeros(4, dtype=torch.long)), break_when_any_done=False)
    ended = steps["next", "done"]
    assert ended.any()
    assert torch.equal(ended, steps["next", "terminated"])


IDS = [
    *((name, env_id) for name, (_, env_id) in BUILDERS.items()),
    ("popgym", "popgym-AutoencodeEasy-v0"),  # a tuple is seen
    ("popgym", "popgym-BattleshipEasy-v0"),  # two choices an action
    ("popgym", "popgym-PositionOnlyPendulumEasy-v0"),  # continuous
    ("gymnasium", "Pendulum-v1"),
    ("bsuite", "catch/0"),
]


@pytest.mark.parametrize(("name", "env_id"), IDS, ids=[env_id for _, env_id in IDS])
def test_training_by_configuration_alone(name: str, env_id: str, tmp_path: Path) -> None:
    need(name)
    cfg = load_config(
        "public_benchmark",
        [
            f"env={name}",
            f"id={env_id}",
            "env.num_envs=4",
            "transforms.previous_reward=true",
            "train.n_steps=8",
            "train.seq_len=4",
            "train.num_minibatches=2",
            "train.n_epochs=1",
            "train.total_timesteps=64",
            "encoder.features=8",
            "encoder.convolutions=nature",
            "backbone.hidden_size=8",
            f"logger.base_dir={tmp_path}",
            "logger.progress=false",
            "logger.tensorboard=false",
            "logger.eval_episodes=4" if name in ("bsuite", "popgym") else "logger.eval_episodes=0",
        ],
    )
    summary = run_experiment(cfg)
    assert summary["total_timesteps"] == 64
    run = Path(summary["run_dir"])
    assert run.name.startswith(env_id.replace("/", "_"))
    header, *rows = [line.split(",") for line in (run / "logs" / "metrics.csv").read_text().splitlines()]
    assert len(rows) == 2
    assert all(float(row[header.index("ratio_error")]) < 1e-4 for row in rows)
    assert json.loads((run / "summary.json").read_text())["id"] == env_id


def test_short_form_of_the_id() -> None:
    short, long = (load_config(overrides=["env=bsuite", f"{key}=memory_len/3"]) for key in ("id", "env.id"))
    assert short == long
    assert short.env.id == "memory_len/3"


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("popgym", ["id=popgym-RepeatFristEasy-v0"], "no popgym id .*: did you mean 'popgym-RepeatFirstEasy-v0'"),
        ("popgym", ["id=CartPole-v1"], "no popgym id 'CartPole-v1'"),
        ("popgym", ["id=CountRecall"], "no popgym id 'CountRecall': did you mean 'popgym-CountRecall"),
        ("gymnasium", ["id=xyz"], 'more; all: python -c "import gymnasium; gymnasium.pprint_registry'),
        ("bsuite", ["id=memory_lne/10"], "no bsuite id .*: did you mean 'memory_len/10'"),
        ("bsuite", ["env.options={memory_lenth: 3}"], "memory_lenth"),
        ("minigrid", ["id=MiniGrid-MemryS13-v0"], "no minigrid id .*: did you mean 'MiniGrid-MemoryS13-v0'"),
        ("memory_gym", ["id=MortarMayhem-Gird-v0"], "no memory-gym id .*: did you mean 'MortarMayhem-Grid-v0'"),
        ("memory_gym", ["env.options={comand_count: [3]}"], "comand_count"),
        ("gymnasium", ["id=CartPol-v1"], "no gymnasium id 'CartPol-v1': did you mean 'CartPole-v1'"),
        ("gymnasium", ["env.options={gravitation: 3}"], "'CartPole-v1' with options .*gravitation"),
        ("gymnasium", ["id=ALE/Pongg-v5"], "nothing is registered under 'ALE'. Is its package installed"),
        ("minigrid", ["env.options={agent_view_size: 4}"], "'MiniGrid-MemoryS13-v0' with options .*agent_view_size"),
        ("minigrid", ["env.options={size: 1}"], "'MiniGrid-MemoryS13-v0' with options .*size"),
        ("bsuite", ["env.options={memory_length: -3}"], "'memory_len/10' with options .*memory_length"),
        ("gymnasium", ["env.options=3"], "options must be a mapping, as in 'env.options={g: 5.0}'; got 3"),
        ("gymnasium", ["env.frame_skip=0"], "frame_skip must be >= 1; got 0"),
        ("gymnasium", ["env.max_episode_steps=0"], "max_episode_steps must be >= 1; got 0"),
        ("gymnasium", ["env.workers=3"], "workers = 3 must divide num_envs = 16"),
    ],
)
def test_wrong_input_is_told_in_one_line(name: str, overrides: list[str], message: str) -> None:
    need(name)
    with pytest.raises(ConfigError, match=message) as caught:
        build_env(load_config(overrides=[f"env={name}", *overrides]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "hidden", "command"),
    [
        ("popgym", "popgym", "pip install 'cyborg-torchrl[benchmarks]'"),
        ("bsuite", "bsuite.bsuite", "pip install 'cyborg-torchrl[benchmarks]'"),
        ("bsuite", "shimmy.bsuite_compatibility", "pip install 'cyborg-torchrl[benchmarks]'"),
        ("minigrid", "minigrid.wrappers", "pip install 'cyborg-torchrl[benchmarks]'"),
        ("memory_gym", "memory_gym", "pip install --no-deps memory-gym"),
        ("gymnasium", "gymnasium", "pip install 'cyborg-torchrl[gym]'"),
    ],
)
def test_missing_packages_are_told_with_the_command(
    name: str, hidden: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    need(name)
    monkeypatch.setitem(sys.modules, hidden, None)
    with pytest.raises(ConfigError) as caught:
        build_env(load_config(overrides=[f"env={name}", *(["env.native=false"] if name == "popgym" else [])]))
    assert command in str(caught.value)
    assert "\n" not in str(caught.value)


class Acted(gymnasium.Env):
    """Pays for the action that it was sent."""

    observation_space = gymnasium.spaces.Box(0.0, 1.0, (1,))

    def __init__(self, actions: gymnasium.Space) -> None:
        self.action_space = actions

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        assert self.action_space.contains(action)
        return np.zeros(1, np.float32), float(np.sum(action)), False, False, {}


@pytest.fixture
def acted(monkeypatch: pytest.MonkeyPatch) -> Callable[[gymnasium.Space], str]:
    def register(actions: gymnasium.Space) -> str:
        spec = gymnasium.envs.registration.EnvSpec("Acted-v0", Acted, kwargs={"actions": actions}, max_episode_steps=9)
        monkeypatch.setitem(gymnasium.registry, "Acted-v0", spec)
        return "Acted-v0"

    return register


def test_discrete_actions_may_start_anywhere(acted: Callable[[gymnasium.Space], str]) -> None:
    env = build_gymnasium(id=acted(gymnasium.spaces.Discrete(3, start=5)), num_envs=3, seed=0)
    assert env.action_spec.n == 3
    after = env.step(env.reset().set("action", torch.tensor([0, 1, 2])))
    assert after["next", "reward"].flatten().tolist() == [5.0, 6.0, 7.0]
    many = build_gymnasium(id=acted(gymnasium.spaces.MultiDiscrete([2, 3], start=[10, 20])), num_envs=2, seed=0)
    after = many.step(many.reset().set("action", torch.tensor([[0, 0], [1, 2]])))
    assert after["next", "reward"].flatten().tolist() == [30.0, 33.0]


@pytest.mark.parametrize(
    "actions",
    [
        gymnasium.spaces.Tuple([gymnasium.spaces.Discrete(2)]),
        gymnasium.spaces.Dict({"a": gymnasium.spaces.Discrete(2)}),
    ],
    ids=lambda space: type(space).__name__,
)
def test_actions_without_a_policy_are_told_in_one_line(
    acted: Callable[[gymnasium.Space], str], actions: gymnasium.Space
) -> None:
    with pytest.raises(ConfigError, match="there is no policy for actions in") as caught:
        build_env(load_config(overrides=["env=gymnasium", f"id={acted(actions)}"]))
    assert "\n" not in str(caught.value)


def test_workers_and_worker_collectors_exclude_each_other() -> None:
    cfg = load_config("public_benchmark", ["env=gymnasium", "collector=multi_sync", "env.workers=2"])
    with pytest.raises(ConfigError, match=r"env.workers and collector=multi_sync both start processes"):
        build_trainer(cfg)


def test_registered() -> None:
    for name, (build, _) in BUILDERS.items():
        assert environments.get(name) is (build_popgym if name == "popgym" else build)


@pytest.mark.slow
def test_worker_processes() -> None:
    """Two processes of two environments: resets, seeds and order hold."""
    env = TransformedEnv(build_gymnasium(num_envs=4, workers=2, seed=0), Compose(InitTracker(), RewardSum()))
    try:
        assert env.batch_size == (4,)
        check_env_specs(env)
        env.set_seed(0)
        steps = env.rollout(60, break_when_any_done=False)
        done = steps["next", "done"][:, :-1, 0]
        assert done.any(1).all()
        before, now = steps["next", "observation"][:, :-1], steps["observation"][:, 1:]
        assert torch.equal((before == now).all(-1), ~done)
        assert torch.equal(steps["is_init"][:, 1:, 0], done)
        assert len({tuple(row) for row in steps["observation"][:, 0].tolist()}) == 4
        lengths = steps["next", "episode_reward"][steps["next", keys.DONE]]
        assert (lengths > 5).all()
        env.set_seed(0)
        assert torch.equal(env.reset()["observation"], steps["observation"][:, 0])
    finally:
        env.close()


def test_visible_shows_only_some_numbers() -> None:
    options = {"id": "CartPole-v1", "num_envs": 2, "seed": 3}
    whole, shown = build_gymnasium(**options), build_gymnasium(**options, visible=[2, 0])
    assert shown.observation_spec["observation"].shape == (2, 2)
    torch.testing.assert_close(shown.reset()["observation"], whole.reset()["observation"][:, [2, 0]])


@pytest.mark.parametrize(
    ("env_id", "visible", "message"),
    [("CartPole-v1", [4], "from 0 to 3"), ("CartPole-v1", [], "from 0 to 3"), ("FrozenLake-v1", [0], "of a vector")],
)
def test_visible_refuses_what_is_not_there(env_id: str, visible: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_gymnasium(id=env_id, num_envs=1, visible=visible)
