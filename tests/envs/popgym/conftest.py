"""The package's environments with the random numbers that a native environment has drawn."""

from __future__ import annotations

import importlib
import math
import sys
import warnings
from collections import deque
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cyborg_torchrl.envs.popgym.base import Entries, PopgymEnv
from cyborg_torchrl.envs.popgym.build import FAMILIES

Row = dict[str, np.ndarray]


class Script:
    """A generator of numpy that returns prepared numbers."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.decks = deque(row[name] for name in ("deck", "queries") if name in row)
        self.drawn: np.ndarray | None = None
        """The numbers that the native environment has drawn in a step."""

    def shuffle(self, cards: np.ndarray) -> None:
        # Cards are dealt from the end.
        cards[:] = self.row["table"] if "table" in self.row else self.decks.popleft()[::-1]

    def uniform(self, low: Any, high: Any, size: Any = None) -> np.ndarray:
        return self.row["state"]

    def random(self, size: int | None = None, dtype: Any = None) -> Any:
        return self.drawn if size is None else self.row["chance"]

    def normal(self, mean: float, deviation: np.ndarray) -> np.ndarray:
        drawn = self.row["noise"] if self.drawn is None else self.drawn
        return deviation * drawn

    def choice(self, cells: np.ndarray, size: int, replace: bool) -> np.ndarray:
        return self.row["mines"]


class ScriptedMaze:
    """A maze of the package mazelib, which popgym needs for its mazes, with a prepared grid."""

    generator: Any
    row: Row

    def generate(self) -> None:
        side = math.isqrt(len(self.row["grid"]))
        self.grid = self.row["grid"].reshape(side, side).astype(np.int8)

    def generate_entrances(self, start_outer: bool) -> None:
        side = len(self.grid)
        self.start, self.end = (divmod(int(self.row[name]), side) for name in ("start", "end"))


def _maze_module(monkeypatch: pytest.MonkeyPatch, family: str) -> ModuleType:
    """Import a module of popgym that needs mazelib."""
    names = ("mazelib", "mazelib.generate", "mazelib.generate.HuntAndKill")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["mazelib"].Maze = ScriptedMaze
    sys.modules[names[-1]].HuntAndKill = lambda *sides: None
    name = {"LabyrinthEscape": "labyrinth_escape", "LabyrinthExplore": "labyrinth_explore"}[family]
    for module in ("popgym.core.maze", f"popgym.envs.{name}"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return importlib.import_module(f"popgym.envs.{name}")


def make_package_env(monkeypatch: pytest.MonkeyPatch, family: str, level: str) -> Any:
    """One environment of the package, without wrappers."""
    pytest.importorskip("popgym", reason="popgym is not installed: pip install 'cyborg-torchrl[benchmarks]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        is_maze = family.startswith("Labyrinth")
        module = _maze_module(monkeypatch, family) if is_maze else importlib.import_module("popgym.envs")
        return getattr(module, f"{family.replace('Cartpole', 'CartPole')}{level}")()


@pytest.fixture(name="make_package_env")
def _make_package_env(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Any]:
    return partial(make_package_env, monkeypatch)


def begin(env: Any, row: Row) -> Any:
    """Begin an episode with the random part of a native episode, and return its observation."""
    env._np_random = Script(row)
    ScriptedMaze.row = row
    if "board" in row:
        env.place_ship = lambda board, size: row["board"].reshape(board.shape).astype(board.dtype)
    observation, _ = env.reset()
    return observation


class Recorder:
    """What a native environment draws: rows of new episodes, and numbers in steps."""

    def __init__(self, env: PopgymEnv, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: deque[Row] = deque()
        self.drawn: Tensor | None = None
        draw, drawn_in_step = env._draw, env._random

        def take(count: int) -> Entries:
            drawn = draw(count)
            self.rows += [{name: value[i].numpy() for name, value in drawn.items()} for i in range(count)]
            return env._prepare(drawn)

        def record(*args: Any) -> Tensor:
            self.drawn = drawn_in_step(*args)
            return self.drawn

        monkeypatch.setitem(env.__dict__, "_take", take)
        monkeypatch.setitem(env.__dict__, "_random", record)


def as_package_action(action: Tensor) -> Any:
    return action.item() if action.ndim == 0 else action.numpy()


def parts(observation: Any) -> list[np.ndarray]:
    """The parts of an observation, from the package or from entries."""
    values = observation if isinstance(observation, tuple) else (observation,)
    return [np.asarray(value) for value in values]


def native_parts(entries: dict, index: int) -> list[np.ndarray]:
    return [value[index].numpy() for key, value in entries.items() if key == "observation" or key[0] == "observation"]


def assert_same(native: list[np.ndarray], package: list[np.ndarray]) -> None:
    for ours, theirs in zip(native, package, strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 if ours.dtype.kind == "f" else 0)


Choose = Callable[[PopgymEnv, int], Tensor]


def random_actions(env: PopgymEnv, step: int) -> Tensor:
    return env.action_spec.rand()


@pytest.fixture
def play_both(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, int]]:
    """Player of the same episodes natively and in the package; see `play`."""
    return partial(play, monkeypatch)


def play(
    monkeypatch: pytest.MonkeyPatch, family: str, level: str, *, choose: Choose = random_actions
) -> dict[str, int]:
    """Play the same episodes natively and in the package, compare each step, and count the ends.

    There are at least 1,000 steps and one whole episode. One environment is reset in the middle of an episode.
    """
    num_envs = 4
    torch.manual_seed(0)
    native = FAMILIES[family](num_envs, level=level, seed=1)
    recorder = Recorder(native, monkeypatch)
    package = [make_package_env(monkeypatch, family, level) for _ in range(num_envs)]
    first = native.restart()
    for i, env in enumerate(package):
        assert_same(native_parts(first, i), parts(begin(env, recorder.rows.popleft())))
    counts = dict.fromkeys(("terminated", "truncated", "both"), 0)
    for step in range(max(1000 // num_envs, native.max_episode_steps + 10)):
        action = choose(native, step)
        result = native.advance(action)
        for i, env in enumerate(package):
            env._np_random.drawn = None if recorder.drawn is None else recorder.drawn[i].numpy()
            observation, reward, terminated, truncated, _ = env.step(as_package_action(action[i]))
            assert_same(native_parts(result, i), parts(observation))
            assert result["reward"][i].item() == pytest.approx(float(reward), abs=1e-6)
            ends = (bool(terminated), bool(truncated))
            assert (result["terminated"][i].item(), result["truncated"][i].item()) == ends
            assert result["done"][i].item() == any(ends)
            counts["both" if all(ends) else "terminated"] += ends[0]
            counts["truncated"] += ends[1] and not ends[0]
        is_reset = result["done"].squeeze(-1).clone()
        is_reset[1] |= step == 7  # in the middle of an episode
        if is_reset.any():
            begun = native.restart(is_reset)
            for i, env in enumerate(package):
                if is_reset[i]:
                    assert_same(native_parts(begun, i), parts(begin(env, recorder.rows.popleft())))
                else:
                    assert_same(native_parts(begun, i), native_parts(result, i))
    return counts
