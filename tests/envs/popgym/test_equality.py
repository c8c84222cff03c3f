"""Native environments do, step by step, what those of the package popgym do with the same random numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cyborg_torchrl.envs.popgym.base import PopgymEnv
from cyborg_torchrl.envs.popgym.build import FAMILIES

CASES = [(name, level) for name, family in FAMILIES.items() for level in family.levels]
PlayBoth = Callable[..., dict[str, int]]


@pytest.mark.parametrize(("family", "level"), CASES)
def test_random_actions(family: str, level: str, play_both: PlayBoth) -> None:
    assert sum(play_both(family, level).values()) > 0


def cells(env: PopgymEnv, chosen: Tensor) -> Tensor:
    """Return the row and the column of a random chosen cell, [N, 2], in boards [N, cells] of chosen cells."""
    cell = (torch.rand(chosen.shape) + chosen.float()).argmax(1)
    return torch.stack((cell // env.side, cell % env.side), 1)


def sink(env: PopgymEnv, step: int) -> Tensor:
    """Hit all ships at once in some environments, and at the last moment in others."""
    ship = env._run.entries["ship"] == 1
    is_late = (env._run.deadline - env._run.clock) > 12
    is_late[::2] = False
    return cells(env, ship ^ is_late)


def sweep(env: PopgymEnv, step: int) -> Tensor:
    """Open cells without a mine."""
    return cells(env, env._run.entries["kind"] == 0)


def remember(env: PopgymEnv, step: int) -> Tensor:
    """Find pairs; sometimes turn any card over."""
    entries = env._run.entries
    kind, turned = entries["kind"], entries["turned"]
    first = (turned - env._first_card).clamp(min=0).unsqueeze(1)
    is_hidden = entries["view"] == 0
    is_partner = (kind == kind.gather(1, first)) & is_hidden
    chosen = torch.where(turned.unsqueeze(1) < 0, is_hidden, is_partner)
    action = (torch.rand(chosen.shape) + chosen.float()).argmax(1)
    return torch.where(torch.rand(len(action)) < 0.03, env.action_spec.rand(), action)


@pytest.mark.parametrize("level", ["Easy", "Medium", "Hard"])
@pytest.mark.parametrize(
    ("family", "choose", "ends"),
    [
        ("Battleship", sink, {"terminated", "both"}),
        ("MineSweeper", sweep, {"terminated"}),
        ("Concentration", remember, {"terminated"}),
    ],
)
def test_episodes_that_are_won(
    family: str, choose: Callable[[PopgymEnv, int], Tensor], ends: set[str], level: str, play_both: PlayBoth
) -> None:
    counts = play_both(family, level, choose=choose)
    assert ends <= {name for name, count in counts.items() if count}
