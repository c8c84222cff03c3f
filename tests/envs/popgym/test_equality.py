"""Native environments do, step by step, what those of the package popgym do with the same random numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cyborg_torchrl.envs.popgym.build import FAMILIES

CASES = [(name, level) for name, family in FAMILIES.items() for level in family.levels]


@pytest.mark.parametrize(("family", "level"), CASES)
def test_random_actions(family: str, level: str, play_both: Callable[..., dict[str, int]]) -> None:
    assert sum(play_both(family, level).values()) > 0
