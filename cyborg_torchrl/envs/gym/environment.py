"""`gymnasium`: any registered gymnasium environment by its id, and what the other adapters share."""

from __future__ import annotations

import importlib
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torchrl.envs import EnvBase

from cyborg_torchrl.envs.gym.batch import batch
from cyborg_torchrl.registry import UnavailableError, did_you_mean, register_environment


def import_package(name: str, *, command: str | None = None) -> ModuleType:
    """Imports an optional package.

    Raises:
        UnavailableError: if it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = "gym" if name.partition(".")[0] == "gymnasium" else "benchmarks"
        command = command or f"pip install 'cyborg-torchrl[{extra}]'"
        raise UnavailableError(f"the package '{name}' cannot be imported ({error}): {command}") from None


def wrap(env: Any, *, frame_skip: int = 1, **reported: Any) -> Any:
    """Puts the usual wrappers around one gymnasium environment.

    Args:
        env: the environment.
        frame_skip: steps of it for each action.
        reported: how it reports success and its time limit, and its reset options, for `Reported`.

    Raises:
        ValueError: if frame_skip is below 1, nothing of the observations can be read, or there is no policy for such
            actions.
    """
    from gymnasium import spaces

    from cyborg_torchrl.envs.gym.vector import ClipToBounds, FrameSkip, Plain, PlainActions, Reported

    if frame_skip < 1:
        raise ValueError(f"frame_skip must be >= 1; got {frame_skip}.")
    env = PlainActions(env)
    if isinstance(env.action_space, spaces.Box):
        env = ClipToBounds(env)
    if reported:
        env = Reported(env, **reported)
    if frame_skip > 1:
        env = FrameSkip(env, frame_skip)
    return Plain(env)


def make_registered(env_id: str, max_episode_steps: int | None = None, options: dict[str, Any] | None = None) -> Any:
    """`gymnasium.make` with errors in one line.

    Raises:
        ValueError: if there is no such id, the environment refuses its options, or a package that it needs is missing.
    """
    gymnasium = import_package("gymnasium")
    if max_episode_steps is not None and max_episode_steps < 1:
        raise ValueError(f"max_episode_steps must be >= 1; got {max_episode_steps}.")
    try:
        with one_line_errors(env_id, options, gymnasium.error.Error, TypeError, ImportError):
            env = gymnasium.make(env_id, max_episode_steps=max_episode_steps, disable_env_checker=True, **options or {})
            if options:  # some are looked at in the first episode
                env.reset()
            return env
    except gymnasium.error.NamespaceNotFound:
        namespace = env_id.rpartition("/")[0]
        raise ValueError(
            f"no gymnasium id '{env_id}': nothing is registered under '{namespace}'. Is its package installed? "
            f"'module:{env_id}' imports a module that registers it."
        ) from None
    except gymnasium.error.UnregisteredEnv:
        raise ValueError(f"no gymnasium id '{env_id}': {did_you_mean(env_id, gymnasium.registry)}") from None


@contextmanager
def one_line_errors(env_id: str, options: dict[str, Any] | None, *expected: type[Exception]) -> Generator[None]:
    """Around the making of an environment: what it raises becomes a ValueError in one line.

    That is any error where there are options, which environments refuse in many ways, and those expected otherwise. An
    id that does not exist is left to the caller.
    """
    unregistered = import_package("gymnasium").error.UnregisteredEnv
    refusals = (Exception,) if options else expected
    try:
        yield
    except unregistered:
        raise
    except refusals as error:
        given = f" with options {options}" if options else ""
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"'{env_id}'{given}: {said}") from None


def _make(env_id: str, frame_skip: int, max_episode_steps: int | None, options: dict[str, Any] | None) -> Any:
    return wrap(make_registered(env_id, max_episode_steps, options), frame_skip=frame_skip)


@register_environment("gymnasium")
def build_gymnasium(
    *,
    id: str = "CartPole-v1",
    num_envs: int = 16,
    frame_skip: int = 1,
    max_episode_steps: int | None = None,
    workers: int = 0,
    options: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
    seed: int | None = None,
) -> EnvBase:
    """Any registered gymnasium environment.

    Args:
        id: its id, "module:Name-v0" to import a module first.
        num_envs: environments side by side.
        frame_skip: steps of it for each action; rewards are summed.
        max_episode_steps: truncates after so many of its own steps; None: as it was registered.
        workers: processes that the environments are split over; 0: all in this process.
        options: keyword arguments of `gymnasium.make`.
        device: where tensors are put.
        seed: environment i gets its own seed from this one.

    Raises:
        ValueError: in one line, if the id does not exist or an option cannot be used.
    """
    make = partial(_make, id, frame_skip, max_episode_steps, options)
    return batch(make, num_envs, workers=workers, device=device, seed=seed)
