"""Steps some environments while the policy acts for others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torchrl.envs import EnvBase, ParallelEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import set_recurrent_mode
from torchrl.modules.utils.utils import _maybe_append_env_transforms_from_module as append_transforms

from cyborg_torchrl import keys
from cyborg_torchrl.collectors.env_stepper import Track
from cyborg_torchrl.collectors.flat_dict import Entries
from cyborg_torchrl.collectors.fused_env import Step
from cyborg_torchrl.collectors.fused_policy import policy_step
from cyborg_torchrl.collectors.resume import resumed_track, track_state
from cyborg_torchrl.collectors.rollout_collector import excluded_keys, rollout_steps, stacked_states
from cyborg_torchrl.collectors.runtime import rare_garbage_collection
from cyborg_torchrl.cores import fixed_parameters
from cyborg_torchrl.data import Rollout
from cyborg_torchrl.modules.nan_check import NonFiniteError
from cyborg_torchrl.modules.replay import memory_state_keys

PAUSE = 5e-5
"""Seconds between two looks at whether processes are done."""


class OverlappedCollector:
    """As `RolloutCollector`, over groups of environments: while one group steps, the policy acts for the next.

    Each group steps in a thread of its own, which pays where a step waits for something else: processes (`env.workers`,
    ParallelEnv), a simulator in C++ that lets go of Python's lock, a network. Acting is in one thread and in a fixed
    order, so rollouts do not depend on timing: they equal those that the groups yield by turns.

    Args:
        envs: the groups; batches of environments, all of one size and of the same specs. Give each a seed of its own,
            or call `set_seed`, or they play the same episodes. InitTracker and the policy's primers are added if they
            are missing.
        policy: acts; writes "state_value" too.
        frames_per_batch: steps of a rollout, all groups together.
        total_frames: steps in all; whole rollouts.
        value_operator: from an observation and a memory state to "state_value".
        keyframe_steps: from T to the steps before which states are kept; None: before the first.
        exclude_keys: entries that are not kept, as in `RolloutCollector`.
        is_overlapped: False: by turns, in one thread.

    Raises:
        ValueError: if there is no group, groups differ in size, or the numbers of steps do not fit.
    """

    def __init__(
        self,
        envs: Sequence[EnvBase],
        policy: TensorDictModuleBase,
        *,
        frames_per_batch: int,
        total_frames: int,
        value_operator: TensorDictModuleBase,
        keyframe_steps: Callable[[int], Sequence[int]] | None = None,
        exclude_keys: Sequence[NestedKey] = (),
        is_overlapped: bool = True,
    ) -> None:
        if not envs:
            raise ValueError("there is no group of environments.")
        sizes = {tuple(env.batch_size) for env in envs}
        if len(sizes) != 1 or len(next(iter(sizes))) != 1:
            raise ValueError(f"groups are batches of one size [n]; got {sorted(map(list, sizes))}.")
        if keys.VALUE not in policy.out_keys:
            raise ValueError(f"the policy has to write '{keys.VALUE}' too; it writes {list(policy.out_keys)}.")
        num_envs = sum(env.batch_size.numel() for env in envs)
        self.steps = rollout_steps(frames_per_batch, total_frames, num_envs)
        self.envs = [append_transforms(env, policy) for env in envs]
        self.frames_per_batch, self.total_frames, self.frames = frames_per_batch, total_frames, 0
        self.at = tuple(keyframe_steps(self.steps)) if keyframe_steps else (0,)
        self.state_keys = memory_state_keys(policy)
        with torch.no_grad():
            self._carried: list[TensorDictBase] = [env.reset() for env in self.envs]
        self._acts, _ = policy_step(policy, self.envs[0])
        excluded = excluded_keys(exclude_keys, self.envs[0], policy)
        parts = (self._acts, value_operator, self.state_keys, self.at, excluded)
        self._tracks = [Track(env, *parts) for env in self.envs]
        self._threads = ThreadPoolExecutor(len(envs), "environments") if is_overlapped else None
        if is_overlapped:
            for env in self.envs:
                _let_others_run_while_waiting(env)

    def __iter__(self) -> Iterator[Rollout]:
        """Yields rollouts until `total_frames` steps have been taken."""
        while self.frames < self.total_frames:
            rollout = self.rollout()
            self.frames += self.frames_per_batch
            yield rollout
            del rollout  # before there is another one

    @torch.no_grad()
    @fixed_parameters()
    @rare_garbage_collection()
    def rollout(self) -> Rollout:
        """Takes the steps of one rollout [N, T], the groups one below the other."""
        with set_exploration_type(ExplorationType.RANDOM), set_recurrent_mode(False):
            for track, carried in zip(self._tracks, self._carried, strict=True):
                track.begin(carried, self.steps)
            self._acts.begin(self.envs[0].batch_size.numel())
            self._take_steps()
            ends = [self._end(index) for index in range(len(self._tracks))]
        self._carried = [carried for _, carried in ends]
        steps = torch.cat([steps for steps, _ in ends])
        keyframes = torch.cat([stacked_states(track.states, self.state_keys, track.env) for track in self._tracks])
        return Rollout(steps.filter_empty_(), keyframes, self.at)

    def state_dict(self) -> dict[str, Any] | None:
        """Where the collector stands between two rollouts; None if its environments cannot tell."""
        tracks = [track_state(env, carried) for env, carried in zip(self.envs, self._carried, strict=True)]
        return None if None in tracks else {"tracks": tracks, "frames": self.frames}

    def load_state_dict(self, state: Mapping[str, Any]) -> int:
        """Goes back to a state of `state_dict`. Returns how many environments begin new episodes instead.

        Raises:
            ValueError: if there were more groups, or fewer.
        """
        if len(state["tracks"]) != len(self.envs):
            raise ValueError(f"the state is that of {len(state['tracks'])} groups; here are {len(self.envs)}.")
        resumed = [resumed_track(env, track) for env, track in zip(self.envs, state["tracks"], strict=True)]
        self._carried, self.frames = [carried for carried, _ in resumed], state["frames"]
        return sum(lost for _, lost in resumed)

    def set_seed(self, seed: int) -> int | None:
        """Seeds the groups, each by its own seed. Returns a seed for the next one, as TorchRL does."""
        following: int | None = seed
        for env in self.envs:
            following = env.set_seed(following)
        return following

    def shutdown(self) -> None:
        """Ends the threads and closes the environments."""
        if self._threads is not None:
            self._threads.shutdown()
        for env in self.envs:
            if not env.is_closed:
                env.close()

    def _end(self, group: int) -> tuple[TensorDictBase, TensorDictBase]:
        try:
            return self._tracks[group].end()
        except NonFiniteError as error:  # the group counts its own environments
            before = group * self.envs[0].batch_size.numel()
            raise NonFiniteError(
                error.key, error.value, before + (error.environment or 0), error.step, error.record
            ) from None

    def _take_steps(self) -> None:
        pending: list[Future[Step] | None] = [None] * len(self._tracks)
        try:
            for _ in range(self.steps):
                for index, track in enumerate(self._tracks):
                    running = pending[index]
                    if running is not None:
                        track.take(running.result())
                    pending[index] = self._started(track)
            for track, running in zip(self._tracks, pending, strict=True):
                if running is not None:
                    track.take(running.result())
        finally:  # nothing steps on after an error, or Ctrl-C
            for running in pending:
                if running is not None:
                    running.exception()

    def _started(self, track: Track) -> Future[Step]:
        before = track.act()
        if self._threads is not None:
            return self._threads.submit(_step_without_gradient, track, before)
        done: Future[Step] = Future()
        done.set_result(track.step(before))
        return done


@torch.no_grad()
def _step_without_gradient(track: Track, before: tuple[Entries, Entries]) -> Step:
    """A step in a thread, which does not inherit its parent's modes."""
    with set_exploration_type(ExplorationType.RANDOM), set_recurrent_mode(False):
        return track.step(before)


def _let_others_run_while_waiting(env: EnvBase) -> None:
    """Makes TorchRL's ParallelEnv sleep while its processes step.

    It asks them over and over in Python, which keeps Python's lock from the thread in which the policy acts: two groups
    took longer than one.
    """
    for layer in env.modules():
        if isinstance(layer, ParallelEnv) and hasattr(layer, "_wait_for_workers"):
            object.__setattr__(layer, "_wait_for_workers", partial(_wait_asleep, layer, layer._wait_for_workers))


def _wait_asleep(env: ParallelEnv, wait: Callable[[Sequence[int]], None], workers: Sequence[int]) -> None:
    """Waits for processes with pauses; after a second as TorchRL does it, which finds those that died."""
    end = time.monotonic() + 1.0
    done, places = getattr(env, "_shm_done_flags", None), getattr(env, "_worker_indices", None)
    while done is not None and places is not None and time.monotonic() < end:
        if all(done[places[worker]] for worker in workers):
            break
        time.sleep(PAUSE)
    wait(workers)
