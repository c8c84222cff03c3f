"""Rollout buffers: exact coverage, the right states, and clear refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import LazyMemmapStorage

from cyborg_torchrl.data import RecurrentRolloutBuffer, RolloutBuffer

NUM_ENVS, STEPS, SEQ_LEN = 4, 12, 3
ROWS = NUM_ENVS * STEPS // SEQ_LEN


def make_rollout(offset: int = 0) -> TensorDict:
    """A rollout whose steps are numbered; three states, in three places."""
    batch = [NUM_ENVS, STEPS]
    is_init = torch.rand(*batch, 1) < 0.2
    is_init[1, 1] = is_init[2, SEQ_LEN] = True  # inside a chunk; on the edge of one

    def states(*shape: int) -> Tensor:
        return torch.randn(*batch, *shape)

    return TensorDict(
        {
            "step": torch.arange(offset, offset + NUM_ENVS * STEPS).view(batch),
            "observation": torch.randn(*batch, 3),
            "is_init": is_init,
            "memory_state": {"hidden": states(2, 5), "memory": states(6, 4), "scalar": states()},
            "recurrent_state": states(1, 7),
            "agent": {"observation": torch.randn(*batch, 2), "recurrent_state": states(1, 4)},
            "collector": {"traj_ids": torch.zeros(batch, dtype=torch.long)},
            "next": {"reward": torch.randn(*batch, 1), "memory_state": {"hidden": states(2, 5)}},
        },
        batch_size=batch,
    ).auto_batch_size_(2)


def covered(buffer: RolloutBuffer | RecurrentRolloutBuffer) -> list[int]:
    return torch.cat([batch["step"].flatten() for batch in buffer]).sort().values.tolist()


ALL_STEPS = list(range(NUM_ENVS * STEPS))
RECURRENT = pytest.param(lambda size: RecurrentRolloutBuffer(NUM_ENVS * STEPS, SEQ_LEN, size), id="recurrent")
FLAT = pytest.param(lambda size: RolloutBuffer(NUM_ENVS * STEPS, size), id="flat")
PREFETCHING = pytest.param(
    lambda size: RecurrentRolloutBuffer(NUM_ENVS * STEPS, SEQ_LEN, size, prefetch=2), id="prefetching"
)
MakeBuffer = Callable[[int], RolloutBuffer | RecurrentRolloutBuffer]


@pytest.mark.parametrize("batch_size", [1, 4, 5, 7, 16, 1000])
@pytest.mark.parametrize("make_buffer", [RECURRENT, FLAT, PREFETCHING])
def test_an_epoch_covers_every_step_once(make_buffer: MakeBuffer, batch_size: int) -> None:
    buffer = make_buffer(batch_size)
    buffer.store(make_rollout())
    orders = []
    for _ in range(3):
        order = torch.cat([batch["step"].flatten() for batch in buffer]).tolist()
        assert sorted(order) == ALL_STEPS
        orders.append(order)
    assert orders[0] != orders[1], "an epoch is shuffled anew"


@pytest.mark.parametrize("make_buffer", [RECURRENT, FLAT, PREFETCHING])
def test_an_epoch_that_was_broken_off_leaves_the_next_one_whole(make_buffer: MakeBuffer) -> None:
    buffer = make_buffer(4)
    buffer.store(make_rollout())
    next(iter(buffer))
    assert covered(buffer) == ALL_STEPS
    buffer.sample()
    assert covered(buffer) == ALL_STEPS


@pytest.mark.parametrize("make_buffer", [RECURRENT, FLAT, PREFETCHING])
def test_storing_replaces(make_buffer: MakeBuffer) -> None:
    buffer = make_buffer(4)
    for offset in (0, 1000, 2000):
        buffer.store(make_rollout(offset))
        assert len(buffer) == (ROWS if isinstance(buffer, RecurrentRolloutBuffer) else NUM_ENVS * STEPS)
        next(iter(buffer))  # an epoch that was not finished must not matter
        buffer.store(make_rollout(offset))
        assert covered(buffer) == [offset + step for step in ALL_STEPS]


def test_flat_steps_keep_neither_states_nor_what_follows() -> None:
    buffer = RolloutBuffer(NUM_ENVS * STEPS, 5, state_keys=["memory_state", ("agent", "recurrent_state")])
    rollout = make_rollout()
    buffer.store(rollout)
    for batch in buffer:
        assert "next" not in batch.keys()
        assert "memory_state" not in batch.keys()
        assert batch["agent"].keys() == {"observation"}
        row, t = batch["step"] // STEPS, batch["step"] % STEPS
        torch.testing.assert_close(batch["observation"], rollout["observation"][row, t])


STATE_KEYS = {
    "tensordict": ["memory_state"],
    "leaf": ["recurrent_state"],
    "nested": [("memory_state", "hidden"), ("memory_state", "memory"), ("memory_state", "scalar")],
    "beside_others": [("agent", "recurrent_state")],
    "all": ["memory_state", "recurrent_state", ("agent", "recurrent_state")],
}


@pytest.mark.parametrize("state_keys", STATE_KEYS.values(), ids=STATE_KEYS)
def test_sequences_begin_with_the_state_of_the_rollout(state_keys: list) -> None:
    rollout = make_rollout()
    buffer = RecurrentRolloutBuffer(NUM_ENVS * STEPS, SEQ_LEN, 5, state_keys=state_keys)
    buffer.store(rollout)
    leaves = [key for key in rollout.keys(True, True) if "state" in str(key) and key[0] != "next"]
    seen = 0
    for batch in buffer:
        assert batch.shape[1] == SEQ_LEN
        assert "next" not in batch.keys()
        row, t = batch["step"] // STEPS, batch["step"] % STEPS
        assert (t[:, 1:] - t[:, :-1] == 1).all()
        assert (row[:, 1:] == row[:, :-1]).all()
        torch.testing.assert_close(batch["observation"], rollout["observation"][row, t])
        torch.testing.assert_close(batch["agent", "observation"], rollout["agent", "observation"][row, t])
        for key in leaves:
            recorded = rollout[key][row, t]
            is_state = any(key == k or key[0] == k for k in state_keys)
            expected = expected_spread(recorded, batch["is_init"].squeeze(-1)) if is_state else recorded
            assert batch[key].shape == recorded.shape
            torch.testing.assert_close(batch[key], expected, rtol=0, atol=0)
        seen += batch.numel()
    assert seen == rollout.numel()


def expected_spread(recorded: Tensor, is_init: Tensor) -> Tensor:
    """The stored_state at every step, and zero from the first reset after the chunk's start on."""
    out = torch.empty_like(recorded)
    for row in range(recorded.shape[0]):
        state = recorded[row, 0]
        for t in range(recorded.shape[1]):
            if t > 0 and is_init[row, t]:
                state = torch.zeros_like(state)
            out[row, t] = state
    return out


