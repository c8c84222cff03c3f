"""Endless T-maze and Color-Cubes by hand, and policies that do not rewrite what they remember."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cyborg_torchrl.envs import ColorCubesEnv, EndlessTMazeEnv, MemoryTask, memoryless_policy, oracle_policy
from cyborg_torchrl.envs.memory.task import Memory, ReferencePolicy

FORWARD, LEFT, RIGHT = range(3)


def success(env: MemoryTask, policy: ReferencePolicy) -> float:
    rollout = env.rollout(2 * env.max_episode_steps, policy, break_when_any_done=False)
    return rollout["next", "success"][rollout["next", "done"]].mean().item()


def played(env: MemoryTask, actions: list[int]) -> list[tuple[list[float], float, bool, float]]:
    """What one environment shows after each action, with the reward, the end and the success."""
    result = []
    for action in actions:
        observation, succeeded, reward, is_over = env.advance(torch.tensor([action]))
        result.append((observation[0].tolist(), round(reward.item(), 6), is_over.item(), succeeded.item()))
    return result


def maze(cues: list[int], lengths: list[int], horizon: int) -> EndlessTMazeEnv:
    env = EndlessTMazeEnv(1, corridors=len(cues), horizon=horizon, seed=0)
    env.restart()
    env._latents.update(cue=torch.tensor([cues]), length=torch.tensor([lengths]))
    return env


def test_corridors_by_hand() -> None:
    env = maze([1, 0], [2, 1], horizon=2)
    assert env._observed()[0].tolist() == [[0.0, 1.0, 0.0]]
    assert played(env, [FORWARD, LEFT, FORWARD, RIGHT, FORWARD, LEFT]) == [
        ([0.0, 0.0, 0.5], -0.01, False, 0.0),
        ([0.0, 0.0, 0.5], -0.01, False, 0.0),  # a turn before the end
        ([0.0, 0.0, 1.0], -0.01, False, 0.0),
        ([1.0, 0.0, 0.0], 1.0, False, 0.0),  # the second corridor, with its cue
        ([0.0, 0.0, 0.5], -0.01, False, 0.0),
        ([0.0, 0.0, 0.0], 1.0, True, 1.0),
    ]


@pytest.mark.parametrize("action", [FORWARD, RIGHT])
def test_a_wrong_turn_ends_the_episode(action: int) -> None:
    assert played(maze([0, 0], [1, 1], horizon=1), [FORWARD, LEFT, FORWARD, action])[-1][1:] == (-1.0, True, 0.0)


def test_the_time_limit_of_corridors() -> None:
    env = maze([0, 0], [3, 3], horizon=3)
    steps = played(env, [LEFT] * env.max_episode_steps)
    assert env.max_episode_steps == 6 * 4 * 2
    assert [over for _, _, over, _ in steps] == [False] * 47 + [True]
    assert {reward for _, reward, _, _ in steps} == {-0.01}


def test_random_lengths_are_uniform() -> None:
    env = EndlessTMazeEnv(4000, horizon=4, corridors=3, random_lengths=True, seed=0)
    env.restart()
    counts = torch.stack([column.bincount(minlength=5) for column in env._latents["length"].T])
    assert (counts[:, 0] == 0).all()
    assert ((counts[:, 1:] - 1000).abs() < 150).all()


@pytest.mark.parametrize("random_lengths", [False, True])
def test_the_first_cue_alone_fails(random_lengths: bool) -> None:
    env = EndlessTMazeEnv(1000, horizon=4, corridors=4, random_lengths=random_lengths, seed=0)

    def keep_first(observation: Tensor, memory: Memory) -> Tensor:
        is_first = env._time == 0
        seen = observation[:, :2].argmax(-1) + LEFT
        memory["first"] = torch.where(is_first, seen, memory.get("first", seen))
        return env._walk(observation, memory, memory["first"])

    assert success(env, oracle_policy(env)) == 1.0
    assert (
        abs(success(env, ReferencePolicy(keep_first)) - 1 / 8) < 0.03
    )  # the first turn is right, the others by chance
    assert success(env, memoryless_policy(env)) < 1 / 16 + 0.03


def cubes(cells: list[int], agent: int, target: int, luck: list[list[float]], **options: object) -> ColorCubesEnv:
    """Return one environment with a grid of 3 by 3, and the draws of its first steps."""
    env = ColorCubesEnv(1, cubes=len(cells), phases=2, grid=3, seed=0, **options)
    env.restart()
    env._latents.update(agent=torch.tensor([agent]), cube=torch.tensor([cells]), target=torch.tensor([target]))
    env._latents["luck"][:, :, 0] = 1.0  # nothing teleports at other steps
    env._latents["luck"][0, : len(luck)] = torch.tensor(luck).reshape(-1, 4)
    return env


def place(cell: int | None) -> list[float]:
    return [float(cell is not None and cell // 3 == i) for i in range(3)] + [
        float(cell is not None and cell % 3 == i) for i in range(3)
    ]


def shown(agent: int, cells: list[int | None], target: int | None, flag: float) -> list[float]:
    names = [float(target == i) for i in range(len(cells))]
    return [*place(agent), *(number for cell in cells for number in place(cell)), *names, flag]


NOTHING = [None, None]


@pytest.mark.parametrize("hide_colours", [False, True])
def test_cubes_by_hand(hide_colours: bool) -> None:
    up, down, left, right, interact = range(5)
    no_event = [1.0, 0.0, 0.0, 0.0]
    # In the third step the other cube teleports, to the third of seven free cells: 0, 2, 3, 4, 5, 6 and 7.
    # In the fourth step the target is reached. It teleports to the first free cell.
    luck = [no_event, no_event, [0.0, 0.0, 0.4, 0.0], no_event]
    env = cubes([8, 1], agent=3, target=1, luck=luck, hide_colours=hide_colours)
    assert env._observed()[0].tolist() == [shown(3, [8, 1], 1, 1.0)]
    after = played(env, [left, up, right, interact])
    assert after[:2] == [
        (shown(3, NOTHING, None, 0.0), -0.01, False, 0.0),
        (shown(0, NOTHING, None, 0.0), -0.01, False, 0.0),
    ]
    assert after[2] == (shown(1, [1, 3] if hide_colours else [3, 1], None, float(not hide_colours)), -0.01, False, 0.0)
    assert after[3][1:] == (1.0, False, 0.0)
    assert after[3][0] == shown(1, [0, 3] if hide_colours else [3, 0], 0, float(not hide_colours))
    after = played(env, [down, left, interact])
    assert [step[1:] for step in after] == [(-0.01, False, 0.0), (-0.01, False, 0.0), (1.0, True, 1.0)]


def test_an_interaction_elsewhere_ends_the_episode() -> None:
    env = cubes([8, 1], agent=8, target=1, luck=[])
    assert played(env, [4])[0][1:] == (0.0, True, 0.0)


def test_waiting_ignores_actions() -> None:
    env = cubes([8, 1], agent=3, target=1, luck=[], horizon=2)
    env._latents["wait"] = torch.tensor([2])
    assert [step[0][:6] for step in played(env, [4, 0, 0])] == [place(3), place(3), place(0)]


def test_cubes_teleport_as_often_as_they_should_and_to_free_cells() -> None:
    env = ColorCubesEnv(500, level="medium", teleport=0.3, seed=0)
    env.restart()
    counts = torch.zeros(3)
    for _ in range(40):
        before, target = env._latents["cube"], env._latents["target"]
        env.advance(torch.randint(4, (500,)))
        cube, agent = env._latents["cube"], env._latents["agent"]
        has_moved = cube != before
        assert not has_moved.gather(1, target.unsqueeze(1)).any()
        assert (has_moved.sum(1) <= 1).all()
        assert not (has_moved & (cube == agent.unsqueeze(1))).any()
        assert (cube.sort(-1).values.diff() > 0).all()
        counts += has_moved.sum(0)
    assert abs(counts.sum() / 20_000 - 0.3) < 0.02
    assert counts.min() > 0.3 * counts.sum()


@pytest.mark.parametrize("level", ["trivial", "medium", "extreme"])
def test_a_map_that_is_not_rewritten_fails(level: str) -> None:
    env = ColorCubesEnv(500, level=level, seed=0)
    end = 2 * env.grid * (env.cubes + 1)

    def keep_first(observation: Tensor, memory: Memory) -> Tensor:
        is_later = (env._time > 0).unsqueeze(-1)
        stale = observation.clone()
        stale[:, 2 * env.grid : end] = stale[:, 2 * env.grid : end].masked_fill(is_later, 0.0)
        stale[:, -1:] = stale[:, -1:].masked_fill(is_later, 0.0)
        return env._oracle(stale, memory)

    assert success(env, oracle_policy(env)) == 1.0
    assert success(env, memoryless_policy(env)) < (0.08 if level == "trivial" else 0.02)
    if level != "trivial":  # one target, which does not move before it is reached
        assert success(env, ReferencePolicy(keep_first)) < 0.25


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match=r"teleport must be from 0 to 1; got 1.5"):
        ColorCubesEnv(2, teleport=1.5)
    with pytest.raises(ValueError, match=r"cubes must be <= grid \*\* 2 - 2 = 2; got 3"):
        ColorCubesEnv(2, cubes=3, grid=2)
    with pytest.raises(ValueError, match=r"unknown level 'easy'"):
        ColorCubesEnv(2, level="easy")
