"""Native POPGym environments as batches: specs, seeds, partial resets, states, draws, and the choice of the package."""

from __future__ import annotations

import importlib.util
import logging
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrl.envs.utils import check_env_specs

from cyborg_torchrl import keys
from cyborg_torchrl.collectors.fused_env import FusedEnv
from cyborg_torchrl.envs import build_popgym
from cyborg_torchrl.envs.gym.batch import _spec_of
from cyborg_torchrl.envs.popgym.base import PopgymEnv
from cyborg_torchrl.envs.popgym.build import FAMILIES, native_ids

NEEDS_POPGYM = pytest.mark.skipif(
    importlib.util.find_spec("popgym") is None,
    reason="popgym is not installed: pip install 'cyborg-torchrl[benchmarks]'",
)
PREDICTIONS = ("RepeatFirst", "RepeatPrevious", "Autoencode", "CountRecall", "HigherLower")
"""Families whose answers change nothing that follows, by their rules."""
RESULTS = (keys.REWARD, keys.TERMINATED, keys.TRUNCATED, keys.DONE)


def flat(entries: dict) -> list[Tensor]:
    """All tensors but "success", which is NaN."""
    return [value for key, value in entries.items() if key != keys.SUCCESS]


def play(env: PopgymEnv, actions: list[Tensor], resets: dict[int, Tensor] | None = None) -> list[list[Tensor]]:
    """Play actions, with restarts after ends and at given steps; return all that was seen."""
    rows = []
    for step, action in enumerate(actions):
        result = env.advance(action)
        is_reset = result[keys.DONE].squeeze(-1).clone()
        if resets and step in resets:
            is_reset |= resets[step]
        begun = env.restart(is_reset) if is_reset.any() else {}
        rows.append([tensor.clone() for tensor in flat(result) + flat(begun)])
    return rows


def actions_for(env: PopgymEnv, steps: int) -> list[Tensor]:
    torch.manual_seed(5)
    return [env.action_spec.rand() for _ in range(steps)]


def assert_equal(rows: list[list[Tensor]], others: list[list[Tensor]]) -> None:
    for row, other in zip(rows, others, strict=True):
        for value, same in zip(row, other, strict=True):
            assert torch.equal(value, same)


@NEEDS_POPGYM
@pytest.mark.parametrize("env_id", [name for name in native_ids() if "Labyrinth" not in name])
def test_specs_are_those_of_the_package(env_id: str) -> None:
    native, package = (build_popgym(id=env_id, num_envs=3, native=is_native) for is_native in (True, False))
    for name in ("observation_spec", "action_spec", "reward_spec", "full_done_spec"):
        assert getattr(native, name) == getattr(package, name)
    assert native.max_episode_steps == package.max_episode_steps
    assert native.is_prediction == package.is_prediction
    ours, theirs = (env.rollout(3, auto_reset=True, break_when_any_done=False) for env in (native, package))
    assert set(ours.keys(True, True)) == set(theirs.keys(True, True))
    for key, value in theirs.items(True, True):
        assert (ours[key].dtype, ours[key].shape) == (value.dtype, value.shape)
    package.close()


@pytest.mark.parametrize("level", ["Easy", "Hard"])
@pytest.mark.parametrize("family", ["LabyrinthEscape", "LabyrinthExplore"])
def test_specs_of_mazes_are_those_of_the_package(
    family: str, level: str, make_package_env: Callable[[str, str], Any]
) -> None:
    package, native = make_package_env(family, level), FAMILIES[family](3, level=level)
    assert native.max_episode_steps == package.max_episode_length
    for name in ("observation", "action"):
        spec = _spec_of(getattr(package, f"{name}_space"), native.device)
        ours = native.action_spec if name == "action" else native.observation_spec[name]
        assert ours == spec.expand(3, *spec.shape)


@NEEDS_POPGYM
def test_every_id_of_the_package_is_native() -> None:
    import gymnasium
    import popgym  # noqa: F401

    assert {name for name in gymnasium.registry if name.startswith("popgym-")} <= set(native_ids())


@pytest.mark.parametrize("env_id", [name for name in native_ids() if "Easy" in name])
def test_torchrl_accepts_it(env_id: str) -> None:
    env = build_popgym(id=env_id, num_envs=3, seed=0)
    check_env_specs(env)
    assert env.is_prediction == env_id.removeprefix("popgym-").startswith(PREDICTIONS)