def test_spread_states_take_no_memory_without_resets() -> None:
    rollout = make_rollout()
    rollout["is_init"].zero_()
    buffer = RecurrentRolloutBuffer(NUM_ENVS * STEPS, SEQ_LEN, 5)
    buffer.store(rollout)
    hidden = buffer.sample()["memory_state", "hidden"]
    assert hidden.stride(1) == 0


def test_a_chunk_of_one_step_keeps_every_state() -> None:
    rollout = make_rollout()
    buffer = RecurrentRolloutBuffer(NUM_ENVS * STEPS, 1, 5)
    buffer.store(rollout)
    for batch in buffer:
        row, t = batch["step"] // STEPS, batch["step"] % STEPS
        assert torch.equal(batch["memory_state", "memory"], rollout["memory_state", "memory"][row, t])


def test_stored_bytes() -> None:
    rollout = make_rollout()
    numbers = 2 * 5 + 6 * 4 + 1
    for seq_len in (1, SEQ_LEN, STEPS):
        buffer = RecurrentRolloutBuffer(NUM_ENVS * STEPS, seq_len, 2)
        buffer.store(rollout)
        assert buffer.state_bytes() == NUM_ENVS * STEPS // seq_len * numbers * 4
    buffer = RecurrentRolloutBuffer(NUM_ENVS * STEPS, SEQ_LEN, 2, state_keys=["recurrent_state"])
    buffer.store(rollout)
    assert buffer.state_bytes() == ROWS * 7 * 4


