"""MineRL 0.4.4 Treechop as a gymnasium environment with discrete actions, which restarts a dead Minecraft."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, SupportsInt

import gymnasium
import numpy as np

from cyborg_torchrl import keys
from cyborg_torchrl.envs.treechop.minerl_actions import KEYS, Action, action_table
from cyborg_torchrl.registry import UnavailableError

LOGGER = logging.getLogger(__name__)
EPISODE = 8000
"""Steps of MineRL's time limit."""
NO_MINERL = (
    "backend=minerl needs minerl 0.4.4, gym 0.19.0 and shimmy, installed in order: make minerl (docs/treechop.md)"
)
NO_MINECRAFT = (
    "Minecraft did not start: MineRL builds it with gradle at its first start, which needs a Java 8 JDK, a network and "
    "a display (xvfb-run); see docs/treechop.md."
)
MAX_WAIT = 60.0
"""Longest time between two attempts to restart Minecraft, in seconds."""


class MineRLTreechop(gymnasium.Env[Any, Any]):
    """MineRL Treechop: +1 for each log; terminates with 64 logs, truncated at `max_episode_steps`.

    - Observation: {"pixels": [64, 64, 3] uint8}, the view of the player.
    - Action: a row of an `ActionTable`.

    Minecraft may die or hang. MineRL then ends the episode with a random observation. Here the episode is truncated,
    with the last real observation, no reward, and info["error"] with the reason. The next reset restarts Minecraft and
    doubles the waiting time before each further attempt.

    Args:
        actions: name of an action table.
        max_episode_steps: steps of an episode, at most 8000.
        make: builder of the old-API environment; default: `make_treechop`.
        attempts: number of attempts of a reset to start Minecraft.
        wait: seconds before the second attempt; doubled at each further one, up to a minute.

    Raises:
        ValueError: if the table is unknown, or the episode is longer than MineRL's.
        UnavailableError: if minerl is missing; from `reset`, if Minecraft is missing or cannot be restarted.
    """

    is_reproducible = False
    """Minecraft runs in real time."""
    observation_space = gymnasium.spaces.Dict({keys.PIXELS: gymnasium.spaces.Box(0, 255, (64, 64, 3), np.uint8)})

    def __init__(
        self,
        actions: str = "seven",
        max_episode_steps: int = EPISODE,
        *,
        make: Callable[[], Any] | None = None,
        attempts: int = 8,
        wait: float = 1.0,
    ) -> None:
        if max_episode_steps > EPISODE:
            raise ValueError(f"max_episode_steps is {EPISODE} at most in MineRL Treechop; got {max_episode_steps}.")
        self.table = action_table(actions)
        self.action_space = gymnasium.spaces.Discrete(len(self.table.actions))
        self.max_episode_steps, self.attempts, self.wait = max_episode_steps, attempts, wait
        self._make = make or make_treechop
        self._env: gymnasium.Env[Any, Any] | None = None
        self._commands = [_command(action) for action in self.table.actions]
        self._seeds = np.random.default_rng()
        self._last = np.zeros((64, 64, 3), np.uint8)
        self._steps = 0
        self._has_run = False
        import_minerl()

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin an episode in a random world from the seed's stream; start Minecraft if needed."""
        super().reset(seed=seed, options=options)
        if seed is not None:
            self._seeds = np.random.default_rng(seed)
        world = int(self._seeds.integers(2**31))  # at every reset, since MineRL forgets its seed
        self._steps = 0
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(min(self.wait * 2 ** (attempt - 1), MAX_WAIT))
            try:
                env = self._running()
                with _old_packages():
                    observation, _ = env.reset(seed=world)
            except (EOFError, FileNotFoundError, PermissionError) as error:  # raised by the launch script and by gradle
                self.close()
                if not self._has_run:
                    raise UnavailableError(f"{NO_MINECRAFT} Its message: {_cause(error)}") from error
                LOGGER.warning("MineRL: Minecraft did not start (attempt %d of %d)", attempt + 1, self.attempts)
            except Exception as error:  # the client raises many kinds when Minecraft is gone
                self.close()
                LOGGER.warning("MineRL: no episode (attempt %d of %d): %r", attempt + 1, self.attempts, error)
            else:
                self._has_run = True
                return self._observed(observation), {}
        raise UnavailableError(f"Minecraft could not be restarted in {self.attempts} attempts; see the log above.")

    def step(self, action: SupportsInt) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Take a step. Return the observation, the new logs, terminated (64 logs), truncated, and info."""
        self._steps += 1
        is_time_up = self._steps >= self.max_episode_steps
        try:
            if self._env is None:
                raise ConnectionError("Minecraft is not running; reset first")
            observation, reward, terminated, truncated, info = self._env.step(self._commands[int(action)])
            error = info.get("error")
        except Exception as failure:  # many kinds, as in reset
            observation, reward, terminated, truncated, error = None, 0.0, False, False, repr(failure)
        if error:
            LOGGER.warning("MineRL: Minecraft was lost at step %d, the episode is truncated: %s", self._steps, error)
            self.close()
            return {keys.PIXELS: self._last.copy()}, 0.0, False, True, {"error": str(error)}
        # MineRL reports its time limit as a termination, which would look like a success.
        is_over = bool(terminated) and not is_time_up
        is_cut = (is_time_up or bool(truncated)) and not is_over
        return self._observed(observation), float(reward), is_over, is_cut, {"TimeLimit.truncated": is_cut}

    def close(self) -> None:
        """Close Minecraft, which may be dead already. The next reset starts another."""
        env, self._env = self._env, None
        if env is not None:
            try:
                env.close()
            except Exception as error:
                LOGGER.debug("MineRL: closing failed: %r", error)

    def _running(self) -> gymnasium.Env[Any, Any]:
        """Return MineRL's environment; rebuild it if its Minecraft does not answer.

        MineRL itself would start another Minecraft and lose track of it.
        """
        if self._env is not None and not all(map(_is_listening, self._env.unwrapped.gym_env.unwrapped.instances)):
            self.close()
        if self._env is None:
            from shimmy import GymV21CompatibilityV0

            with _old_packages():
                self._env = GymV21CompatibilityV0(env=self._make())
        return self._env

    def _observed(self, observation: Any) -> dict[str, np.ndarray]:
        self._last = np.ascontiguousarray(observation["pov"])  # a copy, since MineRL's array has negative strides
        return {keys.PIXELS: self._last.copy()}


def make_treechop(port: int | None = None) -> Any:
    """Build MineRL's old-API environment, which starts Minecraft at its first reset.

    Args:
        port: port of a running Minecraft with MineRL's mod; None: start one.

    Raises:
        ConnectionError: if no process listens on that port.
    """
    gym = import_minerl()
    if port is None:
        return gym.make("MineRLTreechop-v0")
    from minerl.env.malmo import MinecraftInstance

    instance = MinecraftInstance(port, existing=True)
    instance.had_to_clean = False
    if not _is_listening(instance):  # otherwise MineRL would start another Minecraft
        raise ConnectionError(f"no Minecraft listens on port {port}")
    return gym.make("MineRLTreechop-v0", instances=[instance])


def import_minerl() -> Any:
    """Return gym, with MineRL's environments registered.

    Raises:
        UnavailableError: if one of the packages is missing.
    """
    try:
        with _old_packages():
            import gym
            import minerl
            import shimmy
    except ImportError as error:
        raise UnavailableError(f"{NO_MINERL}; {error}.") from None
    del minerl, shimmy
    return gym


def check_minecraft() -> None:
    """Check the requirements of Minecraft.

    Raises:
        UnavailableError: if there is no Java 8.
    """
    import_minerl()
    home = os.environ.get("JAVA_HOME")
    java = str(Path(home) / "bin" / "java") if home else "java"  # as gradle looks for it
    try:
        version = subprocess.run([java, "-version"], capture_output=True, text=True, check=False, timeout=60).stderr
    except OSError:
        raise UnavailableError(f"{NO_MINECRAFT} There is no '{java}'.") from None
    if '"1.8.' not in version:
        raise UnavailableError(f"{NO_MINECRAFT} '{java}' is {(version.splitlines() or ['of an unknown version'])[0]}.")


def _old_packages() -> AbstractContextManager[Any]:
    """Silence the warnings of gym and MineRL, which are no longer maintained."""
    return warnings.catch_warnings(action="ignore")


def _command(action: Action) -> dict[str, Any]:
    camera = np.array([action.pitch, action.yaw], np.float32)
    return {**{key: int(key in action.pressed) for key in KEYS}, "camera": camera}


def _is_listening(instance: Any) -> bool:
    try:
        socket.create_connection((instance.host, instance.port), timeout=5.0).close()
    except (OSError, TypeError):
        return False
    return True


def _cause(error: BaseException) -> str:
    """Return the most useful line of an error: the first exception, or else the last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "Exception" in line or "rror:" in line]
    return (named or lines[-1:] or [type(error).__name__])[0]
