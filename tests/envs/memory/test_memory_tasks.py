"""The memory tasks against their rules, written down a second time: for one environment, in plain Python."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

from cyborg_torchrl import envs
from cyborg_torchrl.envs import MemoryTask, memoryless_policy, oracle_policy
from cyborg_torchrl.registry import environments

NUM_ENVS = 24
TASKS: dict[str, type[MemoryTask]] = {
    name: environments.get(name)
    for name in environments.names()
    if inspect.isclass(environments.get(name)) and issubclass(environments.get(name), MemoryTask)
}
SMALL = {
    "assoc_recall": {"pairs": 3},
    "associative_recall": {"pairs": 2, "values": 3},
    "color_cubes": {"cubes": 2, "phases": 1, "grid": 3},
    "copy_memory": {"sequence": 4, "symbols": 3},
    "delayed_cue": {"cues": 3},
    "distractor_nav": {"distractors": 2},
    "endless_tmaze": {"corridors": 2},
    "multi_cue_delay": {"cues": 3, "values": 2},
    "n_back": {"n": 2, "symbols": 3},
    "pattern_binding": {"patterns": 3},
    "permuted_copy": {"sequence": 3, "symbols": 4},
    "tmaze": {},
}
NOT_UNIFORM = {"tmaze": {"x", "y"}, "endless_tmaze": {"length", "corridor", "x"}}
NOT_UNIFORM["color_cubes"] = {"wait", "is_update", "is_phase", "luck"}
LEVELS = [(name, level) for name, task in TASKS.items() for level in task.levels]
CHANCE = {
    "assoc_recall": 1 / 4,
    "associative_recall": 1 / 3,
    "color_cubes": 1 / 9,
    "copy_memory": 1 / 3,
    "delayed_cue": 1 / 3,
    "distractor_nav": 1 / 3,
    "endless_tmaze": 1 / 4,
    "multi_cue_delay": 1 / 2,
    "n_back": 1 / 2,
    "pattern_binding": 1 / 2,
    "permuted_copy": 1 / 4,
    "tmaze": 1 / 2,
}


class Step(NamedTuple):
    """What is seen, and how the action that follows is judged."""

    seen: list[float]
    answer: int | None
    """The right action; None where nothing is asked."""


def hot(index: int | None, size: int) -> list[float]:
    return [float(i == index) for i in range(size)]


def blanks(count: int, width: int) -> list[Step]:
    return [Step([0.0] * width, None)] * count


def delayed_cue(env, of) -> list[Step]:
    cue = of["cue"]
    width = env.cues + 2
    return [
        Step([*hot(cue, env.cues), 1.0, 0.0], None),
        *blanks(env.horizon, width),
        Step([*hot(None, env.cues), 0.0, 1.0], cue),
    ]


def assoc_recall(env, of) -> list[Step]:
    shown = [Step([*hot(key, env.pairs), *hot(of["value_of"][key], env.values), 0.0], None) for key in of["order"]]
    asked = Step([*hot(of["asked"], env.pairs), *hot(None, env.values), 1.0], of["value_of"][of["asked"]])
    return [*shown, *blanks(env.horizon, env.pairs + env.values + 1), asked]


def copied(env, symbols, order, count) -> list[Step]:
    width = count + env.symbols + 1
    shown = [Step([*hot(i, count), *hot(symbol, env.symbols), 0.0], None) for i, symbol in enumerate(symbols)]
    asked = [Step([*hot(i, count), *hot(None, env.symbols), 1.0], symbols[i]) for i in order]
    return [*shown, *blanks(env.horizon, width), *asked]


def copy_memory(env, of) -> list[Step]:
    steps = copied(env, of["symbol"], range(env.sequence), env.sequence)
    return steps if env.show_position else [Step(seen[env.sequence :], answer) for seen, answer in steps]


def permuted_copy(env, of) -> list[Step]:
    return copied(env, of["symbol"], of["order"], env.sequence)


def multi_cue_delay(env, of) -> list[Step]:
    assert len(of["channel_at"]) == 2 * env.cues
    assert sorted(channel for channel in of["channel_at"] if channel < env.cues) == list(range(env.cues))
    assert of["channel_at"][-1] < env.cues, "the last of these steps shows a cue: the horizon begins after it"
    width = env.cues + env.values + 1
    steps = []
    for channel in of["channel_at"]:
        cue = hot(of["cue_of"][channel], env.values) if channel < env.cues else [0.0] * env.values
        steps.append(Step([*hot(channel, env.cues), *cue, 0.0], None))
    steps += blanks(env.horizon, width)
    return steps + [
        Step([*hot(channel, env.cues), *hot(None, env.values), 1.0], of["cue_of"][channel]) for channel in of["order"]
    ]


def n_back(env, of) -> list[Step]:
    symbols = of["symbol"][: env.n + env.horizon]
    steps = []
    for t, symbol in enumerate(symbols):
        is_asked = t >= env.n
        answer = int(symbol == symbols[t - env.n]) if is_asked else None
        steps.append(Step([*hot(symbol, env.symbols), float(is_asked)], answer))
    return steps


def pattern_binding(env, of) -> list[Step]:
    kinds, shapes, colours = env.patterns + 1, of["shape"], of["colour"]
    patterns = list(zip(shapes[: env.patterns], colours[: env.patterns], strict=True))
    probes = list(zip(shapes[env.patterns :], colours[env.patterns :], strict=True))
    assert len({shape for shape, _ in patterns}) == len({colour for _, colour in patterns}) == env.patterns
    assert {shape for shape, _ in patterns} == {shape for shape, _ in probes}
    assert sorted(colour for _, colour in patterns) == sorted(colour for _, colour in probes), (
        "no colour tells anything"
    )
    assert sum(probe not in patterns for probe in probes) != 1

    def seen(shape: int, colour: int, flag: float) -> list[float]:
        return [*hot(shape, kinds), *hot(colour, kinds), flag]

    shown = [Step(seen(*pattern, 0.0), None) for pattern in patterns]
    asked = [Step(seen(*probe, 1.0), int(probe in patterns)) for probe in probes]
    return [*shown, *blanks(env.horizon, 2 * kinds + 1), *asked]


SCRIPTS = {
    "assoc_recall": assoc_recall,
    "associative_recall": assoc_recall,
    "copy_memory": copy_memory,
    "delayed_cue": delayed_cue,
    "multi_cue_delay": multi_cue_delay,
    "n_back": n_back,
    "pattern_binding": pattern_binding,
    "permuted_copy": permuted_copy,
}
"""Tasks in which no action changes what comes next."""


def latents_of(env: MemoryTask) -> Iterator[dict]:
    for i in range(env.num_envs):
        yield {name: value[i].tolist() for name, value in env._latents.items()}


@pytest.mark.parametrize("horizon", [1, 4])
@pytest.mark.parametrize("name", [*SCRIPTS, "copy_memory without positions"])
def test_an_episode_follows_its_script(name: str, horizon: int) -> None:
    name, _, variant = name.partition(" ")
    options = SMALL[name] | ({"show_position": False} if variant else {})
    env = TASKS[name](NUM_ENVS, horizon=horizon, seed=0, **options)
    tensordict = env.reset()
    scripts = [SCRIPTS[name](env, of) for of in latents_of(env)]
    assert {len(script) for script in scripts} == {env.max_episode_steps}
    num_right, num_asked = [0] * NUM_ENVS, [0] * NUM_ENVS
    for t in range(env.max_episode_steps):
        assert tensordict["observation"].tolist() == [script[t].seen for script in scripts]
        action = env.action_spec.rand()
        after = env.step(tensordict.set("action", action))["next"]
        for i, script in enumerate(scripts):
            answer = script[t].answer
            is_right = answer is not None and action[i] == answer
            num_right[i] += is_right
            num_asked[i] += answer is not None
            assert after["reward"][i].item() == (0.0 if answer is None else 1.0 if is_right else -1.0)
            assert after["success"][i].item() == pytest.approx(num_right[i] / env.num_answers)
        is_last = t == env.max_episode_steps - 1
        assert (after["done"] == is_last).all()
        assert (after["terminated"] == is_last).all()
        assert not after["truncated"].any()
        tensordict = after
    assert num_asked == [env.num_answers] * NUM_ENVS
    assert 0 < sum(num_right) < sum(num_asked)


def walk(steps: list[str], horizon: int, goal: int) -> list[tuple[list[float], float]]:
    """What is seen after each move in the T-maze, and the reward, by hand."""
    x, y, result = 0, 0, []
    for t, move in enumerate(steps, start=1):
        if y == 0 and move in "fb":
            x = min(max(x + (1 if move == "f" else -1), 0), horizon)
        elif x == horizon and move in "ud":
            y = min(max(y + (1 if move == "u" else -1), -1), 1)
        is_last = t == horizon + 1
        reward = float(y == goal) if is_last else (-1 / horizon if x < t else 0.0)
        result.append(([0.0, 0.0, float(x == horizon), float(x == horizon and y == 1), float(y == -1)], reward))
    return result


@pytest.mark.parametrize("moves", ["fffu", "fffd", "ffff", "fbff", "uffd", "bbbb", "ffdu"])
def test_the_t_maze_by_hand(moves: str) -> None:
    env = TASKS["tmaze"](NUM_ENVS, horizon=3, seed=0)
    tensordict = env.reset()
    goals = env._latents["goal"].tolist()
    assert set(goals) == {-1, 1}
    first = [[float(goal == 1), float(goal == -1), 0.0, 0.0, 0.0] for goal in goals]
    assert tensordict["observation"].tolist() == first
    expected = [walk(list(moves), 3, goal) for goal in goals]
    for t, move in enumerate(moves):
        tensordict = env.step(tensordict.set("action", torch.full((NUM_ENVS,), "fubd".index(move))))["next"]
        assert tensordict["observation"].tolist() == [script[t][0] for script in expected]
        torch.testing.assert_close(tensordict["reward"][:, 0], torch.tensor([script[t][1] for script in expected]))
        assert (tensordict["done"] == (t == 3)).all()
    assert tensordict["success"][:, 0].tolist() == [script[-1][1] for script in expected]


def test_the_room_of_doors_by_hand() -> None:
    env = TASKS["distractor_nav"](NUM_ENVS, distractors=2, horizon=4, seed=0)
    tensordict = env.reset()
    of = list(latents_of(env))
    goals = [latent["goal"] for latent in of]
    assert tensordict["observation"].tolist() == [[*hot(goal, 3), 1.0, 0.0] for goal in goals]
    for t in range(4):
        tensordict = env.step(tensordict.set("action", env.action_spec.rand()))["next"]
        flashes = [latent["flash"][t] for latent in of]
        assert all(flash != goal for flash, goal in zip(flashes, goals, strict=True))
        assert tensordict["observation"].tolist() == [[*hot(flash, 3), 0.0, 0.0] for flash in flashes]
    for latent in of:
        assert sorted(flash for flash in latent["flash"] if flash >= 0) == sorted({0, 1, 2} - {latent["goal"]})
    tensordict = env.step(tensordict.set("action", torch.full((NUM_ENVS,), 2)))["next"]
    places = [latent["place"] for latent in of]
    for moves, action in enumerate([1, 1, 0, 1, 1, 1, 0, 0]):  # right and left
        doors = [latent["door"][place % 3] for latent, place in zip(of, places, strict=True)]
        assert tensordict["observation"].tolist() == [[*hot(door, 3), 0.0, 1.0] for door in doors], moves
        tensordict = env.step(tensordict.set("action", torch.full((NUM_ENVS,), action)))["next"]
        assert not tensordict["done"].any()
        assert (tensordict["reward"] == 0).all()
        places = [place + (1 if action == 1 else -1) for place in places]
    doors = [latent["door"][place % 3] for latent, place in zip(of, places, strict=True)]
    after = env.step(tensordict.set("action", torch.arange(NUM_ENVS) % 3))["next"]
    for i in range(NUM_ENVS):  # the ninth step in the room is the last, entered or not
        is_right = i % 3 == 2 and doors[i] == goals[i]
        assert after["reward"][i].item() == (1.0 if is_right else -1.0)
        assert after["success"][i].item() == float(is_right)
    assert after["terminated"].all()


def test_a_door_ends_the_episode() -> None:
    env = TASKS["distractor_nav"](400, distractors=3, horizon=0, seed=0)
    tensordict = env.step(env.reset().set("action", torch.full((400,), 2)))["next"]
    assert not tensordict["done"].any(), "it cannot enter before it is in the room"
    after = env.step(tensordict.set("action", torch.arange(400) % 3))["next"]
    assert torch.equal(after["done"][:, 0], torch.arange(400) % 3 == 2)
    assert torch.equal(after["reward"] == 1, after["success"] == 1)
    assert abs(after["success"][2::3].mean() - 0.25) < 0.12


@pytest.mark.parametrize("horizon", [1, 6])
@pytest.mark.parametrize("name", TASKS)
def test_the_oracle_succeeds_and_the_memoryless_is_at_chance(name: str, horizon: int) -> None:
    env = TASKS[name](1000, horizon=horizon, seed=2, **SMALL[name])

    def success(policy) -> float:
        rollout = env.rollout(2 * env.max_episode_steps, policy, break_when_any_done=False)
        done = rollout["next", "done"]
        assert (done.sum(1) >= 2).all()
        return rollout["next", "success"][done].mean().item()

    assert success(oracle_policy(env)) == 1.0
    assert abs(success(memoryless_policy(env)) - CHANCE[name]) < 0.05


@pytest.mark.parametrize("name", TASKS)
def test_a_partial_reset_leaves_the_others_untouched(name: str) -> None:
    env = TASKS[name](3, horizon=5, seed=3, **SMALL[name])
    tensordict = env.reset()
    for _ in range(2):
        tensordict = env.step(env.rand_action(tensordict))["next"]
    before = {key: value.clone() for key, value in env._latents.items()}
    seen = tensordict["observation"].clone()
    is_reset = torch.tensor([[False], [True], [False]])
    after = env.reset(tensordict.exclude("reward").set("_reset", is_reset))
    for key, value in before.items():
        assert torch.equal(env._latents[key][[0, 2]], value[[0, 2]])
    assert env._time.tolist() == [2, 0, 2]
    assert torch.equal(after["observation"][[0, 2]], seen[[0, 2]])


@pytest.mark.parametrize("name", TASKS)
def test_all_that_is_drawn_varies(name: str) -> None:
    """Every entry of every latent takes every value of its range, about equally often."""
    env = TASKS[name](4000, horizon=4, seed=1, **SMALL[name])
    env.reset()
    for key, value in env._latents.items():
        if key in NOT_UNIFORM.get(name, ()):
            continue
        for column in value.reshape(4000, -1).T.long():
            counts = column.unique(return_counts=True)[1]
            is_uniform = key not in ("flash", "channel_at")
            assert len(counts) > 1
            if is_uniform:
                expected = 4000 / len(counts)
                assert ((counts - expected).abs() < 5 * expected**0.5).all(), (key, counts)


def test_half_of_the_comparisons_match_whatever_the_symbols() -> None:
    env = TASKS["n_back"](500, n=3, symbols=5, horizon=40, seed=4)
    env.reset()
    symbols = env._latents["symbol"][:, :43]
    is_match = symbols[:, 3:] == symbols[:, :-3]
    assert abs(is_match.float().mean() - 0.5) < 0.02
    assert (is_match.float().mean(0) - 0.5).abs().max() < 0.12
    others = (symbols[:, 3:] - symbols[:, :-3]).remainder(5)[~is_match]
    assert (others.bincount()[1:] / len(others) - 0.25).abs().max() < 0.03


@pytest.mark.parametrize("patterns", [2, 3, 8])
def test_half_of_the_probes_are_recombined_whatever_is_seen_of_them(patterns: int) -> None:
    env = TASKS["pattern_binding"](40_000, patterns=patterns, horizon=0, seed=0)
    env.reset()
    is_bound, shape, colour = (env._latents[name].float() for name in ("is_bound", "shape", "colour"))
    assert is_bound.mean(0) == pytest.approx(0.5, abs=0.01)
    seen = torch.stack([shape[:, patterns:], colour[:, patterns:]], -1).flatten(1)  # the probes alone
    together = torch.corrcoef(torch.cat([seen, is_bound], 1).t())[: 2 * patterns, 2 * patterns :]
    assert together.abs().max() < 0.025


def test_levels_are_those_of_the_table() -> None:
    """Horizon, size and target as published with the suite."""
    table = {
        "delayed_cue": [(50, 4, 0.95), (200, 8, 0.90), (1000, 8, 0.80), (5000, 16, 0.70)],
        "copy_memory": [(50, 10, 0.90), (200, 20, 0.85), (500, 30, 0.75), (2000, 50, 0.60)],
        "assoc_recall": [(50, 4, 0.90), (200, 8, 0.85), (800, 12, 0.75), (3000, 20, 0.65)],
        "n_back": [(100, 2, 0.85), (300, 3, 0.80), (1000, 4, 0.70), (5000, 5, 0.60)],
        "multi_cue_delay": [(100, 2, 0.85), (300, 4, 0.80), (1000, 6, 0.70), (5000, 10, 0.60)],
        "permuted_copy": [(50, 8, 0.85), (200, 15, 0.75), (500, 25, 0.65), (2000, 40, 0.50)],
        "pattern_binding": [(100, 3, 0.85), (300, 5, 0.75), (1000, 8, 0.65), (5000, 12, 0.55)],
        "distractor_nav": [(50, 2, 0.90), (200, 5, 0.80), (500, 10, 0.70), (2000, 20, 0.60)],
    }
    for name, levels in table.items():
        assert [tuple(level) for level in TASKS[name].levels.values()] == levels
    assert [level.horizon for level in TASKS["tmaze"].levels.values()] == [50, 250, 1000, 10_000]
    names = {name: list(task.levels) for name, task in TASKS.items()}
    assert names.pop("color_cubes") == ["trivial", "medium", "extreme"]
    assert all(levels == ["easy", "medium", "hard", "extreme"] for levels in names.values())


@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_a_level_changes_the_episode(name: str, level: str) -> None:
    env = TASKS[name](2, level=level, seed=0)
    assert env.horizon == TASKS[name].levels[level].horizon
    assert env.max_episode_steps > env.horizon
    assert TASKS[name](2, level=level, horizon=7).horizon == 7


def test_an_unknown_level_is_named() -> None:
    with pytest.raises(ValueError, match="unknown level 'esy': did you mean 'easy'"):
        TASKS["n_back"](2, level="esy")


@pytest.mark.parametrize("name", TASKS)
def test_bad_numbers_are_named(name: str) -> None:
    for option in {*SMALL[name], "num_envs", "horizon"} - {"show_position"}:
        with pytest.raises(ValueError, match=f"{option} must be >= .*; got -1"):
            TASKS[name](**{"num_envs": 2, option: -1})


def test_all_tasks_are_exported() -> None:
    assert {task.__name__ for task in TASKS.values()} <= set(envs.__all__)
    assert set(TASKS) == set(SMALL) == set(CHANCE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("name", TASKS)
def test_the_tasks_run_on_a_gpu(name: str) -> None:
    env = TASKS[name](64, horizon=5, seed=0, device="cuda", **SMALL[name])
    rollout = env.rollout(2 * env.max_episode_steps, oracle_policy(env), break_when_any_done=False)
    done = rollout["next", "done"]
    assert rollout.device.type == "cuda"
    assert (rollout["next", "success"][done] == 1).all()
