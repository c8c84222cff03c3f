"""Vectors of gymnasium environments whose episode ends TorchRL's wrapper gets wrong."""

from __future__ import annotations

from typing import Any

from torchrl.envs import EnvBase, GymWrapper, SerialEnv, TransformedEnv

CURE = (
    "use SerialEnv(n, make_one), or GymWrapper(gymnasium.make_vec(id, num_envs=n, vectorization_mode='sync', "
    "vector_kwargs={'autoreset_mode': gymnasium.vector.AutoresetMode.DISABLED}))."
)


class AutoresetError(ValueError):
    """A vector of environments whose episode ends would be wrong; the message says what to use instead."""


def check_autoreset(env: EnvBase) -> None:
    """Check that a vector of gymnasium environments resets in a way that TorchRL's `GymWrapper` handles.

    | autoreset mode | what TorchRL 0.14 makes of it |
    |---|---|
    | NEXT_STEP | wrong: the last observation becomes zeros, and the next episode starts with the old one. \
`GymWrapper` refuses it, but `GymEnv(id, num_envs=n)` makes it |
    | SAME_STEP | right for one array; for Dict and Tuple spaces the last observation becomes zeros |
    | DISABLED | right |

    Environments in the processes of a `ParallelEnv` are not seen.

    Raises:
        AutoresetError: if the episode ends would be wrong.
    """
    while isinstance(env, TransformedEnv):
        env = env.base_env
    if isinstance(env, SerialEnv):
        for part in [] if env.is_closed else env._envs:
            check_autoreset(part)
        return
    vector = getattr(env, "_env", None) if isinstance(env, GymWrapper) else None
    mode = _mode(vector)
    if mode == "NEXT_STEP":
        raise AutoresetError(
            "gymnasium's autoreset mode NEXT_STEP, as in GymEnv(id, num_envs=n), loses each episode's last observation "
            f"in TorchRL: {CURE}"
        )
    if mode == "SAME_STEP" and _has_parts(vector):
        raise AutoresetError(
            "gymnasium's autoreset mode SAME_STEP loses each episode's last observation in TorchRL if observations are "
            f"dictionaries or tuples: {CURE}"
        )


def _mode(vector: Any) -> str | None:
    """Return the name of a vector's autoreset mode; None for a single environment."""
    mode = getattr(vector, "autoreset_mode", None) or getattr(vector, "metadata", {}).get("autoreset_mode")
    return getattr(mode, "name", None)


def _has_parts(vector: Any) -> bool:
    from gymnasium import spaces  # it is installed where there is such a vector

    return isinstance(vector.single_observation_space, (spaces.Dict, spaces.Tuple))
