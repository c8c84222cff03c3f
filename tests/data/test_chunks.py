"""Which steps are stored, replayed and trained: against plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cyborg_torchrl.data.chunks import pack_episodes, window_starts, windows


@pytest.mark.parametrize("steps", [1, 5, 12, 13])
@pytest.mark.parametrize("seq_len", [1, 3, 5])
@pytest.mark.parametrize("burn_in", [0, 1, 4, 20])
def test_windows_by_hand(steps: int, seq_len: int, burn_in: int) -> None:
    """Every chunk of every environment, as one would list it."""
    chunks = -(-steps // seq_len)
    row = torch.arange(3 * chunks)
    got = windows(row, chunks, seq_len, burn_in, steps)
    for i in row.tolist():
        env, start = i // chunks, (i % chunks) * seq_len
        base = env * chunks * seq_len
        replayed = [base + t for t in range(max(0, start - burn_in), start)]
        trained = [base + t for t in range(start, min(start + seq_len, steps))]
        assert got.position[i, got.is_burn_in[i]].tolist() == replayed
        assert got.position[i, got.is_trained[i]].tolist() == trained
        assert got.is_burn_in[i, : len(replayed)].all(), "replayed steps come first"
        assert got.is_trained[i, len(replayed) : len(replayed) + len(trained)].all()
        assert (got.position[i, len(replayed) + len(trained) :] == trained[-1]).all(), "padding repeats the last step"


def test_window_starts_by_hand() -> None:
    assert window_starts(12, 0, 4) == [0, 4, 8]
    assert window_starts(10, 3, 4) == [0, 1, 5]
    assert window_starts(10, 6, 4) == [0, 0, 2]


def episodes_of(is_init: Tensor) -> dict[int, int]:
    """First flat step -> length, by walking."""
    episodes: dict[int, int] = {}
    for env in range(is_init.shape[0]):
        for t in range(is_init.shape[1]):
            if t == 0 or is_init[env, t]:
                first = env * is_init.shape[1] + t
            episodes[first] = episodes.get(first, 0) + 1
    return episodes


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("row_length", [40, 60])
def test_packing_lays_each_episode_whole_and_once(share: float, row_length: int) -> None:
    is_init = torch.rand(6, 40) < share
    is_init[::2, 0] = True
    packing = pack_episodes(is_init, row_length)
    flat, episodes = is_init.flatten(), episodes_of(is_init)
    used = packing.position[packing.is_step].tolist()
    assert sorted(used) == list(range(is_init.numel()))
    for position, is_step in zip(packing.position, packing.is_step, strict=True):
        assert is_step[0]
        steps = position[is_step].tolist()
        at = 0
        while at < len(steps):
            first, length = steps[at], episodes[steps[at]]
            assert steps[at : at + length] == list(range(first, first + length))
            assert at == 0 or flat[first], "only the first episode of a row may want a stored state"
            at += length


def test_packing_wastes_little() -> None:
    """Lengths 5, 3, 2 and 4, 4, 2 and 6, 4 in rows of 6: 6; 5; 4 + 2; 4 + 2; 4; 3. One row for each would be eight."""
    is_init = torch.zeros(3, 10, dtype=torch.bool)
    for env, starts in enumerate([(0, 5, 8), (0, 4, 8), (0, 6)]):
        is_init[env, list(starts)] = True
    packing = pack_episodes(is_init, 6)
    assert packing.is_step.sum(1).sort(descending=True).values.tolist() == [6, 6, 6, 5, 4, 3]


def test_carried_episodes_begin_rows() -> None:
    is_init = torch.zeros(4, 8, dtype=torch.bool)
    is_init[:, 5] = True
    packing = pack_episodes(is_init, 8)
    begins = packing.position[:, 0] % 8
    assert sorted(begins.tolist())[:4] == [0, 0, 0, 0]
    assert len(packing.position) == 4
    assert packing.is_step.all(), "eight places hold five and three steps"


def test_an_episode_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="has 8 steps in the rollout; rows have 7"):
        pack_episodes(torch.zeros(2, 8, dtype=torch.bool), 7)
