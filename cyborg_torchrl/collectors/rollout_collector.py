"""The default collector, which does not hold a memory state for every step."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

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
from cyborg_torchrl.collectors.cudagraph import GraphedPolicy, GraphedSteps, GraphedTask, with_graph
from cyborg_torchrl.collectors.flat_dict import NotFusable, RolloutWriter, flat
from cyborg_torchrl.collectors.fused_env import EnvStep, env_step
from cyborg_torchrl.collectors.fused_policy import PolicyStep, policy_step
from cyborg_torchrl.collectors.profiling import recorded
from cyborg_torchrl.collectors.resume import restore_stepper, stepper_state
from cyborg_torchrl.collectors.runtime import rare_garbage_collection
from cyborg_torchrl.data import Rollout
from cyborg_torchrl.envs.gym.gym_wrapper import check_wrapper
from cyborg_torchrl.modules.action_heads import NoValidActionError
from cyborg_torchrl.modules.nan_check import NonFiniteError, check_finite
from cyborg_torchrl.modules.replay import acting_policy, memory_state_keys
from cyborg_torchrl.objectives import value_after
from cyborg_torchrl.registry import did_you_mean


class RolloutCollector:
    """Collects rollouts in this process, and stores memory states before some steps only.

    TorchRL's collectors hold two states for every step, one before and one after it. For a Mamba block that is
    thousands of times the size of the step itself. Here only the states before `state_steps` are stored. All other
    entries equal those of TorchRL's `Collector` with the same seed, bit by bit with `compiled_step=False`. Where an
    episode is truncated, the value of its last observation is computed at once, with its memory state:
    ("next", "state_value").

    Policies and environments of this package step on tensors without tensordicts (see `FusedCollector`).

    Args:
        env: the environment, batched or not; `InitTracker` and the policy's primers are added if they are missing.
        policy: chooses the actions; its memory states are found by their names under "next".
        frames_per_batch: steps of a rollout, over all environments.
        total_frames: steps in total; a multiple of `frames_per_batch`.
        value_operator: from an observation and a memory state to "state_value"; also called at every step if the policy
            does not write it. A critic with a separate memory acts after the policy, and its states are stored.
        state_steps: from T to the steps before which states are stored; None: before the first.
        exclude_keys: other entries that are not stored; ("next", key) for those after a step, such as observations,
            which are also stored as those of the next step.
        is_fused: step on tensors if possible.
        compiled_step: compute the agent's networks by one C++ call a step, if there is one (`compile_step`). Its
            results differ from those of torch in the last digits.
        cudagraph: replay the policy's step as a CUDA graph (`GraphedPolicy`), with the step of a memory task of this
            package (`GraphedTask`); None: where that is possible.

    Raises:
        ValueError: if `frames_per_batch` is not a multiple of the number of environments, or `total_frames` of
            `frames_per_batch`; or if an excluded entry is needed or does not exist. With `cudagraph`: if the policy is
            not fused, or not on a CUDA device.
        WrapperError: if TorchRL's `GymWrapper` gets the environment wrong.
        NoValidActionError: while collecting, if an action mask allows no action.
        NonFiniteError: while collecting, if an entry that the update reads is not finite, or the last observation of an
            episode whose value is needed.
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
        cudagraph: bool | None = False,
    ) -> None:
        # A critic with a separate memory has to act at every step, or its state would be lost.
        policy = acting_policy(policy, value_operator)
        num_envs = env.batch_size.numel()
        self.steps = rollout_steps(frames_per_batch, total_frames, num_envs)
        self.env = append_transforms(env, policy)  # as TorchRL's collectors do
        self.policy, self.value_operator = policy, value_operator
        self.frames_per_batch, self.total_frames, self.frames = frames_per_batch, total_frames, 0
        self.state_steps = tuple(state_steps(self.steps)) if state_steps else (0,)
        self._state_steps = set(self.state_steps)
        self._step = 0
        """The present step of the rollout, for messages."""
        self._bad_end: tuple[int, TensorDictBase] | None = None
        """Step and entries of the first last observation whose value is not finite."""
        self.state_keys = memory_state_keys(policy)
        next_states = [unravel_key((keys.NEXT, key)) for key in self.state_keys]
        self._dropped = [*self.state_keys, *next_states, *excluded_keys(exclude_keys, self.env, policy)]
        with torch.no_grad():  # a reset here, as in TorchRL's collectors, so that both draw the same random numbers
            self._carried = self.env.reset()
        check_wrapper(self.env)  # the parts of a SerialEnv exist only after a reset
        warn_unread_mask(self.env, policy)
        self._fused: GraphedSteps | None = None
        if is_fused and keys.VALUE in policy.out_keys:
            devices = [parameter.device for parameter in policy.parameters()] + [self.env.device or torch.device("cpu")]
            step = policy_step(policy, self.env, compiled_step=compiled_step)
            with contextlib.suppress(NotFusable):
                self._fused = with_graph(step, env_step(self.env)[0], devices, cudagraph)
        if cudagraph and self._fused is None:
            raise ValueError("cudagraph needs a policy and an environment that can be fused.")

    def __iter__(self) -> Iterator[Rollout]:
        """Yield rollouts until `total_frames` steps have been taken."""
        while self.frames < self.total_frames:
            rollout = self.rollout()
            self.frames += self.frames_per_batch
            yield rollout
            del rollout  # so that two rollouts never exist at once

    @torch.no_grad()
    @rare_garbage_collection()
    def rollout(self) -> Rollout:
        """Collect one rollout; episodes continue from the last one."""
        self._bad_end = None
        with set_exploration_type(ExplorationType.RANDOM), set_recurrent_mode(False):
            try:
                steps, states = self._rollout_on_tensors(*self._fused) if self._fused else self._rollout()
            except NoValidActionError as error:
                raise NoValidActionError(error.row, self._step) from None
            except NonFiniteError as error:
                raise error.at_step(self._step) from None
            except Exception as error:
                error.add_note(f"at step {self._step} of the rollout")
                raise
        # Stacked lazily, since the buffer copies the states anyway.
        stored_states: TensorDictBase = TensorDict({}, [*self.env.batch_size, 0])
        if states:
            stored_states = lazy_stack([state.clear_device_() for state in states], len(self.env.batch_size))
        # Buffers and losses expect a batch of environments, so a single environment becomes a batch of one.
        if len(self.env.batch_size) == 0:
            steps, stored_states = steps.unsqueeze(0), stored_states.unsqueeze(0)
        if steps.ndim == 2:  # the message names environment and step
            self._check_finite(steps)
        return Rollout(steps.filter_empty_(), stored_states, self.state_steps)

    def _rollout(self) -> tuple[TensorDictBase, list[TensorDictBase]]:
        """Return the steps [*N, T], and the states before the steps `state_steps`."""
        rows: list[TensorDictBase] = []
        states: list[TensorDictBase] = []
        act, step = recorded("policy", self.policy), recorded("environment", self.env.step_and_maybe_reset)
        record = recorded("storage", self._recorded)
        for t in range(self.steps):
            self._step = t
            if t in self._state_steps:
                # No copy is needed: a step makes new tensors and never writes into these.
                states.append(self._carried.select(*self.state_keys))
            played, self._carried = step(act(self._carried))
            rows.append(record(played, is_last=t == self.steps - 1))
        return torch.stack(rows, len(self.env.batch_size)), states

    def _rollout_on_tensors(
        self, policy: PolicyStep | GraphedPolicy | GraphedTask, env: EnvStep | GraphedTask
    ) -> tuple[TensorDictBase, list[TensorDictBase]]:
        """Do the same on flat dictionaries."""
        batch_size = self.env.batch_size
        dropped_before = set(self._dropped)
        dropped_after = {unravel_key(key[1:]) for key in self._dropped if key[0] == keys.NEXT and len(key) > 1}
        writer = RolloutWriter(self.steps)
        states: list[TensorDictBase] = []
        last_values: list[tuple[int, Tensor, Tensor]] = []
        carried, may_begin = flat(self._carried), True
        policy.begin(batch_size.numel())
        act, step = recorded("policy", policy), recorded("environment", env.step)
        append = recorded("storage", writer.append)
        for t in range(self.steps):
            self._step = t
            if t in self._state_steps:
                states.append(TensorDict({key: carried[key] for key in self.state_keys}, batch_size))
            written = act(carried, may_begin=may_begin)
            after, begins, is_over = step(carried, written)
            # Entries of the policy win over carried ones with the same name, as in a tensordict.
            before = {**carried, **written}
            append(
                [(key, value) for key, value in before.items() if key not in dropped_before],
                [(key, value) for key, value in after.items() if key not in dropped_after],
            )
            # The value of a truncated episode needs the memory state of its last observation, which exists only now.
            is_last = t == self.steps - 1
            if is_last or (env.is_ever_cut and is_over is not None):
                following = TensorDict(after, batch_size)
                is_cut = _is_cut(following, is_last=is_last)
                if bool(is_cut.any()):
                    last_values.append((t, is_cut, self._last_value(following, is_cut)))
            carried, may_begin = begins, is_over is not None
        # One tensordict for the whole rollout; the steps themselves never were tensordicts.
        steps = TensorDict(writer.tensors, [*batch_size, self.steps])
        if steps.ndim == 2:  # before the policy's check, which names only the log-prob
            self._check_finite(steps)
        policy.check(writer.tensors)
        value = torch.zeros_like(steps.get(keys.VALUE))
        for t, is_cut, last_value in last_values:
            value[is_cut, t] = last_value
        steps.set((keys.NEXT, keys.VALUE), value)
        self._carried = TensorDict(carried, batch_size, device=self.env.device)
        return steps, states

    def state_dict(self) -> dict[str, Any] | None:
        """Return the state between two rollouts; None if the environment has no state."""
        stepper = stepper_state(self.env, self._carried)
        return None if stepper is None else {"tracks": [stepper], "frames": self.frames}

    def load_state_dict(self, state: Mapping[str, Any]) -> int:
        """Restore a state of `state_dict`, and return how many environments begin new episodes instead."""
        self._carried, lost = restore_stepper(self.env, state["tracks"][0])
        self.frames = state["frames"]
        return lost

    def set_seed(self, seed: int) -> int | None:
        """Seed the environment, and return a seed for the next one, as TorchRL does."""
        return self.env.set_seed(seed)

    def shutdown(self) -> None:
        """Close the environment."""
        if not self.env.is_closed:
            self.env.close()

    def _last_value(self, following: TensorDictBase, is_cut: Tensor) -> Tensor:
        """Return the values of truncated episodes' last observations, which may be stored nowhere else."""
        value = value_after(following[is_cut], self.value_operator)
        if self._bad_end is None and not bool(value.sum().isfinite()):
            self._bad_end = self._step, following.select(*self.value_operator.in_keys, strict=False)
        return value

    def _check_finite(self, steps: TensorDictBase) -> None:
        """Raise NonFiniteError for the first number of a rollout [N, T] that is not finite."""
        read = [*self.policy.in_keys, keys.VALUE, keys.ACTION_LOG_PROB, (keys.NEXT, keys.REWARD)]
        if self._bad_end is not None:
            step, following = self._bad_end
            for key, value in flat(following.reshape(len(steps))).items():
                if key in self.state_keys:
                    continue
                shown = value.new_zeros(len(steps), self.steps, *value.shape[1:])
                shown[:, step] = value
                steps.set((keys.NEXT, key), shown)
                read.append(unravel_key((keys.NEXT, key)))
        check_finite(steps, read)

    def _recorded(self, played: TensorDictBase, *, is_last: bool) -> TensorDictBase:
        """Return a step without its states, and with the value of a truncated episode's last observation."""
        following, record = played.get(keys.NEXT), played.exclude(*self._dropped)
        # A policy without a critic writes no value; it is computed with the state before the step.
        if record.get(keys.VALUE, None) is None:
            read = played.select(*self.value_operator.in_keys, strict=False)
            record.set(keys.VALUE, self.value_operator(read).get(keys.VALUE))
        is_cut = _is_cut(following, is_last=is_last)
        value = torch.zeros_like(record.get(keys.VALUE))
        if bool(is_cut.any()):
            value[is_cut] = self._last_value(following, is_cut)
        record.set((keys.NEXT, keys.VALUE), value)
        return record


