# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# (tensordict's and torchrl's annotations are narrower than what they take)
"""`delayed_cue`: see a cue, wait, and name it when asked."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import Tensor
from torchrl.data import Binary, Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from cyborg_torchrl import keys
from cyborg_torchrl.registry import register_environment


@register_environment("delayed_cue")
class DelayedCueEnv(EnvBase):
    """Delayed cue, batched on one device.

    An episode lasts `horizon + 2` steps: the cue, `horizon` blank steps, the query.

    - Observation, [N, cues + 2] float: the cue as one-hot with the cue flag (second last entry) at the first step;
      all zero while blank; the query flag (last entry) at the last step.
    - Action, [N] integer in [0, cues): the action at the query is the answer; all others are ignored.
    - Reward: +1 for the right answer, -1 for a wrong one, 0 otherwise. The answer terminates the episode.
    - "success", [N, 1] bool: true where the answer was right.

    Chance is 1 / cues. Nothing but memory helps: between cue and query all observations are the same.

    Args:
        num_envs: N, environments side by side.
        cues: number of different cues, 2 or more.
        horizon: blank steps between cue and query, 0 or more.
        device: where it runs.
        seed: seed of the cues; None draws one from torch's generator.

    Raises:
        ValueError: if a number is out of range or no integer.
    """

    def __init__(
        self,
        num_envs: int = 64,
        *,
        cues: int = 4,
        horizon: int = 1000,
        device: torch.device | str | None = None,
        seed: int | None = None,
    ) -> None:
        for name, value, least in (("num_envs", num_envs, 1), ("cues", cues, 2), ("horizon", horizon, 0)):
            if not isinstance(value, Integral):
                raise ValueError(f"{name} must be an integer; got {value!r}.")
            if value < least:
                raise ValueError(f"{name} must be >= {least}; got {value}.")
        super().__init__(device=device, batch_size=[num_envs])
        self.num_envs, self.cues, self.horizon = num_envs, cues, horizon
        self.max_episode_steps = horizon + 2
        flag = (num_envs, 1)
        self.observation_spec = Composite(
            {
                keys.OBSERVATION: Bounded(0.0, 1.0, (num_envs, cues + 2), dtype=torch.float32, device=self.device),
                keys.SUCCESS: Binary(1, flag, dtype=torch.bool, device=self.device),
            },
            shape=[num_envs],
        )
        self.action_spec = Categorical(cues, shape=[num_envs], device=self.device)
        self.reward_spec = Unbounded(flag, device=self.device)
        ends = (keys.DONE, keys.TERMINATED, keys.TRUNCATED)
        self.done_spec = Composite(
            {key: Binary(1, flag, dtype=torch.bool, device=self.device) for key in ends}, shape=[num_envs]
        )
        # one row for each kind of step, so that an observation is one look-up: each cue, blank, query
        self._shown = torch.zeros(cues + 2, cues + 2, device=self.device)
        self._shown[:cues, :cues] = torch.eye(cues)
        self._shown[:cues, -2] = 1.0
        self._shown[-1, -1] = 1.0
        self._cue = torch.zeros(num_envs, dtype=torch.long, device=self.device)
        self._time = torch.zeros(num_envs, dtype=torch.long, device=self.device)
        self._false = torch.zeros(flag, dtype=torch.bool, device=self.device)
        self._generator = torch.Generator(device=self.device)
        self.set_seed(int(torch.randint(2**31, ())) if seed is None else seed)

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDict:
        cue = torch.randint(self.cues, [self.num_envs], generator=self._generator, device=self.device)
        is_reset = None if tensordict is None else tensordict.get("_reset", None)
        if is_reset is None:
            self._cue, self._time = cue, torch.zeros_like(cue)
        else:
            is_reset = is_reset.reshape(self.num_envs)
            self._cue = torch.where(is_reset, cue, self._cue)
            self._time = self._time.masked_fill(is_reset, 0)
        # clones: whoever writes into what a reset returned must not write into the environment
        ends = (keys.SUCCESS, keys.DONE, keys.TERMINATED)
        return self._observe({key: self._false.clone() for key in ends})

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        is_query = self._time == self.horizon + 1
        is_right = is_query & (tensordict.get(keys.ACTION) == self._cue)
        reward = is_right.float() * 2.0 - is_query.float()
        self._time = self._time + 1
        done = is_query.unsqueeze(-1)
        entries = {keys.SUCCESS: is_right.unsqueeze(-1), keys.DONE: done, keys.TERMINATED: done}
        return self._observe({keys.REWARD: reward.unsqueeze(-1), **entries})

    def _observe(self, entries: dict[str, Tensor]) -> TensorDict:
        kind = torch.where(self._time == 0, self._cue, self.cues)
        kind = kind + (self._time == self.horizon + 1)
        observation = self._shown[kind]
        return TensorDict(
            {keys.OBSERVATION: observation, keys.TRUNCATED: self._false.clone(), **entries},
            self.batch_size,
            device=self.device,
        )

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self._generator.manual_seed(seed)


class _Oracle(TensorDictModuleBase):
    """Names the cue last seen by each environment; knows the observations alone."""

    def __init__(self, cues: int) -> None:
        super().__init__()
        self.cues = cues
        self.in_keys, self.out_keys = [keys.OBSERVATION], [keys.ACTION]
        self._cue: Tensor | None = None

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        observation = tensordict.get(keys.OBSERVATION)
        seen = observation[..., : self.cues].argmax(-1)
        if self._cue is None or self._cue.shape != seen.shape:
            self._cue = torch.zeros_like(seen)
        self._cue = torch.where(observation[..., -2] > 0, seen, self._cue)
        return tensordict.set(keys.ACTION, self._cue.clone())


def _name_first_cue(observation: Tensor) -> Tensor:
    return observation.new_zeros(observation.shape[:-1], dtype=torch.long)


def oracle_policy(env: DelayedCueEnv) -> TensorDictModuleBase:
    """The policy that remembers the cue it saw: it always succeeds."""
    return _Oracle(env.cues)


def memoryless_policy(env: DelayedCueEnv) -> TensorDictModuleBase:
    """The best that can be done from the present observation alone: one fixed answer, right by chance, 1 / env.cues.

    With a horizon of 0 too: the query does not show the cue.
    """
    return TensorDictModule(_name_first_cue, in_keys=[keys.OBSERVATION], out_keys=[keys.ACTION])
