"""The gymnasium ids of the native POPGym environments, against the torch environments and popgym's own ids."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from cyborg_torchrl.envs.popgym.build import build_native, native_ids

gymnasium = pytest.importorskip("gymnasium", reason="pip install 'cyborg-torchrl[gym]'")

from gymnasium.utils.env_checker import check_env  # noqa: E402

from cyborg_torchrl.envs.gym import popgym_ids  # noqa: E402

IDS = [name for name in native_ids() if "Easy" in name]


def parts(observation: Any) -> list[np.ndarray]:
    return list(observation) if isinstance(observation, tuple) else [observation]


def assert_same(observation: Any, entries: dict) -> None:
    expected = [value for key, value in entries.items() if key == "observation" or key[0] == "observation"]
    for mine, theirs in zip(parts(observation), expected, strict=True):
        assert np.array_equal(mine, theirs.numpy())


def make_vec(name: str, num_envs: int) -> gymnasium.vector.VectorEnv:
    return gymnasium.make_vec(
        f"{popgym_ids.NAMESPACE}/{name}", num_envs=num_envs, vectorization_mode="vector_entry_point"
    )


def test_every_native_environment_has_an_id() -> None:
    assert {f"cyborg_torchrl/{name}" for name in native_ids()} <= set(gymnasium.registry)


@pytest.mark.parametrize("name", IDS)
@pytest.mark.filterwarnings("ignore:.*For Box action spaces")
def test_gymnasiums_checker(name: str) -> None:
    check_env(gymnasium.make(f"cyborg_torchrl/{name}").unwrapped, skip_render_check=True)


@pytest.mark.parametrize("name", IDS)
def test_spaces_are_those_of_popgym(name: str) -> None:
    pytest.importorskip("popgym", reason="popgym is not installed: pip install 'cyborg-torchrl[benchmarks]'")
    if "Labyrinth" in name:
        pytest.skip("popgym registers mazes only with mazelib")
    theirs, ours = gymnasium.make(name, disable_env_checker=True), gymnasium.make(f"cyborg_torchrl/{name}")
    assert str(ours.action_space) == str(theirs.action_space)
    if "Velocity" not in name:  # its bounds are those of float32, and infinite in popgym
        assert str(ours.observation_space) == str(theirs.observation_space)


@pytest.mark.parametrize("name", IDS)
def test_many_environments_are_the_torch_ones(name: str) -> None:
    env, torch_env = make_vec(name, 4), build_native(name, 4, seed=0)
    torch_env.set_seed(7)
    assert_same(env.reset(seed=7)[0], torch_env.restart())
    torch.manual_seed(0)
    is_over = torch.zeros(4, dtype=torch.bool)
    for _ in range(120):
        action = torch_env.action_spec.rand()
        seen, reward, terminated, truncated, _ = env.step(action.numpy())
        entries = torch_env.advance(action)
        expected = [entries[key][:, 0].numpy().copy() for key in ("reward", "terminated", "truncated")]
        if is_over.any():
            entries = torch_env.restart(is_over)
            expected = [np.where(is_over.numpy(), 0, value) for value in expected]
        assert_same(seen, entries)
        assert env.observation_space.contains(seen)
        for mine, value in zip((reward, terminated, truncated), expected, strict=True):
            assert np.array_equal(mine, value)
        is_over = torch.as_tensor(terminated | truncated)


@pytest.mark.parametrize("name", ["popgym-AutoencodeEasy-v0", "popgym-MineSweeperEasy-v0"])
def test_vector_of_one_is_gymnasiums_own(name: str) -> None:
    ours = make_vec(name, 1)
    theirs = gymnasium.make_vec(f"cyborg_torchrl/{name}", num_envs=1, vectorization_mode="sync")
    for mine, other in zip(parts(ours.reset(seed=3)[0]), parts(theirs.reset(seed=3)[0]), strict=True):
        assert np.array_equal(mine, other)
    ours.action_space.seed(1)
    for _ in range(120):
        action = ours.action_space.sample()
        got, expected = ours.step(action), theirs.step(action)
        for mine, other in zip([*parts(got[0]), *got[1:4]], [*parts(expected[0]), *expected[1:4]], strict=True):
            assert np.array_equal(mine, other)


def test_bad_calls_are_refused() -> None:
    env = make_vec("popgym-RepeatPreviousEasy-v0", 2)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(np.asarray([0, 0]))
    with pytest.raises(ValueError, match="give one seed, not 2"):
        env.reset(seed=[1, 2])
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"actions are in MultiDiscrete\(\[4 4\]\); got \[0, 4\]"):
        env.step(np.asarray([0, 4]))


def test_gymnasium_imports_the_module_that_is_named_before_the_id() -> None:
    script = (
        "import gymnasium; "
        "e = gymnasium.make('cyborg_torchrl.envs.gym.popgym_ids:cyborg_torchrl/popgym-RepeatPreviousEasy-v0'); "
        "e.reset(seed=0); assert e.step(0)[1] == 0.0"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=120)