def test_no_state_at_all_is_allowed() -> None:
    buffer = RecurrentRolloutBuffer(NUM_ENVS * STEPS, SEQ_LEN, 5)
    buffer.store(make_rollout().exclude("memory_state"))
    assert covered(buffer) == ALL_STEPS
    assert buffer.state_bytes() == 0


def test_memmap_storage(tmp_path: Path) -> None:
    storage = LazyMemmapStorage(ROWS, scratch_dir=str(tmp_path))
    buffer = RecurrentRolloutBuffer(NUM_ENVS * STEPS, SEQ_LEN, 5, storage=storage)
    for offset in (0, 500):
        rollout = make_rollout(offset)
        buffer.store(rollout)
        assert covered(buffer) == [offset + step for step in ALL_STEPS]
        batch = buffer.sample()
        row, t = (batch["step"] - offset) // STEPS, (batch["step"] - offset) % STEPS
        stored_state = rollout["memory_state", "hidden"][row[:, 0], t[:, 0]]
        assert torch.equal(batch["memory_state", "hidden"][:, 0], stored_state)


def test_the_stored_rollout_is_a_copy() -> None:
    rollout = make_rollout()
    buffer = RecurrentRolloutBuffer(NUM_ENVS * STEPS, SEQ_LEN, ROWS)
    buffer.store(rollout)
    kept = rollout.clone()
    for batch in buffer:
        batch["observation"].zero_()
    assert (rollout == kept).all()
    rollout["observation"].zero_()
    assert buffer.sample()["observation"].abs().sum() > 0


def test_sampling_with_info_and_another_size() -> None:
    buffer = RecurrentRolloutBuffer(NUM_ENVS * STEPS, SEQ_LEN, 5)
    buffer.store(make_rollout())
    batch, info = buffer.sample(return_info=True)
    assert batch.shape == (5, SEQ_LEN)
    assert "index" in info
    with pytest.warns(UserWarning, match="batch_size"):
        assert buffer.sample(2).shape == (2, SEQ_LEN)


@pytest.mark.parametrize("seq_len", [0, -1, 5])
def test_seq_len_must_divide_the_number_of_steps(seq_len: int) -> None:
    with pytest.raises(ValueError, match=f"divide num_steps = 48; got {seq_len}"):
        RecurrentRolloutBuffer(48, seq_len, 2)


@pytest.mark.parametrize("make_buffer", [RECURRENT, FLAT, PREFETCHING])
def test_refusals(make_buffer: MakeBuffer) -> None:
    buffer = make_buffer(2)
    with pytest.raises(ValueError, match=r"\[N, T\]; got \[48\]"):
        buffer.store(make_rollout().reshape(-1))
    with pytest.raises(ValueError, match="48 steps; got 4 x 6"):
        buffer.store(make_rollout()[:, :6])


def test_a_chunk_must_not_reach_across_environments() -> None:
    buffer = RecurrentRolloutBuffer(NUM_ENVS * STEPS, 8, 2)  # divides 48, but not 12
    with pytest.raises(ValueError, match="seq_len = 8 does not divide the rollout's length 12"):
        buffer.store(make_rollout())


def store_and_sample(buffer: RecurrentRolloutBuffer, rollout: TensorDict) -> TensorDict:
    buffer.store(rollout)
    return buffer.sample()


def test_missing_is_init_names_the_cure() -> None:
    buffer = RecurrentRolloutBuffer(NUM_ENVS * STEPS, SEQ_LEN, 2)
    with pytest.raises(KeyError, match="InitTracker"):
        store_and_sample(buffer, make_rollout().exclude("is_init"))


def test_a_storage_that_is_too_small_is_refused() -> None:
    from torchrl.data import LazyTensorStorage

    with pytest.raises(ValueError, match="holds 5 rows; a rollout has 16"):
        RecurrentRolloutBuffer(48, 3, 4, storage=LazyTensorStorage(5))