@pytest.mark.parametrize("family", FAMILIES)
def test_seeds(family: str) -> None:
    envs = [FAMILIES[family](8, seed=seed) for seed in (3, 3, 4)]
    actions = actions_for(envs[0], 30)
    firsts = [flat(env.restart()) for env in envs]
    one, same, other = (play(env, actions) for env in envs)
    assert_equal([firsts[0], *one], [firsts[1], *same])
    seen = [torch.cat([part.double().view(-1) for row in rows for part in row[:2]]) for rows in (one, other)]
    assert not torch.equal(*seen)
    envs[1].set_seed(3)
    assert_equal([flat(envs[1].restart()), *play(envs[1], actions)], [firsts[0], *one])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_state_continues_exactly(family: str) -> None:
    env, other = FAMILIES[family](5, seed=1), FAMILIES[family](5, seed=2)
    actions = actions_for(env, 150)
    env.restart()
    other.restart()
    play(env, actions[:40], {10: torch.tensor([True, False, False, True, False])})
    state = env.get_state()
    expected = play(env, actions[40:])
    assert not other.set_state(state).any()
    assert_equal(play(other, actions[40:]), expected)
    assert not env.set_state(state).any()  # neither environment has written into the state
    assert_equal(play(env, actions[40:]), expected)
    with pytest.raises(ValueError, match="the state is for 5 environments; this one has 2"):
        FAMILIES[family](2).set_state(state)


