"""`check_environment`: does an environment keep the contract that this package relies on?"""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from tensordict import NonTensorData, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl import logger
from torchrl.envs import EnvBase
from torchrl.envs.utils import check_env_specs

from cyborg_torchrl import keys
from cyborg_torchrl.envs.gym.gym_wrapper import WrapperError, check_wrapper
from cyborg_torchrl.envs.make import episode_attribute
from cyborg_torchrl.envs.transforms.normalization import frozen_statistics

ENDS = (keys.DONE, keys.TERMINATED, keys.TRUNCATED)
MAX_STEPS = 300


class EnvironmentFinding(NamedTuple):
    """The outcome of one check."""

    name: str
    verdict: Literal["ok", "broken", "not_checked"]
    detail: str
    """The observation; for a broken contract also the right behaviour."""

    def __str__(self) -> str:
        return f"{self.verdict:11}  {self.name}: {self.detail}"


class _Broken(Exception):
    """The environment breaks the contract."""


class _NotChecked(Exception):
    """The check could not be made."""


def check_environment(
    env: EnvBase,
    *,
    seed: int = 0,
    num_steps: int | None = None,
    time_limit: Literal["truncated", "terminated"] | None = None,
    is_independent: bool = True,
) -> list[EnvironmentFinding]:
    """Play an environment with random actions, and check its contract.

    | check | what must hold |
    |---|---|
    | specs | TorchRL's `check_env_specs`; at every step observations and rewards are in the specs |
    | shapes | reward, done, terminated and truncated are [*B, 1], on the environment's device; rewards are finite |
    | seeds | after `set_seed` and `reset` everything repeats; another seed differs |
    | no_shift | each step starts from the last step's observation or from a reset; `is_init` marks the resets |
    | wrapper | TorchRL's `GymWrapper` handles the environment: autoreset mode, start of discrete spaces |
    | ends | done is terminated or truncated; a reset clears all three |
    | length | no episode exceeds `max_episode_steps`; one of that length ends as `time_limit` says |
    | partial_reset | a reset of one environment changes nothing in the others |

    The environment is seeded and left in the middle of an episode. Torch's generator and the running statistics of
    transforms do not change.

    Args:
        env: any TorchRL environment, with its transforms.
        seed: seed of the environment and the actions.
        num_steps: steps to play; None: two of the longest episodes, 300 at most, or 100 of unknown length.
        time_limit: how an episode of `max_episode_steps` ends: "truncated" for a limit from outside, "terminated" for
            a limit that belongs to the task; None: not checked.
        is_independent: False if one generator draws the random numbers of all environments at each step. Then the
            steps after a reset of one environment are not compared in the others.

    Returns:
        One finding for each check, in the order of the table.
    """
    with torch.random.fork_rng(), frozen_statistics(env):
        torch.manual_seed(seed)
        try:
            env.reset()
            longest = episode_attribute(env, "max_episode_steps")
            steps = num_steps or (100 if longest is None else min(2 * longest + 2, MAX_STEPS))
            first = _play(env, seed, steps)
        except Exception as error:  # any error is a finding
            return [EnvironmentFinding("play", "broken", f"it cannot be played: {_line(error)}")]
        checks: dict[str, Callable[[], str]] = {
            "specs": lambda: _check_specs(env, first, seed),
            "shapes": lambda: _check_shapes(env, first),
            "seeds": lambda: _check_seeds(env, first, seed),
            "no_shift": lambda: _check_shift(first),
            "wrapper": lambda: _check_gym_wrapper(env),
            "ends": lambda: _check_ends(first),
            "length": lambda: _check_length(first, longest, time_limit),
            "partial_reset": lambda: _check_partial_reset(env, seed, is_independent),
        }
        return [_find(name, check) for name, check in checks.items()]


def _find(name: str, check: Callable[[], str]) -> EnvironmentFinding:
    try:
        return EnvironmentFinding(name, "ok", check())
    except _NotChecked as why:
        return EnvironmentFinding(name, "not_checked", str(why))
    except Exception as error:  # any error is a finding
        return EnvironmentFinding(name, "broken", _line(error))


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, _Broken) else f"{type(error).__name__}: {text[:400]}"


@torch.no_grad()
def _play(env: EnvBase, seed: int, num_steps: int, actions: list[TensorDictBase] | None = None) -> list[TensorDictBase]:
    """Return steps [*B] from a reset on, with automatic resets, under random actions or the given ones."""
    env.set_seed(seed)
    carried, rows = env.reset(), []
    for t in range(num_steps):
        carried = env.rand_action(carried) if actions is None else carried.update(actions[t])
        played, carried = env.step_and_maybe_reset(carried)
        rows.append(played.clone())
    return rows


