"""The gymnasium ids: gymnasium's own checker, its own vector environment, and the torch environments they wrap."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from cyborg_torchrl import envs
from cyborg_torchrl.registry import environments

gymnasium = pytest.importorskip("gymnasium", reason="pip install 'cyborg-torchrl[gym]'")

from gymnasium.utils.env_checker import check_env  # noqa: E402

from cyborg_torchrl.envs.gym import ids as gymnasium_ids  # noqa: E402

IDS = gymnasium_ids.task_ids()
SHORT = {"horizon": 4}
FLAGS = ("terminated", "truncated")


def make_vec(name: str, num_envs: int, **options: object) -> gymnasium.vector.VectorEnv:
    return gymnasium.make_vec(name, num_envs=num_envs, vectorization_mode="vector_entry_point", **options)


def test_every_registered_task_has_an_id() -> None:
    registered = {environments.get(name) for name in environments.names()}
    tasks = {task for task in registered if isinstance(task, type) and issubclass(task, envs.MemoryTask)}
    assert set(IDS.values()) == tasks
    assert {"CyborgMemory/DelayedCue-v0", "CyborgMemory/NBack-v0", "CyborgMemory/TMaze-v0"} <= set(IDS)
    assert set(IDS) <= set(gymnasium.registry)


@pytest.mark.parametrize("name", IDS)
def test_gymnasiums_checker(name: str) -> None:
    env = gymnasium.make(name, **SHORT)
    assert env.unwrapped.torch_env.horizon == 4
    check_env(env.unwrapped, skip_render_check=True)
    env.close()


@pytest.mark.parametrize("name", IDS)
def test_one_environment_is_the_torch_one(name: str) -> None:
    """Two episodes after one seed, step by step; rewards, ends and success too."""
    env, torch_env = gymnasium.make(name, **SHORT), IDS[name](1, **SHORT)
    torch_env.set_seed(5)
    tensordict = torch_env.reset()
    observation, info = env.reset(seed=5)
    env.action_space.seed(0)
    for episode in range(2):
        done = False
        while not done:
            assert env.observation_space.contains(observation)
            assert np.array_equal(observation, tensordict["observation"][0].numpy())
            assert info == {}
            action = env.action_space.sample()
            after = torch_env.step(tensordict.set("action", torch.tensor([action])))["next"]
            observation, reward, terminated, truncated, info = env.step(action)
            done = terminated or truncated
            assert [reward, terminated, truncated] == [after[key].item() for key in ("reward", *FLAGS)]
            tensordict = after.exclude("reward")
        assert info == {"success": after["success"].item()}
        assert np.array_equal(observation, after["observation"][0].numpy())
        tensordict = torch_env.reset()
        observation, info = env.reset(seed=None if episode == 0 else 6)


@pytest.mark.parametrize("name", IDS)
def test_many_environments_are_the_torch_ones(name: str) -> None:
    """Against the torch environment, reset by hand in the step after each end."""
    num_envs = 6
    env, torch_env = make_vec(name, num_envs, **SHORT), IDS[name](num_envs, **SHORT)
    torch_env.set_seed(7)
    observation, info = env.reset(seed=7)
    tensordict = torch_env.reset()
    assert np.array_equal(observation, tensordict["observation"].numpy())
    assert info == {}
    over = torch.zeros(num_envs, 1, dtype=torch.bool)
    ends, starts = 0, 0
    for _ in range(60):
        action = torch_env.rand_action()["action"]
        seen, reward, terminated, truncated, info = env.step(action.numpy())
        if over.all():
            after = torch_env.reset()
        else:
            after = torch_env.step(TensorDict({"action": action.masked_fill(over.squeeze(-1), 0)}, [num_envs]))["next"]
            if over.any():
                begun = torch_env.reset(TensorDict({"_reset": over}, [num_envs]))
                after["observation"] = torch.where(over, begun["observation"], after["observation"])
        for i in range(num_envs):
            assert np.array_equal(seen[i], after["observation"][i].numpy())
            if over[i]:
                assert (reward[i], terminated[i], truncated[i]) == (0.0, False, False)
            else:
                assert (reward[i], terminated[i]) == (after["reward"][i].item(), after["terminated"][i].item())
            if terminated[i]:
                assert info["_success"][i]
                assert info["success"][i] == after["success"][i].item()
            else:
                assert not info.get("_success", np.zeros(num_envs))[i]
        starts += int(over.sum())
        over = torch.as_tensor(terminated | truncated).unsqueeze(-1)
        ends += int(over.sum())
        assert env.observation_space.contains(seen)
        assert (reward.shape, reward.dtype, terminated.dtype) == ((num_envs,), np.float64, np.bool_)
    assert 0 < starts <= ends


@pytest.mark.parametrize("name", IDS)
def test_vector_of_one_is_gymnasiums_own(name: str) -> None:
    """gymnasium's SyncVectorEnv around one environment, with its autoreset."""
    ours = make_vec(name, 1, **SHORT)
    theirs = gymnasium.make_vec(name, num_envs=1, vectorization_mode="sync", **SHORT)
    assert ours.metadata["autoreset_mode"] == theirs.metadata["autoreset_mode"]
    assert (ours.observation_space, ours.action_space) == (theirs.observation_space, theirs.action_space)
    got, expected = ours.reset(seed=3), theirs.reset(seed=3)
    assert np.array_equal(got[0], expected[0])
    ours.action_space.seed(1)
    for _ in range(60):
        action = ours.action_space.sample()
        got, expected = ours.step(action), theirs.step(action)
        for mine, other in zip(got[:4], expected[:4], strict=True):
            assert np.array_equal(mine, other)
            assert mine.dtype == other.dtype
        assert got[4].keys() == expected[4].keys()
        for key in got[4]:
            assert np.array_equal(got[4][key], expected[4][key])
    theirs.close()


