"""A batch of environments on its way through a rollout, on flat entries."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor
from torchrl.envs import EnvBase

from cyborg_torchrl import keys
from cyborg_torchrl.collectors.flat_dict import Columns, Entries, flat
from cyborg_torchrl.collectors.fused_env import env_step
from cyborg_torchrl.collectors.fused_policy import PolicyStep
from cyborg_torchrl.modules.nan_check import check_finite
from cyborg_torchrl.objectives import value_after


class Track:
    """Environments that step together, what they carry from one step to the next, and what is kept of a rollout.

    Args:
        env: with all its transforms, the policy's primers among them.
        policy: chooses the actions.
        value_operator: from an observation and a memory state to "state_value".
        state_keys: entries that are memory states; kept before the steps `at` alone.
        at: those steps.
        excluded: other entries that are not kept, ("next", key) for those after a step.

    Raises:
        NotFusable: if the environment cannot be stepped like this.
        NonFiniteError: by `end`, if something that the update reads is not finite.
    """

    def __init__(
        self,
        env: EnvBase,
        policy: PolicyStep,
        value_operator: TensorDictModuleBase,
        state_keys: Sequence[NestedKey],
        at: Collection[int],
        excluded: Collection[NestedKey] = (),
    ) -> None:
        self.env, self.policy, self.value_operator = env, policy, value_operator
        self._step, _ = env_step(env)
        self.state_keys, self._at = state_keys, set(at)
        self._dropped = {*state_keys, *(unravel_key((keys.NEXT, key)) for key in state_keys), *excluded}
        self._dropped_after = {unravel_key(key[1:]) for key in self._dropped if key[0] == keys.NEXT and len(key) > 1}
        self._checked = [*policy.in_keys, keys.VALUE, keys.ACTION_LOG_PROB, (keys.NEXT, keys.REWARD)]
        self.carried: Entries = {}
        self.states: list[TensorDictBase] = []
        self._may_begin = True

    def begin(self, carried: TensorDictBase, steps: int) -> None:
        """Begins a rollout of so many steps where the one before ended."""
        self.carried, self._may_begin = flat(carried), True
        self.states, self._columns, self._steps = [], Columns(steps), steps
        self._time, self._cut = 0, list[tuple[int, Tensor, Tensor]]()

    def step(self) -> None:
        """Act, step the environments, and keep the results."""
        if self._time in self._at:
            # not copied: a step makes new tensors, and leaves those before as they are
            self.states.append(TensorDict({key: self.carried[key] for key in self.state_keys}, self.env.batch_size))
        written = self.policy(self.carried, may_begin=self._may_begin)
        after, begins, is_over = self._step.step(self.carried, written)
        before = {**self.carried, **written}
        self._columns.append(
            [(key, value) for key, value in before.items() if key not in self._dropped],
            [(key, value) for key, value in after.items() if key not in self._dropped_after],
        )
        is_last = self._time == self._steps - 1
        if is_last or (self._step.is_ever_cut and is_over is not None):
            self._value_where_cut(after, is_last)
        self.carried, self._may_begin = begins, is_over is not None
        self._time += 1

    def end(self) -> tuple[TensorDict, TensorDict]:
        """The steps [N, T], and what the next rollout begins with."""
        columns = self._columns.tensors
        del self._columns  # whoever takes the rollout has it alone
        steps = TensorDict(columns, [*self.env.batch_size, self._steps])
        if steps.ndim == 2:
            check_finite(steps, self._checked)
        self.policy.check(columns)
        value = torch.zeros_like(steps.get(keys.VALUE))
        for time, is_cut, found in self._cut:
            value[is_cut, time] = found
        steps.set((keys.NEXT, keys.VALUE), value)
        return steps, TensorDict(self.carried, self.env.batch_size, device=self.env.device)

    def _value_where_cut(self, after: Entries, is_last: bool) -> None:
        """Values of observations that no step is taken from."""
        is_cut = ~after[keys.TERMINATED] if is_last else after[keys.DONE] & ~after[keys.TERMINATED]
        if bool(is_cut.any()):
            is_cut = is_cut.squeeze(-1)
            following = TensorDict(after, self.env.batch_size)[is_cut]
            self._cut.append((self._time, is_cut, value_after(following, self.value_operator)))
