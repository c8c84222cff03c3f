"""`gymnasium`: any registered gymnasium environment by its id; shared parts of the other adapters."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torchrl.envs import EnvBase

from cyborg_torchrl import keys
from cyborg_torchrl.envs.gym.batch import batch
from cyborg_torchrl.envs.gym.failures import first_reset
from cyborg_torchrl.registry import UnavailableError, did_you_mean, register_environment

LISTING = 'python -c "import {}; gymnasium.pprint_registry()"'
"""The command that lists the ids of gymnasium and of a package."""
MakeById = Callable[[str, int | None, dict[str, Any] | None], Any]
"""Builder of one gymnasium environment from its id, its longest episode and its options; picklable."""


def import_package(name: str, *, command: str | None = None) -> ModuleType:
    """Import an optional package.

    Raises:
        UnavailableError: if it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = "gym" if name.partition(".")[0] == "gymnasium" else "benchmarks"
        command = command or f"pip install 'cyborg-torchrl[{extra}]'"
        raise UnavailableError(f"the package '{name}' cannot be imported ({error}): {command}") from None


def wrap(env: Any, *, frame_skip: int = 1, visible: Sequence[int] | None = None) -> Any:
    """Add the usual wrappers to one gymnasium environment.

    It is reset once, to see whether its info has an action mask.

    Args:
        env: the environment.
        frame_skip: environment steps for each action.
        visible: numbers of a vector observation that the agent sees, by index; None: all.

    Raises:
        ValueError: if frame_skip is below 1, no part of the observation can be read, an index is out of range, or no
            policy has such actions.
    """
    from cyborg_torchrl.envs.gym.vector import (
        FrameSkip,
        MaskFromInfo,
        Plain,
        PlainActions,
        SuccessFromInfo,
        Visible,
    )

    if frame_skip < 1:
        raise ValueError(f"frame_skip must be >= 1; got {frame_skip}.")
    env = PlainActions(env)
    if visible is not None:
        env = Visible(env, visible)
    if frame_skip > 1:
        env = FrameSkip(env, frame_skip)
    env = Plain(SuccessFromInfo(env))
    _, info = first_reset(env)
    return MaskFromInfo(env) if keys.ACTION_MASK in info else env


def make_registered(env_id: str, max_episode_steps: int | None = None, options: dict[str, Any] | None = None) -> Any:
    """Call `gymnasium.make`, with errors in one line.

    Raises:
        ValueError: if the id is unknown, the environment rejects its options, or a package is missing.
    """
    gymnasium = import_package("gymnasium")
    if max_episode_steps is not None and max_episode_steps < 1:
        raise ValueError(f"max_episode_steps must be >= 1; got {max_episode_steps}.")
    try:
        with one_line_errors(env_id, options, gymnasium.error.Error, TypeError, ImportError):
            env = gymnasium.make(env_id, max_episode_steps=max_episode_steps, disable_env_checker=True, **options or {})
            if options:  # some options are read only in the first episode
                env.reset()
            return env
    except gymnasium.error.NamespaceNotFound:
        namespace = env_id.rpartition("/")[0]
        raise ValueError(
            f"no gymnasium id '{env_id}': nothing is registered under '{namespace}'. Is its package installed? "
            f"'module:{env_id}' imports a module that registers it."
        ) from None
    except gymnasium.error.UnregisteredEnv:
        hint = did_you_mean(env_id, gymnasium.registry, LISTING.format("gymnasium"))
        raise ValueError(f"no gymnasium id '{env_id}': {hint}") from None


@contextmanager
def one_line_errors(env_id: str, options: dict[str, Any] | None, *expected: type[Exception]) -> Generator[None]:
    """Turn errors of an environment's constructor into a ValueError with one line.

    With options, any error counts, since environments reject them in many ways. Without options, only the expected
    errors count. The caller handles an unknown id.
    """
    unregistered = import_package("gymnasium").error.UnregisteredEnv
    refusals = (Exception,) if options else expected
    try:
        yield
    except unregistered:
        raise
    except refusals as error:
        with_options = f" with options {options}" if options else ""
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"'{env_id}'{with_options}: {reason}") from None


def make_wrapped(
    make_one: MakeById,
    env_id: str,
    frame_skip: int,
    max_episode_steps: int | None,
    options: dict[str, Any] | None,
    visible: Sequence[int] | None = None,
) -> Any:
    """Make one environment by its id, with the usual wrappers."""
    return wrap(make_one(env_id, max_episode_steps, options), frame_skip=frame_skip, visible=visible)


def build_by_id(
    make_one: MakeById,
    /,
    *,
    id: str,
    num_envs: int,
    frame_skip: int = 1,
    max_episode_steps: int | None = None,
    workers: int = 0,
    visible: list[int] | None = None,
    options: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
    seed: int | None = None,
) -> EnvBase:
    """Build a batch of gymnasium environments by their id.

    Args:
        make_one: makes one environment from its id, its longest episode and its options.
        id: id of the environment.
        num_envs: number of environments.
        frame_skip: environment steps for each action; rewards are summed.
        max_episode_steps: environment steps after which episodes are truncated; None: the package's limit.
        workers: number of worker processes; 0: all environments in this process.
        visible: numbers of a vector observation that the agent sees, by index; None: all. [0, 2] hides the velocities
            of CartPole.
        options: options of the environment.
        device: device of all tensors.
        seed: seed from which each environment gets its seed.

    Raises:
        ValueError: if a package is missing, the id is unknown or an option cannot be used, in one line.
    """
    make = partial(make_wrapped, make_one, id, frame_skip, max_episode_steps, options, visible)
    return batch(make, num_envs, workers=workers, device=device, seed=seed)


build_gymnasium = register_environment("gymnasium")(
    partial(build_by_id, make_registered, id="CartPole-v1", num_envs=16),
)
"""Build a batch of any registered gymnasium environment.

The arguments are those of `build_by_id`. An id "module:Name-v0" imports a module first. Options are keyword arguments
of `gymnasium.make`.
"""