def _leaves(tensordict: TensorDictBase) -> dict[NestedKey, Tensor]:
    """Return the tensors of a tensordict by key, without noise for the policy, which the environment does not draw."""
    items = tensordict.exclude(keys.EXPLORATION_NOISE, (keys.NEXT, keys.EXPLORATION_NOISE)).items(True, True)
    return {key: value for key, value in items if isinstance(value, Tensor)}


def _differing(left: TensorDictBase, right: TensorDictBase, where: Tensor | None = None) -> list[NestedKey]:
    """Return the common keys whose tensors differ in the environments `where` [*B]; NaN equals NaN."""
    found, others = [], _leaves(right)
    for key, value in _leaves(left).items():
        if key in others:
            is_same = (value == others[key]) | ((value != value) & (others[key] != others[key]))
            if not bool((is_same if where is None else is_same[where]).all()):
                found.append(key)
    return found


def _shown(env: EnvBase) -> list[NestedKey]:
    return [*env.observation_spec.keys(True, True), *ENDS]


def _check_specs(env: EnvBase, rows: list[TensorDictBase], seed: int) -> str:
    level = logger.level
    logger.setLevel(logging.WARNING)  # it would report its success
    try:
        check_env_specs(env, seed=seed)
    finally:
        logger.setLevel(level)
    specs = {"observation": env.full_observation_spec, "reward": env.full_reward_spec}
    for t, row in enumerate(rows):
        for name, spec in specs.items():
            for key in spec.keys(True, True):
                leaf = row.get((keys.NEXT, key) if isinstance(key, str) else (keys.NEXT, *key))
                if not isinstance(leaf, NonTensorData) and not spec[key].is_in(leaf):
                    raise _Broken(f"the {name} {key!r} of step {t} lies outside its spec: {spec[key]!r}.")
    return f"hold, at each of {len(rows)} steps"


def _check_shapes(env: EnvBase, rows: list[TensorDictBase]) -> str:
    flag = (*env.batch_size, 1)
    for t, row in enumerate(rows):
        following = row.get(keys.NEXT)
        for key in (keys.REWARD, *ENDS):
            value = following.get(key, None)
            if value is None:
                raise _Broken(f"a step writes no '{key}'.")
            if value.shape != flag:
                raise _Broken(f"'{key}' has shape {list(value.shape)}; it must be {list(flag)}.")
        if any(following.get(key).dtype != torch.bool for key in ENDS):
            raise _Broken("done, terminated and truncated must be bool.")
        if not bool(torch.isfinite(following.get(keys.REWARD)).all()):
            raise _Broken(f"the reward of step {t} is not finite.")
        for key, value in _leaves(row).items():
            if env.device is not None and value.device != env.device:
                raise _Broken(f"{key!r} is on {value.device}; the environment is on {env.device}.")
    return f"reward and ends are {list(flag)}"


def _check_seeds(env: EnvBase, first: list[TensorDictBase], seed: int) -> str:
    actions = [row.select(*env.action_keys) for row in first]
    _play(env, seed + 1, 3)  # so that the repetition begins in the middle of an episode
    for t, (row, again) in enumerate(zip(first, _play(env, seed, len(first), actions), strict=True)):
        if different := _differing(row, again):
            raise _Broken(f"the same seed and actions do not repeat: {different} differ at step {t}.")
    other = _play(env, seed + 1, len(first), actions)
    if not any(_differing(row, again) for row, again in zip(first, other, strict=True)):
        raise _NotChecked("repeats; another seed gives the same, too: is nothing random here, or the seed not used?")
    return "the same repeats, another differs"


def _check_shift(rows: list[TensorDictBase]) -> str:
    """Check that each step starts from the last step's observation."""
    num_resets = 0
    for t, (row, after) in enumerate(pairwise(rows)):
        following = row.get(keys.NEXT)
        is_over = following.get(keys.DONE).squeeze(-1)
        num_resets += int(is_over.sum())
        seen = after.exclude(keys.NEXT, keys.REWARD, keys.ACTION, keys.IS_INIT)
        if different := _differing(seen, following, ~is_over):
            raise _Broken(f"what is acted on at step {t + 1} is not what step {t} showed: {different}.")
        is_init = after.get(keys.IS_INIT, None)
        if is_init is not None and not torch.equal(is_init.squeeze(-1), is_over):
            raise _Broken(f"is_init at step {t + 1} does not mark the environments whose episode has just begun.")
    return f"{len(rows)} steps with {num_resets} resets"