class Given:
    """The same episodes for a batch and for single environments: a row of draws for each environment, in turn."""

    def __init__(self, env: PopgymEnv, rows: list[list[dict[str, Tensor]]]) -> None:
        self.env, self.rows = env, rows
        self.next = [0] * len(rows)
        self.is_reset = torch.ones(len(rows), dtype=torch.bool)

    def take(self, count: int) -> dict[str, Tensor]:
        chosen = self.is_reset.nonzero().view(-1).tolist()
        drawn = [self.rows[i][self.next[i]] for i in chosen]
        for i in chosen:
            self.next[i] += 1
        return self.env._prepare({name: torch.stack([row[name] for row in drawn]) for name in drawn[0]})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_its_single_environments_and_partial_resets_disturb_no_other(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_envs, steps = 4, 120
    batch = FAMILIES[family](num_envs, seed=0)
    drawn = batch._draw(num_envs * steps)
    rows = [[{name: value[i * steps + j] for name, value in drawn.items()} for j in range(steps)] for i in range(4)]
    actions = actions_for(batch, steps)
    noise = [torch.rand(num_envs, 2) for _ in range(steps)]
    extra = torch.rand(steps, num_envs) < 0.03  # resets in the middle of episodes

    def record(env: PopgymEnv, chosen: list[int]) -> list[list[Tensor]]:
        given = Given(env, [rows[i] for i in chosen])
        monkeypatch.setitem(env.__dict__, "_take", given.take)
        step = 0

        def random(draw: object, *shape: int) -> Tensor:
            return noise[step][chosen] if shape else noise[step][chosen, 0]

        monkeypatch.setitem(env.__dict__, "_random", random)
        played = [[flat(env.restart())[0]]]
        for step in range(steps):
            result = env.advance(actions[step][chosen])
            given.is_reset = result[keys.DONE].squeeze(-1) | extra[step][chosen]
            begun = env.restart(given.is_reset) if given.is_reset.any() else result
            played.append([tensor.clone() for tensor in flat(result)] + [flat(begun)[0].clone()])
        return played

    together = record(batch, [0, 1, 2, 3])
    for i in range(num_envs):
        alone = record(FAMILIES[family](1, seed=9), [i])
        assert_equal([[tensor[i : i + 1] for tensor in row] for row in together], alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fused_step_is_torchrls(family: str) -> None:
    fused_env, env = (FAMILIES[family](4, seed=0) for _ in range(2))
    actions = actions_for(env, 60)
    carried, tensordict = dict(fused_env.restart()), env.reset()
    carried[keys.DONE] = torch.zeros(4, 1, dtype=torch.bool)
    fused = FusedEnv(fused_env)
    for action in actions:
        after, carried, _ = fused.step(carried, {keys.ACTION: action})
        played, tensordict = env.step_and_maybe_reset(tensordict.set(keys.ACTION, action))
        for key in RESULTS:
            assert torch.equal(after[key], played[keys.NEXT, key])
        for key in env._seen:
            assert torch.equal(carried[key], tensordict[key])


def test_decks_are_shuffled_evenly() -> None:
    for family in ("RepeatFirst", "CountRecall", "Concentration"):
        env = FAMILIES[family](1, level="Medium", seed=0)
        for deck in env._draw(2000).values():
            size = deck.shape[1]
            assert torch.equal(deck.sort(1).values, torch.arange(size).expand_as(deck))
            mean = deck[:, [0, size // 2, size - 1]].double().mean(0)
            assert ((mean - (size - 1) / 2).abs() < 4 * size / math.sqrt(12 * 2000)).all()


def test_ships_are_whole_and_evenly_placed() -> None:
    env = FAMILIES["Battleship"](1, seed=0)
    board = env._draw(4000)["board"].view(-1, 8, 8)
    assert (board.sum((1, 2)) == 12).all()
    assert board.max() == 1
    mean = board.double().mean(0)
    for image in (mean.T, mean.flip(0), mean.flip(1)):  # no direction is preferred
        assert (mean - image).abs().max() < 0.05


@NEEDS_POPGYM
def test_ships_are_placed_as_the_package_places_them() -> None:
    from popgym.envs.battleship import BattleshipEasy

    theirs = BattleshipEasy()
    theirs.reset(seed=0)
    boards = []
    for _ in range(1500):
        theirs.reset()
        boards.append(torch.from_numpy(theirs.board.copy()))
    ours = FAMILIES["Battleship"](1, seed=0)._draw(4000)["board"].view(-1, 8, 8)
    assert (ours.double().mean(0) - torch.stack(boards).double().mean(0)).abs().max() < 0.06


def test_mines_and_their_counts() -> None:
    env = FAMILIES["MineSweeper"](1, level="Hard", seed=0)
    drawn = env._draw(3000)
    entries = env._prepare(drawn)
    is_mine = entries["kind"] == 1
    assert (is_mine.sum(1) == 10).all()
    assert (is_mine.double().mean(0) - 10 / 64).abs().max() < 0.03
    padded = torch.nn.functional.pad(is_mine.view(-1, 8, 8).long(), (1, 1, 1, 1))
    around = sum(padded[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3))
    assert torch.equal(entries["around"], around.reshape(-1, 64))


@pytest.mark.parametrize("level", ["Easy", "Hard"])
def test_mazes_are_trees(level: str) -> None:
    env = FAMILIES["LabyrinthEscape"](1, level=level, seed=0)
    drawn = env._draw(300)
    rooms, side = env.rooms, 2 * env.rooms + 1
    grid = drawn["grid"].view(-1, side, side)
    assert (grid[:, [0, -1]] == 1).all()
    assert (grid[:, :, [0, -1]] == 1).all()
    assert (grid[:, 2:-1:2, 2:-1:2] == 1).all()  # corners between rooms
    num_rooms, num_free = (grid[:, 1::2, 1::2] == 0).sum((1, 2)), (grid == 0).sum((1, 2))
    assert torch.equal(num_free, 2 * num_rooms - 1)  # as many doors as a tree has
    assert (num_rooms == rooms**2).double().mean() > 0.9
    # Reached from the first room: all free cells are connected.
    reached = torch.zeros_like(grid)
    first = (grid == 0).view(300, -1).long().argmax(1)
    reached.view(300, -1)[torch.arange(300), first] = 1
    for _ in range(side**2):
        spread = torch.nn.functional.max_pool2d(reached[:, None].float(), 3, 1, 1)[:, 0].long()
        cross = torch.zeros_like(reached)
        cross[:, 1:] |= reached[:, :-1]
        cross[:, :-1] |= reached[:, 1:]
        cross[:, :, 1:] |= reached[:, :, :-1]
        cross[:, :, :-1] |= reached[:, :, 1:]
        following = reached | (cross & spread & (grid == 0))
        if torch.equal(following, reached):
            break
        reached = following
    assert torch.equal(reached, (grid == 0).long())
    start, end = (torch.stack((drawn[n] // side, drawn[n] % side), -1) for n in ("start", "end"))
    is_row = (start[:, 0] % (side - 1) == 0) & (end[:, 0] % (side - 1) == 0)
    axis = torch.where(is_row, 0, 1).unsqueeze(1)
    assert (start.gather(1, axis) + end.gather(1, axis) == side - 1).all()
    assert (start.gather(1, 1 - axis) % 2 == 1).all()
    assert (end.gather(1, 1 - axis) % 2 == 1).all()


def test_mazes_are_those_of_mazelib() -> None:
    """The shares of rooms with one, two, three and four doors, and of mazes with closed rooms."""
    package = pytest.importorskip("mazelib", reason="mazelib is not installed: pip install mazelib cython")
    from mazelib.generate.HuntAndKill import HuntAndKill

    def doors(grid: Tensor) -> Tensor:
        is_open = grid == 0
        count = is_open[:, :-2, 1:-1].long() + is_open[:, 2:, 1:-1] + is_open[:, 1:-1, :-2] + is_open[:, 1:-1, 2:]
        counts = (count * is_open[:, 1:-1, 1:-1])[:, ::2, ::2].reshape(-1)
        return counts.bincount(minlength=5)[:5] / len(counts)

    grids = []
    for _ in range(1500):
        maze = package.Maze()
        maze.generator = HuntAndKill(5, 5)
        maze.generate()
        grids.append(torch.from_numpy(maze.grid).long())
    ours = FAMILIES["LabyrinthEscape"](1, seed=0)._draw(1500)["grid"].view(-1, 11, 11)
    assert (doors(ours) - doors(torch.stack(grids))).abs().max() < 0.015


def test_first_states_of_the_control_tasks() -> None:
    cart = FAMILIES["PositionOnlyCartPole"](1, seed=0)._draw(4000)["state"]
    assert 0.049 < cart.abs().max() <= 0.05
    assert cart.mean(0).abs().max() < 0.003
    pendulum = FAMILIES["PositionOnlyPendulum"](1, seed=0)._draw(4000)["state"].abs().amax(0)
    assert (torch.tensor([3.1, 0.99]) < pendulum).all()
    assert (pendulum <= torch.tensor([math.pi, 1.0])).all()
    noise = FAMILIES["NoisyPositionOnlyPendulum"](1, seed=0)._draw(4000)["noise"]
    assert (noise.std(0) - 1).abs().max() < 0.05
    chance = FAMILIES["MultiarmedBandit"](1, seed=0)._draw(4000)["chance"]
    assert (chance.mean(0) - 0.5).abs().max() < 0.03


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"native": False}, "native is false"),
        ({"frame_skip": 2}, "frame_skip is set"),
        ({"workers": 1}, "workers is set"),
        ({"options": {"num_decks": 2}}, "options is set"),
        ({"max_episode_steps": 20}, "max_episode_steps is below the limit of the id"),
        ({"max_episode_steps": 51}, None),
        ({}, None),
    ],
)
def test_the_choice_is_logged(options: dict, reason: str | None, caplog: pytest.LogCaptureFixture) -> None:
    if reason is not None:
        pytest.importorskip("popgym", reason="popgym is not installed")
    with caplog.at_level(logging.INFO, logger="cyborg_torchrl"):
        env = build_popgym(id="popgym-RepeatPreviousEasy-v0", num_envs=2, **options)
    assert isinstance(env, PopgymEnv) == (reason is None)
    tail = "the native environment." if reason is None else f"the package popgym, since {reason}."
    assert caplog.messages == [f"popgym-RepeatPreviousEasy-v0: {tail}"]
    env.close()


def test_neither_popgym_nor_gymnasium_is_needed() -> None:
    script = (
        "import sys; sys.modules.update(dict.fromkeys(('popgym', 'gymnasium', 'gym')))\n"
        "from cyborg_torchrl.envs import build_popgym\n"
        "print(build_popgym(id='popgym-LabyrinthEscapeEasy-v0', num_envs=2).rollout(3).shape)"
    )
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "torch.Size([2, 3])", run.stderr


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reset_of_no_environment_changes_nothing(family: str) -> None:
    env = FAMILIES[family](3, seed=0)
    env.restart()
    result = env.advance(actions_for(env, 1)[0])
    begun = env.restart(torch.zeros(3, dtype=torch.bool))
    assert all(torch.equal(begun[key], result[key]) for key in env._seen)


def test_wrong_arguments() -> None:
    family = FAMILIES["RepeatFirst"]
    with pytest.raises(ValueError, match="unknown level 'Eazy': did you mean 'Easy'"):
        family(2, level="Eazy")
    with pytest.raises(ValueError, match="num_envs must be >= 1; got 0"):
        family(0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_write_into_a_tensordict_changes_nothing_else(family: str) -> None:
    env, same = (FAMILIES[family](3, seed=0) for _ in range(2))
    tensordict, other = env.reset(), same.reset()
    for action in actions_for(env, 5):
        tensordict, other = env.step(tensordict.set(keys.ACTION, action)), same.step(other.set(keys.ACTION, action))
        for key in RESULTS:
            assert torch.equal(tensordict[keys.NEXT, key], other[keys.NEXT, key])
        tensordict, other = tensordict[keys.NEXT], other[keys.NEXT]
        for key in (*RESULTS, keys.SUCCESS):
            tensordict[key].fill_(1)
        tensordict[keys.DONE].fill_(0)
