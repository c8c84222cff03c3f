"""`popgym`, `bsuite`, `minigrid`, `memory_gym`: public benchmarks by the ids of their packages.

Each package is optional and is imported at first use. The arguments of the builders are those of `build_by_id`.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import partial
from typing import Any

import torch
from torchrl.envs import EnvBase

from cyborg_torchrl.envs.gym.batch import batch
from cyborg_torchrl.envs.gym.environment import (
    LISTING,
    build_by_id,
    import_package,
    make_registered,
    make_wrapped,
    one_line_errors,
)
from cyborg_torchrl.envs.popgym.build import build_native, native_ids, native_steps
from cyborg_torchrl.registry import did_you_mean, register_environment

LOGGER = logging.getLogger(__name__)
LISTING_NATIVE = 'python -c "from cyborg_torchrl.envs.popgym.build import native_ids; print(*native_ids())"'
"""The command that lists the ids of POPGym that have a native environment."""
MEMORY_GYM = (
    "pip install --no-deps memory-gym && pip install pygame-ce (it pins an old gymnasium that it does not need)"
)
BSUITE_LENGTHS = (("_memory_length", 1), ("_chain_length", 0), ("_episode_len", 0), ("_max_steps", 0))
"""Attributes of bsuite experiments with the length of an episode, and a number to add."""


def _check_id(env_id: str, package: str, what: str, starts: tuple[str, ...] = ()) -> None:
    """Check that an id belongs to a package: its entry point is in the package, or it has a prefix."""
    registry = import_package("gymnasium").registry
    by_module = {name: str(spec.entry_point).partition(".")[0] == package for name, spec in registry.items()}
    own = [name for name, is_own in by_module.items() if is_own or name.startswith(starts)]
    if env_id not in own:
        hint = did_you_mean(env_id, own, LISTING.format(f"gymnasium, {package}"))
        raise ValueError(f"no {what} '{env_id}': {hint}")


def _reported(env: Any, **rules: Any) -> Any:
    from cyborg_torchrl.envs.gym.vector import Reported  # needs gymnasium

    return Reported(env, **rules)


def _make_popgym(env_id: str, max_episode_steps: int | None, options: dict[str, Any] | None) -> Any:
    import_package("popgym")
    _check_id(env_id, "popgym", "popgym id", ("popgym-",))
    env = make_registered(env_id, max_episode_steps, options)
    if "HigherLower" in env_id:  # its length is that of the deck; it has no attribute
        env.unwrapped.max_episode_length = env.unwrapped.deck.num_cards - 1
    known = native_ids()
    env.metadata = {**env.metadata, "is_prediction": env_id in known and known[env_id][0].is_prediction}
    return env


@register_environment("popgym")
def build_popgym(
    *,
    id: str = "popgym-RepeatFirstEasy-v0",
    num_envs: int = 64,
    native: bool = True,
    fixed: bool = False,
    frame_skip: int = 1,
    max_episode_steps: int | None = None,
    workers: int = 0,
    visible: list[int] | None = None,
    options: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
    seed: int | None = None,
) -> EnvBase:
    """Build POPGym environments (Morad et al. 2023). Most returns are in [-1, 1]; success is not defined.

    Card games terminate. Control tasks and searches are truncated at their length. The environments are native ones:
    batches of tensors with the package's rules, which do not need the package. Options that they do not have take the
    package: frame_skip, a shorter max_episode_steps, workers, visible and options. A log line says which one is used.

    Args:
        id: POPGym id, such as "popgym-RepeatPreviousHard-v0".
        num_envs: number of environments.
        native: use the native environment where there is one; otherwise the package popgym.
        fixed: mend popgym's faults, which the docstrings of the native environments list; not with the package.
        frame_skip: environment steps for each action; rewards are summed.
        max_episode_steps: environment steps after which episodes are truncated; None: the limit of the id.
        workers: number of worker processes; 0: all environments in this process.
        visible: numbers of a vector observation that the agent sees, by index; None: all.
        options: keyword arguments of the package's environment.
        device: device of all tensors.
        seed: seed of the episodes.

    Raises:
        ValueError: if the package is needed and missing, the id is unknown or an option cannot be used, in one line.
    """
    known = native_ids()
    others = {"frame_skip": frame_skip != 1, "workers": workers, "visible": visible is not None, "options": options}
    reasons = [f"{name} is set" for name, is_set in others.items() if is_set]
    if not native:
        reasons.insert(0, "native is false")
    if id not in known:
        if importlib.util.find_spec("popgym") is None:
            raise ValueError(f"no popgym id '{id}': {did_you_mean(id, known, LISTING_NATIVE)}")
        reasons.insert(0, "no native environment has this id")
    elif max_episode_steps is not None and max_episode_steps < native_steps(id):
        reasons.append("max_episode_steps is below the limit of the id")
    if not reasons:
        LOGGER.info("%s: the native environment.", id)
        return build_native(id, num_envs, fixed=fixed, device=device, seed=seed)
    if fixed:
        raise ValueError(
            f"fixed mends native environments, but '{id}' takes the package, since {' and '.join(reasons)}."
        )
    # An option that costs the native environment is worth a line that everybody sees.
    level = logging.WARNING if native else logging.INFO
    LOGGER.log(level, "%s: the package popgym, since %s.", id, " and ".join(reasons))
    return build_by_id(
        _make_popgym,
        id=id,
        num_envs=num_envs,
        frame_skip=frame_skip,
        max_episode_steps=max_episode_steps,
        workers=workers,
        visible=visible,
        options=options,
        device=device,
        seed=seed,
    )


def _make_bsuite(env_id: str, max_episode_steps: int | None, options: dict[str, Any] | None) -> Any:
    loader, sweep = import_package("bsuite.bsuite"), import_package("bsuite.sweep")
    adapter = import_package("shimmy.bsuite_compatibility")
    if env_id not in sweep.SETTINGS:
        hint = did_you_mean(env_id, sweep.SETTINGS, 'python -c "from bsuite.sweep import SWEEP; print(SWEEP)"')
        raise ValueError(f"no bsuite id '{env_id}': {hint}")
    experiment, _ = loader.unpack_bsuite_id(env_id)
    settings = {**sweep.SETTINGS[env_id], **(options or {})}
    with one_line_errors(env_id, options):
        inner = loader.load(experiment, settings)
        if options:  # some options fail only in a step, so try one in a copy
            tried = loader.load(experiment, settings)
            tried.reset()
            tried.step(tried.action_spec().generate_value())
    env = adapter.BSuiteCompatibilityV0(inner)
    known = [getattr(inner, name) + more for name, more in BSUITE_LENGTHS if hasattr(inner, name)]
    limits = [*known, *([] if max_episode_steps is None else [max_episode_steps])]
    env.max_episode_steps = min(limits) if limits else None
    if max_episode_steps is not None:
        env = import_package("gymnasium.wrappers").TimeLimit(env, max_episode_steps)
    return env


build_bsuite = register_environment("bsuite")(partial(build_by_id, _make_bsuite, id="memory_len/10", num_envs=64))
"""Build bsuite environments (Osband et al. 2020) through shimmy; success is not defined.