def _check_gym_wrapper(env: EnvBase) -> str:
    try:
        check_wrapper(env)
    except WrapperError as error:
        raise _Broken(str(error)) from None
    return "nothing that TorchRL gets wrong"


def _check_ends(rows: list[TensorDictBase]) -> str:
    ends = 0
    for t, row in enumerate(rows):
        following = row.get(keys.NEXT)
        done, terminated, truncated = (following.get(key) for key in ENDS)
        if not torch.equal(done, terminated | truncated):
            raise _Broken(f"done is not 'terminated or truncated' at step {t}.")
        if any(bool(row.get(key).any()) for key in ENDS if key in row.keys()):
            raise _Broken(f"what is acted on at step {t} is marked as ended: a reset must clear all of {ENDS}.")
        ends += int(done.sum())
    if not ends:
        raise _NotChecked(f"no episode ended within {len(rows)} steps; give more num_steps.")
    return f"{ends} episodes ended"


def _check_length(rows: list[TensorDictBase], longest: int | None, time_limit: str | None) -> str:
    if longest is None:
        raise _NotChecked("it has no `max_episode_steps`: who trains on it must give train.n_steps.")
    lengths = torch.zeros_like(rows[0].get((keys.NEXT, keys.DONE)), dtype=torch.long)
    reached = 0
    for t, row in enumerate(rows):
        following = row.get(keys.NEXT)
        lengths = lengths + 1
        done, is_last = following.get(keys.DONE), lengths == longest
        if bool((is_last & ~done).any()):
            raise _Broken(f"an episode goes on after max_episode_steps = {longest} steps (step {t}).")
        if time_limit is not None and not bool(following.get(time_limit)[is_last].all()):
            raise _Broken(f"an episode of max_episode_steps = {longest} steps must be '{time_limit}' (step {t}).")
        if time_limit == keys.TRUNCATED and bool(following.get(keys.TERMINATED)[is_last].any()):
            raise _Broken(f"the time limit at step {longest} is marked as a termination; it is a truncation.")
        reached += int(is_last.sum())
        lengths = lengths.masked_fill(done, 0)
    if not reached:
        raise _NotChecked(f"no episode lasted max_episode_steps = {longest} within {len(rows)} steps.")
    return f"{reached} episodes lasted max_episode_steps = {longest}"


@torch.no_grad()
def _check_partial_reset(env: EnvBase, seed: int, is_independent: bool) -> str:
    """Compare the same steps with and without a reset of environment 0 in the middle of an episode."""
    if len(env.batch_size) != 1 or env.batch_size[0] < 2:
        raise _NotChecked("it needs two or more environments in one dimension.")
    rows, before = _play(env, seed, 8), 0
    while before < 4 and not bool(rows[before].get((keys.NEXT, keys.DONE)).any()):
        before += 1
    if before == 0:
        raise _NotChecked("episodes end at their first step.")
    actions = [row.select(*env.action_keys) for row in rows]
    carried = env.step_mdp(_play(env, seed, before, actions)[-1])
    mask = torch.zeros(*env.batch_size, 1, dtype=torch.bool, device=env.device)
    mask[0] = True
    others = ~mask.squeeze(-1)
    try:
        begun = env.reset(carried.clone().set("_reset", mask))
    except (RuntimeError, NotImplementedError) as error:  # as TorchRL's asynchronous gymnasium environments do
        raise _NotChecked(f"it refuses a reset in the middle of an episode: {_line(error)}") from None
    if different := _differing(begun.select(*_shown(env), strict=False), carried, others):
        raise _Broken(f"a reset of environment 0 changes what the others show: {different}.")
    if bool(begun.get(keys.DONE)[0]):
        raise _Broken("a reset leaves the environment done.")
    if not is_independent:
        return "shows nothing else in the others"
    for t in range(before, len(rows)):
        played, begun = env.step_and_maybe_reset(begun.update(actions[t]))
        if different := _differing(played.get(keys.NEXT), rows[t].get(keys.NEXT), others):
            raise _Broken(
                f"after a reset of environment 0 the others go on differently: {different} at step {t}. Each needs a "
                "state of its own, and random numbers of its own too, or is_independent=False."
            )
        others = others & ~rows[t].get((keys.NEXT, keys.DONE)).squeeze(-1)  # whose next episode is drawn anew
    return "the others go on as they were"