def test_seeds() -> None:
    env = make_vec("CyborgMemory/DelayedCue-v0", 32, horizon=2)
    first, again, other = (env.reset(seed=seed)[0] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(env.reset()[0], other)  # no seed: it goes on
    with pytest.raises(ValueError, match="give one seed, not 32"):
        env.reset(seed=list(range(32)))


def test_a_step_before_the_first_reset_is_refused() -> None:
    for env in (make_vec("CyborgMemory/DelayedCue-v0", 2), gymnasium.make("CyborgMemory/DelayedCue-v0")):
        with pytest.raises(gymnasium.error.ResetNeeded):
            env.step(env.action_space.sample())


@pytest.mark.parametrize("action", [7, -1, 0.5])
def test_actions_outside_the_space_are_refused(action: float) -> None:
    many, one = make_vec("CyborgMemory/DelayedCue-v0", 2, cues=4), gymnasium.make("CyborgMemory/DelayedCue-v0", cues=4)
    many.reset(seed=0), one.reset(seed=0)
    with pytest.raises(ValueError, match=r"actions are whole numbers from 0 to 3; got"):
        many.step(np.asarray([0, action]))
    with pytest.raises(ValueError, match=r"actions are whole numbers from 0 to 3; got"):
        one.step(action)


def test_options_reach_the_task() -> None:
    env = gymnasium.make("CyborgMemory/DelayedCue-v0", horizon=20, cues=7)
    assert (env.unwrapped.torch_env.horizon, env.action_space.n) == (20, 7)
    with pytest.raises(ValueError, match="horizon must be >= 0; got -1"):
        gymnasium.make("CyborgMemory/DelayedCue-v0", horizon=-1)


def test_gymnasium_imports_the_module_that_is_named_before_the_id() -> None:
    script = (
        "import gymnasium; "
        "e = gymnasium.make('cyborg_torchrl.envs.gym.ids:CyborgMemory/TMaze-v0', horizon=3); "
        "e.reset(seed=0); assert e.step(0)[1] == 0.0"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=120)


def test_a_missing_package_is_one_line() -> None:
    script = "import sys; sys.modules['gymnasium'] = None\nimport cyborg_torchrl.envs.gym.ids"
    run = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=120)
    assert "gymnasium is not installed: pip install 'cyborg-torchrl[gym]'" in run.stderr.splitlines()[-1]