def _is_cut(following: TensorDictBase, *, is_last: bool) -> Tensor:
    """Return where an episode is truncated, [*N]. Episodes that run at the end of a rollout are bootstrapped alike."""
    terminated = following.get(keys.TERMINATED)
    is_cut = ~terminated if is_last else following.get(keys.DONE) & ~terminated
    return is_cut.squeeze(-1)


def rollout_steps(frames_per_batch: int, total_frames: int, num_envs: int) -> int:
    """Return the steps T of each environment in a rollout.

    Raises:
        ValueError: if `frames_per_batch` is not a multiple of the number of environments, or `total_frames` of
            `frames_per_batch`.
    """
    if frames_per_batch < 1 or frames_per_batch % num_envs:
        raise ValueError(f"frames_per_batch must be a multiple of the {num_envs} environments; got {frames_per_batch}.")
    if total_frames < 1 or total_frames % frames_per_batch:
        raise ValueError(
            f"total_frames must be a multiple of frames_per_batch = {frames_per_batch}; got {total_frames}."
        )
    return frames_per_batch // num_envs


def warn_unread_mask(env: EnvBase, policy: TensorDictModuleBase) -> None:
    """Warn if the environment marks its valid actions and the policy does not read that entry."""
    entries = [unravel_key(key) for key in env.observation_spec.keys(True, True)]
    masks = [key for key in entries if key == keys.ACTION_MASK or key[-1] == keys.ACTION_MASK]
    read = {unravel_key(key) for key in policy.in_keys}
    if masks and read.isdisjoint(masks):
        warnings.warn(
            f"the policy does not read the environment's entry {masks[0]!r}, so it may choose invalid actions. Build "
            f"it with PPOAgent(..., action_mask={masks[0]!r}, mask_shape=...).",
            stacklevel=3,
        )


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
