"""Crafter collect-wood against Crafter itself, and the treechop builder."""

from __future__ import annotations

import builtins
import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from tensordict.nn import TensorDictModule
from torchrl.envs.utils import check_env_specs

from cyborg_torchrl.config import ConfigError, load_config
from cyborg_torchrl.envs import build_treechop
from cyborg_torchrl.envs.treechop.crafter import CrafterWood
from cyborg_torchrl.registry import UnavailableError, environments
from cyborg_torchrl.training.builders import build_env, build_trainer

DO = 5
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("crafter") is None,
    reason="crafter is not installed: pip install 'cyborg-torchrl[benchmarks]'",
)


def surround_with_trees(env: CrafterWood) -> None:
    """Trees on all four sides of the player."""
    game = env._game
    x, y = game._player.pos
    for side in ((x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)):
        game._world[side] = "tree"


def test_wood_is_counted_beyond_what_the_inventory_holds() -> None:
    """12 trees felled: 12 wood, one at each felling, though the inventory shows 9; nothing else is rewarded."""
    env = CrafterWood(mortal=False)
    env.reset(seed=0)
    rewards = []
    for _ in range(12):
        surround_with_trees(env)
        rewards += [env.step(DO)[1], env.step(0)[1]]
    assert rewards == [1.0, 0.0] * 12
    assert env._game._player.inventory["wood"] == 9


def test_a_felled_tree_is_gone() -> None:
    env = CrafterWood(mortal=False)
    env.reset(seed=0)
    surround_with_trees(env)
    assert [env.step(DO)[1] for _ in range(3)] == [1.0, 0.0, 0.0]


def test_a_felled_tree_stands_again_after_regrow_steps() -> None:
    """Five steps after it was felled it can be felled again, and again; not in another episode."""
    env = CrafterWood("chop", mortal=False, regrow=5)
    env.reset(seed=0)
    surround_with_trees(env)
    rewards = [env.step(DO)[1] for _ in range(18)]
    assert rewards == ([1.0] + [0.0] * 5) * 3
    env.reset()
    assert env.step(DO)[1] == 0.0


def test_no_tree_grows_where_somebody_stands() -> None:
    """The player stands on the stump when its time comes, and is let go; the tree comes back later."""
    env = CrafterWood("chop", mortal=False, regrow=3)
    env.reset(seed=0)
    x, y = env._game._player.pos
    surround_with_trees(env)
    down, up = env.action_names.index("move_down"), env.action_names.index("move_up")
    assert env.step(DO)[1] == 1.0  # the player faces down at first
    env.step(down)
    for _ in range(6):
        env.step(0)
        assert env._game._world[x, y + 1][0] == "grass"
    env.step(up)
    for _ in range(3):
        env.step(0)
    assert env._game._world[x, y + 1][0] == "tree"


def test_play_is_crafters() -> None:
    """What Crafter itself returned is shown: pictures, deaths and wood, and no step in between.

    Crafter repeats itself from a seed for some steps only (it iterates over sets of objects), so it is listened to.
    """
    env = CrafterWood()
    env.reset(seed=3)
    game, said = env._game, []
    step = game.step

    def listen(action: int) -> Any:
        said.append((action, step(action)))
        return said[-1][1]

    game.step = listen
    wood, terminated = 0.0, False
    for action in np.random.default_rng(0).integers(17, size=1000).tolist():
        observation, reward, terminated, truncated, _ = env.step(action)
        theirs, (pixels, _, _, info) = said[-1]
        assert theirs == action
        assert np.array_equal(observation["pixels"], pixels)
        assert terminated == (info["inventory"]["health"] == 0)
        assert not truncated
        wood += reward
        assert wood == info["achievements"]["collect_wood"]
        if terminated:
            break
    assert terminated
    assert observation in env.observation_space
    assert observation["pixels"].flags.c_contiguous


def test_chop_is_the_six_actions_that_matter() -> None:
    env = CrafterWood("chop")
    every = CrafterWood().action_names
    assert env.action_space.n == 6
    assert [every.index(name) for name in env.action_names] == [0, 1, 2, 3, 4, 5]
    assert len(every) == 17


def test_death_terminates_and_the_limit_truncates() -> None:
    env = CrafterWood(max_episode_steps=3)
    env.reset(seed=0)
    assert [env.step(0)[2:4] for _ in range(3)] == [(False, False), (False, False), (False, True)]
    env.reset()
    env.step(0)
    env.step(0)
    env._game._player.health = 0
    assert env.step(0)[2:4] == (True, False)


def test_the_immortal_live_to_their_limit() -> None:
    """Crafter's own player starves within 400 steps of standing still; zombies and lava do not kill either."""
    steps = 1000
    env = CrafterWood(max_episode_steps=steps, mortal=False)
    env.reset(seed=0)
    x, y = env._game._player.pos
    env._game._world[(x, y + 1)] = "lava"
    assert env._game._player.walkable.count("lava") == 1
    ends = [env.step(4 if step == 0 else 0)[2:4] for step in range(steps)]
    assert ends == [(False, False)] * (steps - 1) + [(False, True)]
    mortal = CrafterWood()
    mortal.reset(seed=0)
    assert any(mortal.step(0)[2] for _ in range(1000))


@pytest.mark.parametrize("workers", [0, 2])
def test_specs_hold(workers: int) -> None:
    env = build_treechop(2, max_episode_steps=20, mortal=False, workers=workers, seed=0)
    check_env_specs(env)
    rollout = env.rollout(50, break_when_any_done=False)
    assert rollout["pixels"].shape == (2, 50, 64, 64, 3)
    assert rollout["pixels"].dtype == torch.uint8
    assert rollout["action"].shape == (2, 50)
    assert rollout["next", "truncated"].squeeze(-1).nonzero().tolist() == [[0, 19], [0, 39], [1, 19], [1, 39]]
    assert not rollout["next", "terminated"].any()
    assert (env.batch_size, env.max_episode_steps) == ((2,), 20)
    env.close()


