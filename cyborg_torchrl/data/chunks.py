"""Where sequences begin and end: which steps of a rollout are stored, replayed and trained together."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class Windows(NamedTuple):
    """Steps of a batch of sequences, as positions in rows laid end to end."""

    position: Int[Tensor, "B S"]
    """Where each step is; what is past the end of a sequence repeats its last step."""
    is_burn_in: Bool[Tensor, "B S"]
    """Steps that are replayed without gradient, at the front."""
    is_trained: Bool[Tensor, "B S"]
    """Steps that are trained, behind them."""


def window_starts(steps: int, burn_in: int, stride: int) -> list[int]:
    """Steps of a rollout at which a stored state is needed: `burn_in` before each stretch of `stride`, or its start.

    >>> window_starts(steps=10, burn_in=1, stride=4)
    [0, 3, 7]
    """
    return [max(0, start - burn_in) for start in range(0, steps, stride)]


def windows(row: Int[Tensor, " B"], rows_per_env: int, seq_len: int, burn_in: int, num_steps: int) -> Windows:
    """The steps that a batch of stored rows needs: their own, and those of the same environment before them.

    Rows are chunks of `seq_len` steps, those of one environment one after the other.

    Args:
        row: numbers of the rows.
        rows_per_env: chunks of one environment.
        seq_len: L, steps of a chunk.
        burn_in: K, steps replayed before each chunk; fewer where the rollout has not so many.
        num_steps: T, steps of one environment; the last chunk may be shorter than L.

    Returns:
        Windows [B, K + L], each beginning with its first replayed step; positions count stored steps, rows laid end
        to end.
    """
    start = (row % rows_per_env) * seq_len
    replayed = start.clamp_max(burn_in)
    offset = torch.arange(burn_in + seq_len, device=row.device)
    length = replayed + (num_steps - start).clamp_max(seq_len)
    inside = offset < length.unsqueeze(1)
    is_burn_in = offset < replayed.unsqueeze(1)
    position = (row * seq_len - replayed).unsqueeze(1) + torch.minimum(offset, (length - 1).unsqueeze(1))
    return Windows(position, is_burn_in, inside & ~is_burn_in)


class Packing(NamedTuple):
    """Whole episodes, laid into rows."""

    position: Int[Tensor, "R S"]
    """Step of the rollout (its environments laid end to end) at each place; padding repeats the row's last step."""
    is_step: Bool[Tensor, "R S"]
    """False for padding."""


def pack_episodes(is_init: Bool[Tensor, "N T"], row_length: int) -> Packing:
    """Lays the episodes of a rollout into rows of `row_length`, longest first, each where it fits best.

    An episode that was carried over from the rollout before begins a row, since it needs a stored state; each other
    begins with a reset, and may stand anywhere.

    Args:
        is_init: where episodes begin.
        row_length: S; at least the longest stretch of an episode in the rollout.

    Raises:
        ValueError: if an episode does not fit into a row.

    Source: best-fit decreasing bin packing (Johnson, 1974): at most 11/9 of the least number of rows, and one.
    """
    num_envs, steps = is_init.shape
    begins = is_init.clone()
    begins[:, 0] = True
    first = begins.flatten().nonzero().squeeze(1)
    length = torch.diff(first, append=first.new_tensor([num_envs * steps]))
    if int(length.max()) > row_length:
        raise ValueError(f"an episode takes {int(length.max())} steps of the rollout; rows have {row_length}.")
    is_carried = ~is_init.flatten()[first]
    order = torch.argsort(length, descending=True, stable=True)
    order = torch.cat([order[is_carried[order]], order[~is_carried[order]]]).tolist()
    starts, lengths, carried = first.tolist(), length.tolist(), is_carried.tolist()
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (steps left, row), ascending
    for episode in order:
        at = bisect_left(room, (lengths[episode], 0))
        if carried[episode] or at == len(room):
            left, row = row_length, len(rows)
            rows.append([])
        else:
            left, row = room.pop(at)
        rows[row].append(episode)
        insort(room, (left - lengths[episode], row))
    position = torch.zeros(len(rows), row_length, dtype=torch.long)
    is_step = torch.zeros(len(rows), row_length, dtype=torch.bool)
    for row, episodes in enumerate(rows):
        filled = torch.cat([torch.arange(starts[e], starts[e] + lengths[e]) for e in episodes])
        position[row, : len(filled)] = filled
        position[row, len(filled) :] = filled[-1]
        is_step[row, : len(filled)] = True
    return Packing(position.to(is_init.device), is_step.to(is_init.device))
