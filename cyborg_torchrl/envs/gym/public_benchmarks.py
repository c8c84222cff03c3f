"""`popgym`, `bsuite`, `minigrid`, `memory_gym`: public benchmarks by the ids that their packages give them.

Each package is optional and imported when it is asked for.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
from torchrl.envs import EnvBase

from cyborg_torchrl.envs.gym.batch import batch
from cyborg_torchrl.envs.gym.environment import import_package, make_registered, one_line_errors, wrap
from cyborg_torchrl.registry import did_you_mean, register_environment

MEMORY_GYM = (
    "pip install --no-deps memory-gym && pip install pygame-ce (it pins an old gymnasium that it does not need)"
)
BSUITE_LENGTHS = (("_memory_length", 1), ("_chain_length", 0), ("_episode_len", 0), ("_max_steps", 0))
"""Attributes that tell how long an episode of some bsuite experiments can last, and what to add."""


def _check_id(env_id: str, package: str, what: str, starts: tuple[str, ...] = ()) -> None:
    """Refuses ids of other packages: the one asked for has registered its own under its module's name or a prefix."""
    registry = import_package("gymnasium").registry
    by_module = {name: str(spec.entry_point).partition(".")[0] == package for name, spec in registry.items()}
    own = [name for name, is_own in by_module.items() if is_own or name.startswith(starts)]
    if env_id not in own:
        raise ValueError(f"no {what} '{env_id}': {did_you_mean(env_id, own)}")


def _make_popgym(env_id: str, frame_skip: int, max_episode_steps: int | None, options: dict[str, Any] | None) -> Any:
    import_package("popgym")
    _check_id(env_id, "popgym", "popgym id", ("popgym-",))
    env = make_registered(env_id, max_episode_steps, options)
    if "HigherLower" in env_id:  # the one that does not tell its length: it ends with the deck
        env.unwrapped.max_episode_length = env.unwrapped.deck.num_cards - 1
    return wrap(env, frame_skip=frame_skip)


@register_environment("popgym")
def build_popgym(
    *,
    id: str = "popgym-RepeatFirstEasy-v0",
    num_envs: int = 64,
    frame_skip: int = 1,
    max_episode_steps: int | None = None,
    workers: int = 0,
    options: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
    seed: int | None = None,
) -> EnvBase:
    """POPGym (Morad et al. 2023). Returns of most tasks lie in [-1, 1]; there is no notion of success.

    Card games end by termination; control tasks and searches are truncated at their own `max_episode_length`.

    Args:
        id: popgym's, as "popgym-RepeatPreviousHard-v0".
        num_envs: environments side by side.
        frame_skip: steps of it for each action; rewards are summed.
        max_episode_steps: truncates after so many of its own steps; None: popgym's own end.
        workers: processes that the environments are split over; 0: all in this process.
        options: keyword arguments of the environment.
        device: where tensors are put.
        seed: environment i gets its own seed from this one.

    Raises:
        ValueError: in one line, if popgym is missing, the id does not exist or an option cannot be used.
    """
    make = partial(_make_popgym, id, frame_skip, max_episode_steps, options)
    return batch(make, num_envs, workers=workers, device=device, seed=seed)


def _make_bsuite(env_id: str, frame_skip: int, max_episode_steps: int | None, options: dict[str, Any] | None) -> Any:
    loader, sweep = import_package("bsuite.bsuite"), import_package("bsuite.sweep")
    adapter = import_package("shimmy.bsuite_compatibility")
    if env_id not in sweep.SETTINGS:
        raise ValueError(f"no bsuite id '{env_id}': {did_you_mean(env_id, sweep.SETTINGS)}")
    experiment, _ = loader.unpack_bsuite_id(env_id)
    settings = {**sweep.SETTINGS[env_id], **(options or {})}
    with one_line_errors(env_id, options):
        inner = loader.load(experiment, settings)
        if options:  # some are only noticed in a step, which one that is thrown away takes
            tried = loader.load(experiment, settings)
            tried.reset()
            tried.step(tried.action_spec().generate_value())
    env = adapter.BSuiteCompatibilityV0(inner)
    known = [getattr(inner, name) + more for name, more in BSUITE_LENGTHS if hasattr(inner, name)]
    limits = [*known, *([] if max_episode_steps is None else [max_episode_steps])]
    env.max_episode_steps = min(limits) if limits else None
    if max_episode_steps is not None:
        env = import_package("gymnasium.wrappers").TimeLimit(env, max_episode_steps)
    return wrap(env, frame_skip=frame_skip)


@register_environment("bsuite")
def build_bsuite(
    *,
    id: str = "memory_len/10",
    num_envs: int = 64,
    frame_skip: int = 1,
    max_episode_steps: int | None = None,
    workers: int = 0,
    options: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
    seed: int | None = None,
) -> EnvBase:
    """The behaviour suite, bsuite (Osband et al. 2020), through shimmy. There is no notion of success.

    All of its own ends are terminations, as bsuite has it: the time limits of its control tasks too.

    Args:
        id: bsuite's, as "memory_len/10": the experiment and the number of its setting.
        num_envs: environments side by side.
        frame_skip: steps of it for each action; rewards are summed.
        max_episode_steps: truncates after so many of its own steps; None: bsuite's own end.
        workers: processes that the environments are split over; 0: all in this process.
        options: settings in place of the id's, as {memory_length: 30}.
        device: where tensors are put.
        seed: environment i gets its own seed from this one.

    Raises:
        ValueError: in one line, if a package is missing, the id does not exist or an option cannot be used.
    """
    make = partial(_make_bsuite, id, frame_skip, max_episode_steps, options)
    return batch(make, num_envs, workers=workers, device=device, seed=seed)