All ends of bsuite are terminations, including the time limits of its control tasks. An id is the experiment and the
number of its setting. Options are settings that replace those of the id, such as {memory_length: 30}.
"""


def _is_paid(reward: float, terminated: bool, info: dict[str, Any]) -> bool:
    return terminated and reward > 0.0


def _make_minigrid(
    fully_observable: bool, rgb: bool, env_id: str, max_episode_steps: int | None, options: dict[str, Any] | None
) -> Any:
    wrappers = import_package("minigrid.wrappers")
    _check_id(env_id, "minigrid", "minigrid id", ("MiniGrid-", "BabyAI-"))
    env = make_registered(env_id, max_episode_steps, options)
    if rgb:
        view = wrappers.RGBImgObsWrapper if fully_observable else wrappers.RGBImgPartialObsWrapper
        env = wrappers.ImgObsWrapper(view(env))
    elif fully_observable:
        env = wrappers.FullyObsWrapper(env)
    return _reported(env, is_success=_is_paid)


@register_environment("minigrid")
def build_minigrid(
    *,
    id: str = "MiniGrid-MemoryS13-v0",
    num_envs: int = 32,
    frame_skip: int = 1,
    max_episode_steps: int | None = None,
    workers: int = 0,
    fully_observable: bool = False,
    rgb: bool = False,
    options: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
    seed: int | None = None,
) -> EnvBase:
    """Build MiniGrid and BabyAI environments (Chevalier-Boisvert et al. 2023).

    Observations are the image of object numbers and the direction. The text of the mission is dropped, so tasks whose
    mission changes between episodes cannot be solved. An episode succeeds if it terminates with a reward, which
    MiniGrid gives only for the mission. The step limit is a truncation.

    Args:
        id: MiniGrid id, such as "MiniGrid-MemoryS13-v0".
        num_envs: number of environments.
        frame_skip: environment steps for each action; rewards are summed.
        max_episode_steps: environment steps after which episodes are truncated; None: MiniGrid's limit.
        workers: number of worker processes; 0: all environments in this process.
        fully_observable: show the whole grid instead of the 7 x 7 cells before the agent.
        rgb: show rendered pixels instead of object numbers and direction.
        options: keyword arguments of the environment, such as {agent_view_size: 5}.
        device: device of all tensors.
        seed: seed from which each environment gets its seed.

    Raises:
        ValueError: if minigrid is missing, the id is unknown or an option cannot be used, in one line.
    """
    make_one = partial(_make_minigrid, fully_observable, rgb)
    make = partial(make_wrapped, make_one, id, frame_skip, max_episode_steps, options)
    return batch(make, num_envs, workers=workers, device=device, seed=seed)


def _is_reported(reward: float, terminated: bool, info: dict[str, Any]) -> bool:
    return bool(info.get("success", False))


def _is_out_of_time(env: Any, info: dict[str, Any]) -> bool:
    limit = getattr(env, "max_episode_steps", None)
    is_over = limit is not None and getattr(env, "t", None) == limit
    return is_over and not info.get("success") and info.get("agent_health", 1) > 0


def _make_memory_gym(env_id: str, max_episode_steps: int | None, options: dict[str, Any] | None) -> Any:
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame then draws without a display
    os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
    import_package("memory_gym", command=MEMORY_GYM)
    _check_id(env_id, "memory_gym", "memory-gym id")
    env = make_registered(env_id, max_episode_steps)
    try:
        env.reset(seed=0, options=options)
    except AssertionError as error:
        raise ValueError(f"'{env_id}' with options {options}: {error}") from None
    is_success = None if env_id.startswith("Endless") else _is_reported
    env = _reported(env, is_success=is_success, is_time_limit=_is_out_of_time, options=options)
    env.close = _keep_display
    return env


def _keep_display() -> None:
    """Do nothing: all environments of a process share pygame's display, and `close` would close it for all."""


build_memory_gym = register_environment("memory_gym")(
    partial(build_by_id, _make_memory_gym, id="MortarMayhem-Grid-v0", num_envs=16),
)
"""Build Memory Gym environments (Pleines et al. 2023) with 84 x 84 pixels.

Success is reported by the package, except for its endless tasks. In Mortar Mayhem it also reports success if only the
last command failed. Its step limit is a truncation here, although the package calls it a termination. An id is such as
"MysteryPath-Grid-v0" or "SearingSpotlights-v0". Options are reset parameters, such as {command_count: [3]}.
"""
