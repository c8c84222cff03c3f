"""Index arithmetic of sequences: which steps of a rollout are stored, replayed and trained together."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


class Windows(NamedTuple):
    """Steps of a batch of sequences, as positions in rows that are laid end to end."""

    position: Int[Tensor, "B S"]
    """Position of each step; after the end of a sequence its last step is repeated."""
    is_burn_in: Bool[Tensor, "B S"]
    """True for the steps at the front that are replayed without gradient."""
    is_trained: Bool[Tensor, "B S"]
    """True for the steps that are trained, which follow."""


def window_starts(steps: int, burn_in: int, stride: int) -> list[int]:
    """Return the steps of a rollout at which a stored state is needed: `burn_in` steps before each stretch.

    A stretch has `stride` steps. The rollout's first step is the earliest possible one.

    >>> window_starts(steps=10, burn_in=1, stride=4)
    [0, 3, 7]
    """
    return [max(0, start - burn_in) for start in range(0, steps, stride)]


def windows(row: Int[Tensor, " B"], rows_per_env: int, seq_len: int, burn_in: int, num_steps: int) -> Windows:
    """Return the steps that a batch of chunks needs: their own steps and the burn-in before them.

    Rows are chunks of `seq_len` steps. The chunks of one environment follow each other.

    Args:
        row: numbers of the chunks.
        rows_per_env: chunks of one environment.
        seq_len: L, steps of a chunk.
        burn_in: K, steps replayed before each chunk; fewer where the rollout has fewer.
        num_steps: T, steps of one environment; its last chunk may be shorter than L.

    Returns:
        Windows [B, K + L] that begin with the first replayed step.
    """
    start = (row % rows_per_env) * seq_len
    replayed = start.clamp_max(burn_in)
    length = replayed + (num_steps - start).clamp_max(seq_len)
    offset = torch.arange(burn_in + seq_len, device=row.device)
    # Sequences of a batch differ in length: at the start of a rollout there is less burn-in to replay, and the last
    # chunk may be shorter. All get K + L places, and the flags mark the real ones.
    is_inside = offset < length.unsqueeze(1)
    is_burn_in = offset < replayed.unsqueeze(1)
    position = (row * seq_len - replayed).unsqueeze(1) + torch.minimum(offset, (length - 1).unsqueeze(1))
    return Windows(position, is_burn_in, is_inside & ~is_burn_in)


class Packing(NamedTuple):
    """Whole episodes, packed into rows."""

    position: Int[Tensor, "R S"]
    """Step of the rollout at each place, with its environments laid end to end; padding repeats the last step."""
    is_step: Bool[Tensor, "R S"]
    """False for padding."""


def pack_episodes(is_init: Bool[Tensor, "N T"], row_length: int) -> Packing:
    """Pack the episodes of a rollout into rows of `row_length` steps, longest first, each where it fits best.

    An episode that continues from the rollout before needs a stored state, so it begins a row. Every other episode
    begins with a reset and may come anywhere.

    Args:
        is_init: true where episodes begin.
        row_length: S, at least the steps of the longest episode in the rollout.

    Raises:
        ValueError: if an episode does not fit into a row.

    Source: best-fit decreasing bin packing (Johnson, 1974): at most 11/9 of the least number of rows, plus one.
    """
    num_envs, steps = is_init.shape
    # An episode is a stretch from one beginning to the next. The first step of the rollout begins one as well, since an
    # episode that continues from the rollout before is a stretch of its rows too.
    begins = is_init.clone()
    begins[:, 0] = True
    first = begins.flatten().nonzero().squeeze(1)
    length = torch.diff(first, append=first.new_tensor([num_envs * steps]))
    if int(length.max()) > row_length:
        raise ValueError(f"an episode has {int(length.max())} steps in the rollout; rows have {row_length}.")
    is_continued = ~is_init.flatten()[first]
    rows = _best_fit(length, is_continued, row_length)
    position = torch.zeros(len(rows), row_length, dtype=torch.long)
    is_step = torch.zeros(len(rows), row_length, dtype=torch.bool)
    starts, ends = first.tolist(), (first + length).tolist()
    for row, episodes in enumerate(rows):
        filled = torch.cat([torch.arange(starts[episode], ends[episode]) for episode in episodes])
        position[row, : len(filled)] = filled
        position[row, len(filled) :] = filled[-1]
        is_step[row, : len(filled)] = True
    return Packing(position.to(is_init.device), is_step.to(is_init.device))


def _best_fit(length: Int[Tensor, " E"], is_continued: Bool[Tensor, " E"], row_length: int) -> list[list[int]]:
    """Return the episodes of each row. Continued episodes come first, since each of them begins a row."""
    lengths, continued = length.tolist(), is_continued.tolist()
    # Then longest first: large episodes leave gaps that small ones fill later.
    order = sorted(range(len(lengths)), key=lambda episode: (not continued[episode], -lengths[episode]))
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (steps left, row), in ascending order for the binary search
    for episode in order:
        best = bisect_left(room, (lengths[episode], 0))
        if continued[episode] or best == len(room):
            left, row = row_length, len(rows)
            rows.append([])
        else:
            left, row = room.pop(best)
        rows[row].append(episode)
        insort(room, (left - lengths[episode], row))
    return rows
