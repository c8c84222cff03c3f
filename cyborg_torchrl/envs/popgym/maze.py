"""Random mazes of the hunt-and-kill algorithm, many at once."""

from __future__ import annotations

import torch
from torch import Tensor

FREE, WALL, START, GOAL = 0, 1, 2, 3
"""Kinds of cells of a maze."""


def draw_mazes(count: int, rooms: int, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
    """Draw mazes by the hunt-and-kill algorithm with a random hunt.

    A walk opens walls to rooms that were not visited, until there is none next to it. Then rooms are picked at random
    until one can begin another walk. There are as many picks as cells, so in rare cases some rooms stay closed. The
    useless picks of a hunt are not made one by one: their number is drawn from its distribution.

    Args:
        count: number of mazes.
        rooms: rooms along each side; a maze has 2 * rooms + 1 cells along a side.
        generator: the generator of all random numbers, on the device.
        device: device of the result.

    Returns:
        "grid", [count, cells] integer: FREE or WALL; "start" and "end", [count] integer: cells of the outer wall on
        opposite sides, which are walls in the grid.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    side, size = 2 * rooms + 1, rooms**2
    neighbours, cells = _neighbours(rooms).to(device), _cells(rooms).to(device)
    every = torch.arange(count, device=device)
    is_closed = torch.ones(count, size + 1, dtype=torch.bool, device=device)
    is_closed[:, size] = False  # a room that is not there is never entered
    grid = torch.full((count, side**2), WALL, device=device)
    room = (uniform(count) * size).long().clamp(max=size - 1)
    is_closed[every, room] = False
    grid[every, cells[room]] = FREE
    picks = torch.full((count,), side**2, device=device)
    for _ in range(size - 1):
        # Hunt where the walk is stuck.
        is_stuck = ~is_closed.gather(1, neighbours[room]).any(1)
        is_useful = is_closed[:, neighbours].any(-1) & ~is_closed[:, :size]
        chance = is_useful.sum(1) / size
        needed = (uniform(count).log() / (-chance).log1p()).ceil().clamp(1, side**2 + 1).long()
        picks = picks - torch.where(is_stuck, needed, 0)
        room = torch.where(is_stuck, torch.where(is_useful, uniform(count, size), -1.0).argmax(1), room)
        # Open the way to a random closed room next to this one, unless the picks are used up.
        is_way = is_closed.gather(1, neighbours[room])
        following = neighbours[room, torch.where(is_way, uniform(count, 4), -1.0).argmax(1)]
        is_running = picks >= 0
        following = torch.where(is_running, following, room)
        is_closed[every, following] = False
        grid[every, cells[following]] = FREE
        between = (cells[room] + cells[following]) // 2
        grid[every, between] = FREE
        room = following
    start, end = _entrances(count, rooms, uniform(3, count))
    return {"grid": grid, "start": start, "end": end}


def _entrances(count: int, rooms: int, chance: Tensor) -> tuple[Tensor, Tensor]:
    """Return two cells of the outer wall on opposite sides, [count] each, from numbers [3, count] in [0, 1)."""
    side = 2 * rooms + 1
    first, last = ((chance[i] * rooms).long().clamp(max=rooms - 1) * 2 + 1 for i in (0, 1))
    wall = (chance[2] * 4).long().clamp(max=3)
    is_row, is_far = wall < 2, wall % 2 * (side - 1)
    start = torch.where(is_row, is_far * side + first, first * side + is_far)
    opposite = side - 1 - is_far
    return start, torch.where(is_row, opposite * side + last, last * side + opposite)


def _cells(rooms: int) -> Tensor:
    """Return the cells of the rooms, [rooms * rooms]."""
    odd = torch.arange(1, 2 * rooms, 2)
    return (odd.unsqueeze(1) * (2 * rooms + 1) + odd).view(-1)


def _neighbours(rooms: int) -> Tensor:
    """Return the rooms next to each room, [rooms * rooms, 4]; `rooms * rooms` if there is none."""
    padded = torch.full((rooms + 2, rooms + 2), rooms**2)
    padded[1:-1, 1:-1] = torch.arange(rooms**2).view(rooms, rooms)
    sides = (padded[1:-1, :-2], padded[1:-1, 2:], padded[:-2, 1:-1], padded[2:, 1:-1])
    return torch.stack(sides, -1).view(-1, 4)
