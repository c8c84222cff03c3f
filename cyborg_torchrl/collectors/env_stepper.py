"""A batch of environments that takes the steps of a rollout, on flat dictionaries."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor
from torchrl.envs import EnvBase

from cyborg_torchrl import keys
from cyborg_torchrl.collectors.flat_dict import FlatDict, RolloutWriter, flat
from cyborg_torchrl.collectors.fused_env import env_step
from cyborg_torchrl.collectors.fused_policy import PolicyStep
from cyborg_torchrl.modules.nan_check import check_finite
from cyborg_torchrl.objectives import value_after


class EnvStepper:
    """Steps a batch of environments, carries entries from step to step, and records the rollout.

    Args:
        env: the environment with all its transforms, including the policy's primers.
        policy: chooses the actions.
        value_operator: from an observation and a memory state to "state_value".
        state_keys: entries that are memory states.
        state_steps: the steps before which memory states are stored.
        excluded: other entries that are not stored; ("next", key) for those after a step.

    Raises:
        NotFusable: if the environment cannot be stepped on flat dictionaries.
        NonFiniteError: from `end`, if an entry that the update reads is not finite.
    """

    def __init__(
        self,
        env: EnvBase,
        policy: PolicyStep,
        value_operator: TensorDictModuleBase,
        state_keys: Sequence[NestedKey],
        state_steps: Collection[int],
        excluded: Collection[NestedKey] = (),
    ) -> None:
        self.env, self.policy, self.value_operator = env, policy, value_operator
        self._step, _ = env_step(env)
        self.state_keys, self._state_steps = state_keys, set(state_steps)
        self._dropped = {*state_keys, *(unravel_key((keys.NEXT, key)) for key in state_keys), *excluded}
        self._dropped_after = {unravel_key(key[1:]) for key in self._dropped if key[0] == keys.NEXT and len(key) > 1}
        self._checked = [*policy.in_keys, keys.VALUE, keys.ACTION_LOG_PROB, (keys.NEXT, keys.REWARD)]
        self.carried: FlatDict = {}
        self.states: list[TensorDictBase] = []
        self._may_begin = True

    def begin(self, carried: TensorDictBase, steps: int) -> None:
        """Begin a rollout of `steps` steps where the last one ended."""
        self.carried, self._may_begin = flat(carried), True
        self.states, self._writer, self._steps = [], RolloutWriter(steps), steps
        self._time, self._cut = 0, list[tuple[int, Tensor, Tensor]]()

    def step(self) -> None:
        """Act, step the environments, and record the results."""
        if self._time in self._state_steps:
            # No copy is needed: a step makes new tensors and never writes into these.
            self.states.append(TensorDict({key: self.carried[key] for key in self.state_keys}, self.env.batch_size))
        written = self.policy(self.carried, may_begin=self._may_begin)
        after, begins, is_over = self._step.step(self.carried, written)
        # Entries of the policy win over carried ones with the same name, as in a tensordict.
        before = {**self.carried, **written}
        self._writer.append(
            [(key, value) for key, value in before.items() if key not in self._dropped],
            [(key, value) for key, value in after.items() if key not in self._dropped_after],
        )
        is_last = self._time == self._steps - 1
        # The value of a truncated episode needs the memory state of its last observation, which exists only now.
        if is_last or (self._step.is_ever_cut and is_over is not None):
            self._value_where_cut(after, is_last)
        self.carried, self._may_begin = begins, is_over is not None
        self._time += 1

    def end(self) -> tuple[TensorDict, TensorDict]:
        """Return the steps [N, T], and the entries with which the next rollout begins."""
        tensors = self._writer.tensors
        del self._writer  # the caller may then free the rollout
        # One tensordict for the whole rollout; the steps themselves never were tensordicts.
        steps = TensorDict(tensors, [*self.env.batch_size, self._steps])
        if steps.ndim == 2:
            check_finite(steps, self._checked)
        self.policy.check(tensors)
        value = torch.zeros_like(steps.get(keys.VALUE))
        for time, is_cut, last_value in self._cut:
            value[is_cut, time] = last_value
        steps.set((keys.NEXT, keys.VALUE), value)
        return steps, TensorDict(self.carried, self.env.batch_size, device=self.env.device)

    def _value_where_cut(self, after: FlatDict, is_last: bool) -> None:
        """Compute the values of last observations while their memory states are known."""
        is_cut = ~after[keys.TERMINATED] if is_last else after[keys.DONE] & ~after[keys.TERMINATED]
        if bool(is_cut.any()):
            is_cut = is_cut.squeeze(-1)
            following = TensorDict(after, self.env.batch_size)[is_cut]
            self._cut.append((self._time, is_cut, value_after(following, self.value_operator)))
