"""`treechop`: collect wood from pixels in Crafter, or in MineRL, which needs Minecraft."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torchrl.envs import CatFrames, EnvBase, TransformedEnv

from cyborg_torchrl import keys
from cyborg_torchrl.envs.gym.batch import batch
from cyborg_torchrl.envs.gym.environment import import_package
from cyborg_torchrl.envs.treechop.minerl_actions import ActionTable, action_table
from cyborg_torchrl.registry import check_known, register_environment

TITLES = {"crafter": "crafter_collect_wood", "minerl": "minerl_treechop"}
"""Name of each backend in logs and summaries."""
DEFAULT_ACTIONS = {"crafter": "chop", "minerl": "seven"}


def treechop_title(options: Mapping[str, Any]) -> str:
    """Return the name of the task; Crafter is never called MineRL or Treechop."""
    return TITLES.get(options.get("backend", "crafter"), "treechop")


@register_environment("treechop", title=treechop_title)
def build_treechop(
    num_envs: int = 8,
    *,
    backend: str = "crafter",
    max_episode_steps: int = 8000,
    actions: str | None = None,
    frame_skip: int | None = None,
    frame_stack: int | None = None,
    mortal: bool = True,
    regrow: int | None = None,
    port: int | None = None,
    workers: int = 0,
    device: torch.device | str | None = None,
    seed: int | None = None,
) -> EnvBase:
    """Build a batch of environments in which an episode's return is the collected wood.

    Args:
        num_envs: N.
        backend: crafter ("Crafter collect-wood", see `CrafterWood`) or minerl (MineRL 0.4.4 Treechop, see
            `MineRLTreechop`).
        max_episode_steps: frames of an episode, skipped frames included.
        actions: name of a table of actions. crafter: chop (default; 6 actions) or all (17 actions). minerl: seven
            (default), five or turn_22_5, see `minerl_actions`.
        frame_skip: frames for each action; None: that of the action table, 1 for crafter.
        frame_stack: number of last observations, as channels; None: that of the action table, 1 for crafter.
        mortal: crafter only. False: health is refilled, and every episode lasts `max_episode_steps`.
        regrow: crafter only: steps after which a felled tree grows again; None: never.
        port: minerl only: environment i uses the Minecraft on port + i; None: each starts one.
        workers: number of worker processes; 0: all environments in this process.
        device: device of all tensors.
        seed: seed from which each environment gets its seed; None draws one.

    Returns:
        Observation "pixels", [N, 64, 64, 3 * frame_stack] uint8; one action, [N] integer; reward [N, 1], the wood of
        the step. Its `max_episode_steps` counts actions.

    Raises:
        ValueError: if an option is impossible, or belongs to the other backend.
        UnavailableError: if a package or Java is missing.
    """
    check_known("backend", backend, TITLES)
    if port is not None and backend == "crafter":
        raise ValueError("port belongs to backend=minerl.")
    import_package("gymnasium", command="pip install 'cyborg-torchrl[benchmarks]'")
    actions = actions or DEFAULT_ACTIONS[backend]
    table = ActionTable(()) if backend == "crafter" else action_table(actions)
    frame_skip = table.frame_skip if frame_skip is None else frame_skip
    frame_stack = table.frame_stack if frame_stack is None else frame_stack
    counts = {"num_envs": num_envs, "frame_skip": frame_skip, "frame_stack": frame_stack}
    _check_counts(max_episode_steps=max_episode_steps, regrow=1 if regrow is None else regrow, **counts)
    if backend == "crafter":
        makers = [partial(_make_crafter, actions, max_episode_steps, mortal, regrow, frame_skip)] * num_envs
    else:
        ports = _minecraft_ports(port, num_envs)
        makers = [partial(_make_minerl, actions, max_episode_steps, frame_skip, port) for port in ports]
    longest = math.ceil(max_episode_steps / frame_skip)
    env = batch(makers, num_envs, workers=workers, max_episode_steps=longest, device=device, seed=seed)
    return env if frame_stack == 1 else TransformedEnv(env, CatFrames(frame_stack, -1, in_keys=[keys.PIXELS]))


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1; got {value!r}.")


def _make_crafter(actions: str, max_episode_steps: int, mortal: bool, regrow: int | None, frame_skip: int) -> Any:
    from cyborg_torchrl.envs.treechop.crafter import CrafterWood

    return _skipping(CrafterWood(actions, max_episode_steps, mortal=mortal, regrow=regrow), frame_skip)


def _minecraft_ports(port: int | None, num_envs: int) -> list[int | None]:
    """Return the port of each environment's Minecraft; None: it starts one, which is possible here."""
    from cyborg_torchrl.envs.treechop.minerl import check_minecraft

    if port is None:
        check_minecraft()
        return [None] * num_envs
    return [port + i for i in range(num_envs)]


def _make_minerl(actions: str, max_episode_steps: int, frame_skip: int, port: int | None) -> Any:
    from cyborg_torchrl.envs.treechop.minerl import MineRLTreechop, make_treechop

    return _skipping(MineRLTreechop(actions, max_episode_steps, make=partial(make_treechop, port)), frame_skip)


def _skipping(game: Any, frame_skip: int) -> Any:
    from cyborg_torchrl.envs.gym.vector import FrameSkip

    return game if frame_skip == 1 else FrameSkip(game, frame_skip)
