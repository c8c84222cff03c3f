"""Collects rollouts without holding a memory state for every step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from tensordict import TensorDict, TensorDictBase, lazy_stack
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import set_recurrent_mode
from torchrl.modules.utils.utils import _maybe_append_env_transforms_from_module as append_transforms

from cyborg_torchrl import keys
from cyborg_torchrl.collectors.env_stepper import Track
from cyborg_torchrl.collectors.flat_dict import NotFusable
from cyborg_torchrl.collectors.fused_policy import policy_step
from cyborg_torchrl.collectors.resume import resumed_track, track_state
from cyborg_torchrl.collectors.runtime import rare_garbage_collection
from cyborg_torchrl.data import Rollout
from cyborg_torchrl.modules.replay import memory_state_keys
from cyborg_torchrl.objectives import value_after
from cyborg_torchrl.registry import did_you_mean


class RolloutCollector:
    """Steps an environment in this process, and keeps memory states before some steps only.

    TorchRL's collectors hold two states for every step, the one before and the one after, which for a Mamba block is
    thousands of times what the step itself takes. Here states only pass through; those before `state_steps` are
    kept. All other entries equal those of TorchRL's `Collector` with the same seed, bit by bit with
    `compiled_step=False`. Where an episode is cut off, the value of its last observation is taken at once, while the
    state that belongs to it is there: ("next", "state_value").

    Policies are run, and native environments stepped, on tensors alone (see `FusedCollector`), with the same results.

    Args:
        env: batched, or not; `InitTracker` and the policy's primers are added if they are missing.
        policy: acts; its memory states are found by their names under "next".
        frames_per_batch: steps of a rollout, all environments together.
        total_frames: steps in all; whole rollouts.
        value_operator: from an observation and a memory state to "state_value"; also asked at every step if the policy
            does not write it.
        state_steps: from T to the steps before which states are kept; None: before the first.
        exclude_keys: entries that are not kept either, ("next", key) for those after a step: observations, for
            instance, which stand there a second time.
        is_fused: step on tensors alone where that is possible.
        compiled_step: compute the agent's networks by one C++ call a step, if there is one (`compile_step`). Its
            results differ from those of torch in the last digits.

    Raises:
        ValueError: if frames_per_batch is not a multiple of the number of environments, or total_frames of it; or if an
            entry that is to be excluded is needed, or not there.
    """

    def __init__(
        self,
        env: EnvBase,
        policy: TensorDictModuleBase,
        *,
        frames_per_batch: int,
        total_frames: int,
        value_operator: TensorDictModuleBase,
        state_steps: Callable[[int], Sequence[int]] | None = None,
        exclude_keys: Sequence[NestedKey] = (),
        is_fused: bool = True,
        compiled_step: bool = True,
    ) -> None:
        num_envs = env.batch_size.numel()
        self.steps = rollout_steps(frames_per_batch, total_frames, num_envs)
        self.env = append_transforms(env, policy)  # as TorchRL's collectors do it
        self.policy, self.value_operator = policy, value_operator
        self.frames_per_batch, self.total_frames, self.frames = frames_per_batch, total_frames, 0
        self.at = tuple(state_steps(self.steps)) if state_steps else (0,)
        self.state_keys = memory_state_keys(policy)
        excluded = excluded_keys(exclude_keys, self.env, policy)
        self._dropped = [*self.state_keys, *(unravel_key((keys.NEXT, key)) for key in self.state_keys), *excluded]
        with torch.no_grad():  # here, as TorchRL's collectors do, so that both take the same random numbers
            self._carried = self.env.reset()
        self._track: Track | None = None
        if is_fused and keys.VALUE in policy.out_keys:
            with contextlib.suppress(NotFusable):
                acts, _ = policy_step(policy, self.env, compiled_step=compiled_step)
                self._track = Track(self.env, acts, value_operator, self.state_keys, self.at, excluded)

    def __iter__(self) -> Iterator[Rollout]:
        """Yields rollouts until `total_frames` steps have been taken."""
        while self.frames < self.total_frames:
            rollout = self.rollout()
            self.frames += self.frames_per_batch
            yield rollout
            del rollout  # before there is another one

    @torch.no_grad()
    @rare_garbage_collection()
    def rollout(self) -> Rollout:
        """Takes the steps of one rollout; episodes go on where the last one ended."""
        with set_exploration_type(ExplorationType.RANDOM), set_recurrent_mode(False):
            steps, states = self._rollout_on_tensors(self._track) if self._track else self._rollout()
        stored_states = stacked_states(states, self.state_keys, self.env)
        if len(self.env.batch_size) == 0:
            steps, stored_states = steps.unsqueeze(0), stored_states.unsqueeze(0)
        return Rollout(steps.filter_empty_(), stored_states, self.at)

    def _rollout(self) -> tuple[TensorDictBase, list[TensorDictBase]]:
        """Steps [*N, T], and the tensordicts with the states before the steps of `at`."""
        rows: list[TensorDictBase] = []
        states: list[TensorDictBase] = []
        wanted = set(self.at)
        for t in range(self.steps):
            if t in wanted:
                # not copied: a step makes new tensors, and leaves those before as they are
                states.append(self._carried.select(*self.state_keys))
            played, self._carried = self.env.step_and_maybe_reset(self.policy(self._carried))
            rows.append(self._recorded(played, is_last=t == self.steps - 1))
        return cast("TensorDictBase", torch.stack(rows, len(self.env.batch_size))), states

    def _rollout_on_tensors(self, track: Track) -> tuple[TensorDictBase, list[TensorDictBase]]:
        """The same on flat entries."""
        track.begin(self._carried, self.steps)
        track.policy.begin(self.env.batch_size.numel())
        for _ in range(self.steps):
            track.step()
        steps, self._carried = track.end()
        return steps, track.states

    def state_dict(self) -> dict[str, Any] | None:
        """Where the collector stands between two rollouts; None if its environment cannot tell."""
        track = track_state(self.env, self._carried)
        return None if track is None else {"tracks": [track], "frames": self.frames}

    def load_state_dict(self, state: Mapping[str, Any]) -> int:
        """Goes back to a state of `state_dict`. Returns how many environments begin new episodes instead."""
        self._carried, lost = resumed_track(self.env, state["tracks"][0])
        self.frames = state["frames"]
        return lost

    def set_seed(self, seed: int) -> int | None:
        """Seeds the environment. Returns a seed for the next one, as TorchRL does."""
        return self.env.set_seed(seed)

    def shutdown(self) -> None:
        """Closes the environment."""
        if not self.env.is_closed:
            self.env.close()

    def _recorded(self, played: TensorDictBase, *, is_last: bool) -> TensorDictBase:
        """A step as it is kept: without states, with the value of an observation that nothing follows."""
        following, record = played.get(keys.NEXT), played.exclude(*self._dropped)
        if record.get(keys.VALUE, None) is None:
            read = played.select(*self.value_operator.in_keys, strict=False)
            record.set(keys.VALUE, self.value_operator(read).get(keys.VALUE))
        terminated = following.get(keys.TERMINATED)
        is_cut = ~terminated if is_last else following.get(keys.DONE) & ~terminated
        value = torch.zeros_like(record.get(keys.VALUE))
        if bool(is_cut.any()):
            mask = is_cut.squeeze(-1)
            value[mask] = value_after(following[mask], self.value_operator)
        record.set((keys.NEXT, keys.VALUE), value)
        return record


def rollout_steps(frames_per_batch: int, total_frames: int, num_envs: int) -> int:
    """Steps T of each environment in a rollout.

    Raises:
        ValueError: if frames_per_batch is not a multiple of the number of environments, or total_frames of it.
    """
    if frames_per_batch < 1 or frames_per_batch % num_envs:
        raise ValueError(f"frames_per_batch must be a multiple of the {num_envs} environments; got {frames_per_batch}.")
    if total_frames < 1 or total_frames % frames_per_batch:
        raise ValueError(
            f"total_frames must be a multiple of frames_per_batch = {frames_per_batch}; got {total_frames}."
        )
    return frames_per_batch // num_envs


NEEDED = (keys.ACTION, keys.VALUE, keys.IS_INIT, *((keys.NEXT, k) for k in (keys.REWARD, keys.DONE, keys.TERMINATED)))
"""Entries that no update does without."""


def excluded_keys(exclude_keys: Sequence[NestedKey], env: EnvBase, policy: TensorDictModuleBase) -> list[NestedKey]:
    """The entries that are not to be kept, checked.

    Raises:
        ValueError: if there is no such entry, or an update needs it.
    """
    if isinstance(exclude_keys, str):
        raise ValueError(f"exclude_keys is a sequence of keys; got '{exclude_keys}'. For one: ['{exclude_keys}'].")
    written = [unravel_key(key) for key in policy.out_keys]
    found = [unravel_key(key) for key in (*env.observation_spec.keys(True, True), *env.full_done_spec.keys(True, True))]
    rewards = [unravel_key(key) for key in env.full_reward_spec.keys(True, True)]
    known = {*found, *written, *(unravel_key((keys.NEXT, key)) for key in (*found, *rewards))}
    excluded = [unravel_key(key) for key in exclude_keys]
    for key in excluded:
        if key in NEEDED:
            raise ValueError(f"{key!r} cannot be excluded: an update needs it.")
        if key not in known:
            raise ValueError(f"no entry {key!r} to exclude: {did_you_mean(str(key), sorted(map(str, known)))}")
    return excluded


def stacked_states(states: Sequence[TensorDictBase], state_keys: Sequence[NestedKey], env: EnvBase) -> TensorDict:
    """Memory states [*N] of some steps as stored_states [*N, steps]."""
    dim = len(env.batch_size)
    entries = _whole_entries(states[0], state_keys) if states else []
    kept = {entry: _stack([state.get(entry) for state in states], dim) for entry in entries}
    return TensorDict(kept, [*env.batch_size, len(states)])


def _whole_entries(tensordict: TensorDictBase, state_keys: Sequence[NestedKey]) -> list[NestedKey]:
    """The state keys, and in place of those that fill a nested tensordict that tensordict: one look-up a step."""
    entries: dict[NestedKey, None] = {}
    for key in state_keys:
        parent = key[:-1] if isinstance(key, tuple) else ()
        whole = parent and all((*parent, leaf) in state_keys for leaf in tensordict.get(parent).keys())
        entries[unravel_key(parent) if whole else key] = None
    return list(entries)


def _stack(values: Sequence[TensorDictBase | Tensor], dim: int) -> TensorDictBase | Tensor:
    """Tensordicts side by side without a copy, which is made by whoever stores them; tensors copied."""
    if isinstance(values[0], Tensor):
        return torch.stack(values, dim)
    return lazy_stack([value.clear_device_() for value in values], dim)
