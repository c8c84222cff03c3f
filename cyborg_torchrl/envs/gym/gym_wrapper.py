"""Gymnasium environments that TorchRL's `GymWrapper` accepts and gets wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torchrl.envs import EnvBase, GymWrapper, SerialEnv, TransformedEnv

from cyborg_torchrl import keys

USE_ANOTHER_MODE = (
    "use SerialEnv(n, make_one), or GymWrapper(gymnasium.make_vec(id, num_envs=n, vectorization_mode='sync', "
    "vector_kwargs={'autoreset_mode': gymnasium.vector.AutoresetMode.DISABLED}))."
)
USE_PLAIN_SPACES = "use GymWrapper(cyborg_torchrl.envs.gym.environment.wrap(env)), which converts it."

RESERVED = {keys.ACTION, keys.NEXT, keys.IS_INIT}
"""Names of entries that are written over; TorchRL itself refuses observations called "reward" or "done"."""


class WrapperError(ValueError):
    """An environment that TorchRL's `GymWrapper` gets wrong; the message says what to use instead."""


def check_wrapper(env: EnvBase) -> None:
    """Check that TorchRL's `GymWrapper` handles a gymnasium environment rightly.

    | gymnasium | what TorchRL 0.14 makes of it |
    |---|---|
    | autoreset mode NEXT_STEP | the last observation becomes zeros, and the next episode starts with the old one. \
`GymWrapper` refuses it, but `GymEnv(id, num_envs=n)` makes it |
    | autoreset mode SAME_STEP | right for one array; for Dict and Tuple spaces the last observation becomes zeros |
    | autoreset mode DISABLED | right |
    | Discrete or MultiDiscrete with a start | actions and observations are off by the start |
    | an action that is one number, Box of shape () | the environment gets an array of one number |
    | Dict with an entry "action", "next" or "is_init" | it is written over |

    Environments in the processes of a `ParallelEnv` are not seen.

    Raises:
        WrapperError: if the environment is one of those.
    """
    while isinstance(env, TransformedEnv):
        env = env.base_env
    if isinstance(env, SerialEnv):
        for part in [] if env.is_closed else env._envs:
            check_wrapper(part)
        return
    if not isinstance(env, GymWrapper):
        return
    wrapped: Any = env._env
    _check_autoreset(wrapped)
    for kind in ("observation", "action"):
        space = getattr(wrapped, f"single_{kind}_space", None) or getattr(wrapped, f"{kind}_space", None)
        _check_space(kind, space)


def _check_autoreset(vector: Any) -> None:
    mode = getattr(vector, "autoreset_mode", None) or (getattr(vector, "metadata", None) or {}).get("autoreset_mode")
    name = getattr(mode, "name", None)  # None for a single environment
    if name == "NEXT_STEP":
        raise WrapperError(
            "gymnasium's autoreset mode NEXT_STEP, as in GymEnv(id, num_envs=n), loses each episode's last observation "
            f"in TorchRL: {USE_ANOTHER_MODE}"
        )
    if name == "SAME_STEP" and hasattr(vector.single_observation_space, "spaces"):
        raise WrapperError(
            "gymnasium's autoreset mode SAME_STEP loses each episode's last observation in TorchRL if observations are "
            f"dictionaries or tuples: {USE_ANOTHER_MODE}"
        )


def _check_space(kind: str, space: Any) -> None:
    if kind == "observation" and hasattr(getattr(space, "spaces", None), "keys"):
        _check_names(set(space.spaces))
    for part in _parts(space):
        if np.any(getattr(part, "start", 0)):
            raise WrapperError(f"TorchRL ignores the start of the {kind} space {_text(part)}: {USE_PLAIN_SPACES}")
        if kind == "action" and type(part).__name__ == "Box" and part.shape == ():
            raise WrapperError(f"TorchRL makes arrays of actions that are numbers, {_text(part)}: {USE_PLAIN_SPACES}")


def _check_names(names: set[str]) -> None:
    """Refuse entries of a Dict that TorchRL would mix up with its own."""
    if clashes := names & RESERVED:
        raise WrapperError(
            f"TorchRL writes entries called {', '.join(sorted(clashes))} itself, over those observations: "
            f"{USE_PLAIN_SPACES}"
        )


def _parts(space: Any) -> Iterator[Any]:
    """Yield the spaces in a nested space that have no parts."""
    parts = getattr(space, "spaces", None)
    if parts is None:
        yield space
        return
    for part in parts.values() if hasattr(parts, "values") else parts:
        yield from _parts(part)


def _text(space: Any) -> str:
    return " ".join(str(space).split())