def _is_paid(reward: float, terminated: bool, info: dict[str, Any]) -> bool:
    return terminated and reward > 0.0


def _make_minigrid(
    env_id: str,
    frame_skip: int,
    max_episode_steps: int | None,
    options: dict[str, Any] | None,
    fully_observable: bool,
    rgb: bool,
) -> Any:
    wrappers = import_package("minigrid.wrappers")
    _check_id(env_id, "minigrid", "minigrid id", ("MiniGrid-", "BabyAI-"))
    env = make_registered(env_id, max_episode_steps, options)
    if rgb:
        view = wrappers.RGBImgObsWrapper if fully_observable else wrappers.RGBImgPartialObsWrapper
        env = wrappers.ImgObsWrapper(view(env))
    elif fully_observable:
        env = wrappers.FullyObsWrapper(env)
    return wrap(env, frame_skip=frame_skip, is_success=_is_paid)


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
    """MiniGrid and BabyAI (Chevalier-Boisvert et al. 2023).

    What is observed is the image of object numbers and the direction; the text of the mission is left out, so tasks
    whose mission changes from episode to episode cannot be solved. Success is an episode that terminates with a
    reward: MiniGrid pays for the mission alone. Its step limit is a truncation.

    Args:
        id: MiniGrid's, as "MiniGrid-MemoryS13-v0".
        num_envs: environments side by side.
        frame_skip: steps of it for each action; rewards are summed.
        max_episode_steps: truncates after so many of its own steps; None: MiniGrid's own limit.
        workers: processes that the environments are split over; 0: all in this process.
        fully_observable: show the whole grid instead of the 7 x 7 cells before the agent.
        rgb: show rendered pixels instead of object numbers and direction.
        options: keyword arguments of the environment, as {agent_view_size: 5}.
        device: where tensors are put.
        seed: environment i gets its own seed from this one.

    Raises:
        ValueError: in one line, if minigrid is missing, the id does not exist or an option cannot be used.
    """
    make = partial(_make_minigrid, id, frame_skip, max_episode_steps, options, fully_observable, rgb)
    return batch(make, num_envs, workers=workers, reports_success=True, device=device, seed=seed)


def _is_reported(reward: float, terminated: bool, info: dict[str, Any]) -> bool:
    return bool(info.get("success", False))


def _is_out_of_time(env: Any, info: dict[str, Any]) -> bool:
    is_over = getattr(env, "t", None) == getattr(env, "max_episode_steps", None)
    return is_over and not info.get("success") and info.get("agent_health", 1) > 0


def _make_memory_gym(
    env_id: str, frame_skip: int, max_episode_steps: int | None, options: dict[str, Any] | None
) -> Any:
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # draws into memory
    os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
    import_package("memory_gym", command=MEMORY_GYM)
    _check_id(env_id, "memory_gym", "memory-gym id")
    env = make_registered(env_id, max_episode_steps)
    try:
        env.reset(seed=0, options=options)
    except AssertionError as error:
        raise ValueError(f"'{env_id}' with options {options}: {error}") from None
    is_success = {} if env_id.startswith("Endless") else {"is_success": _is_reported}
    wrapped = wrap(env, frame_skip=frame_skip, is_time_limit=_is_out_of_time, options=options, **is_success)
    wrapped.close = _keep_display
    return wrapped


def _keep_display() -> None:
    """All of a process draw on pygame's one display; the package's own `close` would take it from the others."""


@register_environment("memory_gym")
def build_memory_gym(
    *,
    id: str = "MortarMayhem-Grid-v0",
    num_envs: int = 16,
    frame_skip: int = 1,
    max_episode_steps: int | None = None,
    workers: int = 0,
    options: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
    seed: int | None = None,
) -> EnvBase:
    """Memory Gym (Pleines et al. 2023): 84 x 84 pixels.

    Success is what the package reports (not in its endless tasks); in Mortar Mayhem it reports success too where only
    the last command was failed. An end by its own step limit, which it calls a termination, is a truncation here.

    Args:
        id: memory-gym's, as "MortarMayhem-Grid-v0", "MysteryPath-Grid-v0", "SearingSpotlights-v0".
        num_envs: environments side by side.
        frame_skip: steps of it for each action; rewards are summed.
        max_episode_steps: truncates after so many of its own steps; None: its own limit.
        workers: processes that the environments are split over; 0: all in this process.
        options: its reset parameters, as {command_count: [3]}.
        device: where tensors are put.
        seed: environment i gets its own seed from this one.

    Raises:
        ValueError: in one line, if the package is missing, the id does not exist or an option cannot be used.
    """
    make = partial(_make_memory_gym, id, frame_skip, max_episode_steps, options)
    reports_success = not id.startswith("Endless")
    return batch(make, num_envs, workers=workers, reports_success=reports_success, device=device, seed=seed)
