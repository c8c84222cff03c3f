"""The adapter with MineRL's real client against a stub of its protocol: neither Minecraft nor learning is tested."""

from __future__ import annotations

import importlib
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cyborg_torchrl.envs.treechop import minerl
from cyborg_torchrl.envs.treechop.minerl import MineRLTreechop, check_minecraft, import_minerl
from cyborg_torchrl.registry import UnavailableError

pytestmark = [pytest.mark.minerl, pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")]

NOTHING = dict.fromkeys(("attack", "back", "forward", "jump", "left", "right", "sneak", "sprint"), "0")
ATTACK = {**NOTHING, "attack": "1", "camera": "0.0 0.0"}
WALK = {**ATTACK, "forward": "1"}
COMMANDS = {
    "seven": [
        ATTACK,
        WALK,
        {**WALK, "jump": "1"},
        {**ATTACK, "camera": "-10.0 0.0"},
        {**ATTACK, "camera": "10.0 0.0"},
        {**ATTACK, "camera": "0.0 10.0"},
        {**ATTACK, "camera": "0.0 -10.0"},
    ],
    "five": [WALK, ATTACK, {**WALK, "jump": "1"}, {**WALK, "camera": "0.0 -10.0"}, {**WALK, "camera": "0.0 10.0"}],
    "turn_22_5": [
        ATTACK,
        WALK,
        {**WALK, "jump": "1"},
        {**ATTACK, "camera": "-22.5 0.0"},
        {**ATTACK, "camera": "22.5 0.0"},
        {**ATTACK, "camera": "0.0 22.5"},
        {**ATTACK, "camera": "0.0 -22.5"},
    ],
}
"""What has to reach Malmo for each action, written out."""


def shown_step(observation: dict[str, np.ndarray]) -> int:
    """The step that the stub's picture shows in its first row."""
    return struct.unpack("<H", observation["pixels"][0, 0, :2].tobytes())[0]


def parsed(message: str) -> dict[str, str]:
    """The commands of a step as they reached the stub."""
    body = message.removeprefix("<StepClient0>").removesuffix("</StepClient0 >")
    return dict(line.split(" ", 1) for line in body.splitlines())


def play(env: MineRLTreechop, steps: int, action: int = 0) -> list[tuple[Any, ...]]:
    return [env.step(action) for _ in range(steps)]


@pytest.mark.parametrize("table", COMMANDS)
def test_spaces_are_minerls(table: str, launcher: Callable[[], Any]) -> None:
    env = MineRLTreechop(table, make=launcher)
    theirs = import_minerl().make("MineRLTreechop-v0")
    pov = theirs.observation_space.spaces["pov"]
    ours = env.observation_space["pixels"]
    assert (ours.shape, ours.dtype) == (tuple(pov.shape), pov.dtype)
    assert np.array_equal(ours.low, np.broadcast_to(pov.low, ours.shape))
    assert np.array_equal(ours.high, np.broadcast_to(pov.high, ours.shape))
    assert env.action_space.n == len(COMMANDS[table])
    for command in env._commands:
        assert set(command) == set(theirs.action_space.spaces)
        assert all(np.asarray(value) in theirs.action_space.spaces[key] for key, value in command.items())
    assert theirs.spec.max_episode_steps == minerl.EPISODE


@pytest.mark.parametrize("table", COMMANDS)
def test_the_table_is_what_reaches_malmo(table: str, launcher: Any, commands_of: Callable[[], list[str]]) -> None:
    launcher.arguments = ("--log-steps",)
    env = MineRLTreechop(table, make=launcher)
    env.reset(seed=0)
    for action in range(env.action_space.n):
        env.step(action)
    assert [parsed(command) for command in commands_of()] == COMMANDS[table]


@pytest.mark.parametrize("server_ends_too", [False, True])
def test_a_whole_episode_is_cut_off_at_its_limit(server_ends_too: bool, launcher: Any) -> None:
    """8000 steps, also where Malmo's own clock ends the mission at the same step, which loses MineRL's flag."""
    launcher.arguments = ("--reward-every", "200", *(("--time-up", "8000") if server_ends_too else ()))
    env = MineRLTreechop(make=launcher)
    observation, _ = env.reset(seed=0)
    assert shown_step(observation) == 0
    total = 0.0
    for step in range(1, 8001):
        observation, reward, terminated, truncated, info = env.step(step % 7)
        assert shown_step(observation) == step
        assert reward == float(step % 200 == 0)
        assert not terminated
        assert truncated == info["TimeLimit.truncated"] == (step == 8000)
        total += reward
    assert total == 40.0
    assert observation["pixels"].flags.c_contiguous
    assert observation in env.observation_space


def test_a_shorter_limit_is_a_truncation_too(launcher: Any) -> None:
    launcher.arguments = ("--time-up", "30")
    env = MineRLTreechop(max_episode_steps=30, make=launcher)
    env.reset(seed=0)
    assert [step[2:4] for step in play(env, 30)] == [(False, False)] * 29 + [(False, True)]


def test_64_logs_end_the_episode(launcher: Any) -> None:
    launcher.arguments = ("--reward-every", "2")
    env = MineRLTreechop(make=launcher)
    env.reset(seed=0)
    steps = play(env, 128)
    assert sum(step[1] for step in steps) == 64.0
    assert [step[2:4] for step in steps] == [(False, False)] * 127 + [(True, False)]
    env.reset()  # and another can begin
    assert play(env, 1)[0][2:4] == (False, False)


def test_every_episode_is_seeded(launcher: Any) -> None:
    """MineRL forgets its seed at each reset; ours draws one for each episode, the same ones from the same seed."""
    env = MineRLTreechop(max_episode_steps=2, make=launcher)
    for seed in (3, None, None, 3, None, None, 4, None, None):
        env.reset(seed=seed)
        play(env, 2)
    env.close()
    stub = launcher.stubs[0]
    stub.end()
    assert len(launcher.stubs) == 1
    seeds = [int(mission["token"].split(":")[5]) for mission in stub.missions]
    assert seeds[:3] == seeds[3:6]
    assert len(set(seeds)) == 6
    assert all('type="log"' in mission["mission"] for mission in stub.missions)


@pytest.mark.parametrize("die_after", ["nothing", "picture", "reward", "all"])
def test_a_lost_minecraft_cuts_the_episode_off(die_after: str, launcher: Any) -> None:
    """Wherever in an answer it dies: nothing that MineRL makes up reaches the agent, and the next episode is played."""
    launcher.arguments = ("--reward-every", "1", "--die-at", "5", "--die-after", die_after)
    env = MineRLTreechop(make=launcher, wait=0.0)
    env.reset(seed=0)
    steps = play(env, 4)
    lost = env.step(0)
    if die_after == "all":  # step 5 was played in full
        assert (shown_step(lost[0]), *lost[1:4]) == (5, 1.0, False, False)
        steps, lost = [*steps, lost], env.step(0)
    assert [shown_step(step[0]) for step in steps] == list(range(1, len(steps) + 1))
    assert all(step[1:4] == (1.0, False, False) for step in steps)
    assert np.array_equal(lost[0]["pixels"], steps[-1][0]["pixels"])
    assert lost[1:4] == (0.0, False, True)
    assert "error" in lost[4]
    launcher.arguments = ()
    assert shown_step(env.reset()[0]) == 0
    assert [shown_step(step[0]) for step in play(env, 8)] == list(range(1, 9))
    assert len(launcher.stubs) == 2


def test_a_minecraft_that_dies_between_episodes_is_restarted(launcher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without MineRL's own answer to it, which is to start another one and forget it."""
    launched: list[Any] = []
    import_minerl()
    malmo = importlib.import_module("minerl.env.malmo")
    monkeypatch.setattr(malmo.MinecraftInstance, "launch", lambda instance, **_: launched.append(instance))
    env = MineRLTreechop(max_episode_steps=2, make=launcher, wait=0.0)
    env.reset(seed=0)
    play(env, 2)
    launcher.stubs[0].end()
    assert shown_step(env.reset()[0]) == 0
    assert play(env, 2)[-1][3]
    assert len(launcher.stubs) == 2
    assert not launched


def test_waits_double_until_it_runs(launcher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(minerl.time, "sleep", waits.append)
    failures = iter(range(4))

    def make() -> Any:
        if next(failures, None) is not None:
            raise ConnectionError
        return launcher()

    env = MineRLTreechop(make=make)
    env.reset(seed=0)
    assert waits == [1.0, 2.0, 4.0, 8.0]


def test_it_gives_up_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(minerl.time, "sleep", waits.append)

    def make() -> Any:
        raise ConnectionError

    with pytest.raises(UnavailableError, match=r"^Minecraft could not be restarted in 9 attempts.*$"):
        MineRLTreechop(make=make, attempts=9).reset(seed=0)
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]


def test_a_missing_minecraft_is_explained_at_once() -> None:
    output = "Downloading...\nException in thread main java.net.UnknownHostException: x\n at y\n\nfinished unexpectedly"

    def make() -> Any:
        raise EOFError(output)

    with pytest.raises(UnavailableError, match=r"^Minecraft did not start.*Java 8.*UnknownHostException: x$"):
        MineRLTreechop(make=make).reset(seed=0)


def test_a_longer_episode_than_minerls_is_refused() -> None:
    with pytest.raises(ValueError, match="8000 at most"):
        MineRLTreechop(max_episode_steps=8001)


def test_real_minecraft() -> None:
    """Turning the camera changes what is seen; 100 steps are cut off at their limit."""
    env = MineRLTreechop(max_episode_steps=100)
    try:
        check_minecraft()
        first, _ = env.reset(seed=0)
    except UnavailableError as error:
        pytest.skip(f"Minecraft not installed: {error}")
    steps = play(env, 100, action=5)
    assert any(not np.array_equal(step[0]["pixels"], first["pixels"]) for step in steps)
    assert all(step[0] in env.observation_space for step in steps)
    assert steps[-1][2:4] == (False, True)
    env.close()
