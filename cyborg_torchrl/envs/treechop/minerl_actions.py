"""Tables of discrete actions for MineRL Treechop: keys pressed, and degrees of camera movement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from cyborg_torchrl.registry import check_known

KEYS = ("attack", "back", "forward", "jump", "left", "right", "sneak", "sprint")
"""Keys of MineRL's action, each 0 or 1."""


class Action(NamedTuple):
    """One discrete action."""

    pressed: frozenset[str] = frozenset()
    """Keys held down."""
    pitch: float = 0.0
    """Degrees of camera movement in each frame; up is negative."""
    yaw: float = 0.0
    """Degrees of camera movement in each frame; left is negative."""


class ActionTable(NamedTuple):
    """Discrete actions with their frame skip and frame stack."""

    actions: tuple[Action, ...]
    frame_skip: int = 1
    frame_stack: int = 1


def _attacking(*pressed: str, pitch: float = 0.0, yaw: float = 0.0) -> Action:
    return Action(frozenset(("attack", *pressed)), pitch, yaw)


def _seven(degrees: float) -> ActionTable:
    return ActionTable(
        (
            _attacking(),
            _attacking("forward"),
            _attacking("forward", "jump"),
            _attacking(pitch=-degrees),
            _attacking(pitch=degrees),
            _attacking(yaw=degrees),
            _attacking(yaw=-degrees),
        )
    )


TABLES: Mapping[str, ActionTable] = {
    "seven": _seven(10.0),
    "five": ActionTable(
        (
            _attacking("forward"),
            _attacking(),
            _attacking("forward", "jump"),
            _attacking("forward", yaw=-10.0),
            _attacking("forward", yaw=10.0),
        ),
        frame_skip=4,
        frame_stack=4,
    ),
    "turn_22_5": _seven(22.5),
}
"""seven: always attack. five: always attack, walk forward in all actions except one. turn_22_5: seven, wide turns."""


def action_table(name: str) -> ActionTable:
    """Return the table of that name.

    Raises:
        ValueError: if it is unknown; the message names the nearest one.
    """
    check_known("actions", name, TABLES)
    return TABLES[name]