def first_pictures(env: Any, episodes: int) -> torch.Tensor:
    """The first picture of each of so many episodes of three steps, [N, episodes, 64, 64, 3]."""
    return env.rollout(3 * episodes, break_when_any_done=False)["pixels"][:, ::3]


def test_seeds() -> None:
    """The same seed gives the same worlds, another seed others; no two environments and no two episodes share one."""
    make = {"num_envs": 2, "max_episode_steps": 3, "mortal": False}
    worlds = first_pictures(build_treechop(**make, seed=1), 3)
    assert torch.equal(worlds, first_pictures(build_treechop(**make, seed=1), 3))
    assert not torch.equal(worlds, first_pictures(build_treechop(**make, seed=2), 3))
    assert len({picture.numpy().tobytes() for picture in worlds.flatten(0, 1)}) == 6


def test_a_seed_waits_for_the_next_reset() -> None:
    """A collector seeds the environment after its first reset, and acts on the observation it has."""
    env = build_treechop(2, max_episode_steps=3, mortal=False, seed=1)
    held = env.reset()
    env.set_seed(1)
    noop = torch.zeros(2, dtype=torch.long)
    stand = TensorDictModule(lambda pixels: noop.clone(), in_keys=["pixels"], out_keys=["action"])
    played = env.rollout(9, stand, break_when_any_done=False, auto_reset=False, tensordict=held)["pixels"]
    expected = build_treechop(2, max_episode_steps=3, mortal=False, seed=1).rollout(9, stand, break_when_any_done=False)
    assert torch.equal(played, expected["pixels"])


def test_frame_skip_and_stack() -> None:
    env = build_treechop(2, max_episode_steps=10, frame_skip=4, frame_stack=2, mortal=False, seed=0)
    rollout = env.rollout(3)
    assert env.max_episode_steps == 3
    assert rollout["next", "truncated"].squeeze(-1).tolist() == [[False, False, True]] * 2
    assert rollout["pixels"].shape == (2, 3, 64, 64, 6)
    assert torch.equal(rollout["pixels"][:, 1:, ..., :3], rollout["pixels"][:, :-1, ..., 3:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "minecraft"}, "unknown backend 'minecraft': did you mean"),
        ({"workers": 3, "num_envs": 4}, "workers = 3 must divide num_envs = 4"),
        ({"actions": "chopp", "num_envs": 1}, "unknown actions 'chopp': did you mean 'chop'"),
        ({"backend": "minerl", "actions": "sevn"}, "unknown actions 'sevn': did you mean 'seven'"),
        ({"num_envs": 0}, "num_envs must be an integer >= 1; got 0"),
        ({"frame_skip": 0}, "frame_skip must be an integer >= 1; got 0"),
        ({"max_episode_steps": 0}, "max_episode_steps must be an integer >= 1; got 0"),
        ({"port": 9000}, "port belongs to backend=minerl"),
    ],
)
def test_mistakes_end_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_treechop(**options)


@pytest.mark.parametrize(
    ("missing", "backend", "cure"),
    [
        ("crafter", "crafter", "pip install 'cyborg-torchrl\\[benchmarks\\]'"),
        ("gym", "minerl", "make minerl"),
    ],
)
def test_a_missing_package_is_named_with_its_cure(
    missing: str, backend: str, cure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name == missing:
            raise ImportError(f"No module named '{name}'", name=name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UnavailableError, match=f"^backend={backend} needs .*{missing}.*{cure}[^\n]*$"):
        build_treechop(backend=backend)


def test_crafter_is_never_called_minerl() -> None:
    assert environments.title("treechop", load_config("treechop_ppo_recurrent").env) == "crafter_collect_wood"
    assert environments.title("treechop", {"backend": "minerl"}) == "minerl_treechop"
    assert environments.title("delayed_cue", {}) == "delayed_cue"


def test_the_shipped_configuration() -> None:
    cfg = load_config("treechop_ppo_recurrent")
    assert (cfg.env.max_episode_steps, cfg.train.n_steps, cfg.train.recurrent_mode) == (8000, 2048, "burn_in")
    assert build_env(cfg, num_envs=1).max_episode_steps == 8000
    with pytest.raises(ConfigError, match=r"unknown key 'env\.morta': did you mean 'env\.mortal'"):
        load_config("treechop_ppo_recurrent", ["env.morta=false"])


@pytest.mark.slow
def test_the_update_sees_the_states_of_a_whole_episode() -> None:
    """One episode of 8000 steps through the burn-in buffer: before the update its log-probs are the rollout's."""
    overrides = ["env.num_envs=1", "train.n_steps=8000", "train.total_timesteps=8000", "logger=quiet"]
    trainer = build_trainer(load_config("treechop_ppo_recurrent", overrides)).trainer
    with torch.no_grad():  # larger logits than at the start, which would hide a difference
        for name, parameter in trainer.loss.named_parameters():
            if "head" in name:
                parameter.mul_(100.0)
    rollout = trainer.collector.rollout()
    steps = rollout.steps
    assert steps["next", "done"].squeeze(-1).nonzero().tolist() == [[0, 7999]]
    assert steps["next", "truncated"][0, 7999]
    trainer._prepare(rollout)
    trained, errors = 0, []
    with torch.no_grad():
        for batch in trainer.buffer:
            errors.append(float(trainer.loss(batch)["ratio_error"]))
            trained += int(batch["collector", "mask"].sum())
    assert trained == 8000
    assert max(errors) <= 1e-4
    print(f"largest |log ratio| {max(errors):.1e}")
    trainer.close()
