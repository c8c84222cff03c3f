# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# (tensordict's and torchrl's annotations are narrower than what they take)
"""`assoc_recall`: see pairs of key and value, wait, and name the value of one key."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import Tensor
from torchrl.data import Binary, Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from cyborg_torchrl import keys
from cyborg_torchrl.registry import register_environment


@register_environment("assoc_recall")
class AssocRecallEnv(EnvBase):
    """Associative recall, batched on one device.

    An episode lasts `pairs + horizon + 1` steps: the pairs one by one, `horizon` blank steps, the query.

    - Observation, [N, pairs + values + 1] float: a pair is its key and its value, each as one-hot; a blank step is all
      zero; the query is the one-hot of a key, with the query flag (last entry).
    - Keys are the numbers from 0 to pairs - 1 in an order drawn for each episode; values are drawn with replacement,
      and so is the key that is asked for.
    - Action, [N] integer in [0, values): the action at the query is the answer; all others are ignored.
    - Reward: +1 for the right answer, -1 for a wrong one, 0 otherwise. The answer terminates the episode.
    - "success", [N, 1] bool: true where the answer was right.

    Chance is 1 / values.

    Args:
        num_envs: N, environments side by side.
        pairs: number of pairs, 1 or more.
        values: number of different values, 2 or more.
        horizon: blank steps between the last pair and the query, 0 or more.
        device: where it runs.
        seed: seed of the episodes; None draws one from torch's generator.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        num_envs: int = 64,
        *,
        pairs: int = 4,
        values: int = 4,
        horizon: int = 50,
        device: torch.device | str | None = None,
        seed: int | None = None,
    ) -> None:
        least = {"num_envs": (num_envs, 1), "pairs": (pairs, 1), "values": (values, 2), "horizon": (horizon, 0)}
        for name, (value, bound) in least.items():
            if value < bound:
                raise ValueError(f"{name} must be >= {bound}; got {value}.")
        super().__init__(device=device, batch_size=[num_envs])
        self.num_envs, self.pairs, self.values, self.horizon = num_envs, pairs, values, horizon
        self.max_episode_steps = pairs + horizon + 1
        flag, size = (num_envs, 1), pairs + values + 1
        self.observation_spec = Composite(
            {
                keys.OBSERVATION: Bounded(0.0, 1.0, (num_envs, size), dtype=torch.float32, device=self.device),
                keys.SUCCESS: Binary(1, flag, dtype=torch.bool, device=self.device),
            },
            shape=[num_envs],
        )
        self.action_spec = Categorical(values, shape=[num_envs], device=self.device)
        self.reward_spec = Unbounded(flag, device=self.device)
        ends = (keys.DONE, keys.TERMINATED, keys.TRUNCATED)
        self.done_spec = Composite(
            {key: Binary(1, flag, dtype=torch.bool, device=self.device) for key in ends}, shape=[num_envs]
        )
        self._time = torch.zeros(num_envs, dtype=torch.long, device=self.device)
        self._order = torch.zeros(num_envs, pairs, dtype=torch.long, device=self.device)
        self._value_of = torch.zeros(num_envs, pairs, dtype=torch.long, device=self.device)
        self._asked = torch.zeros(num_envs, dtype=torch.long, device=self.device)
        self._false = torch.zeros(flag, dtype=torch.bool, device=self.device)
        self._generator = torch.Generator(device=self.device)
        self.set_seed(int(torch.randint(2**31, ())) if seed is None else seed)

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDict:
        shape = (self.num_envs, self.pairs)
        options = {"generator": self._generator, "device": self.device}
        order = torch.rand(shape, **options).argsort(-1)
        value_of = torch.randint(self.values, shape, **options)
        asked = torch.randint(self.pairs, shape[:1], **options)
        is_reset = None if tensordict is None else tensordict.get("_reset", None)
        if is_reset is None:
            is_reset = torch.ones_like(self._false)
        self._order = torch.where(is_reset, order, self._order)
        self._value_of = torch.where(is_reset, value_of, self._value_of)
        self._asked = torch.where(is_reset.squeeze(-1), asked, self._asked)
        self._time = self._time.masked_fill(is_reset.squeeze(-1), 0)
        # clones: whoever writes into what a reset returned must not write into the environment
        return self._observe({key: self._false.clone() for key in (keys.SUCCESS, keys.DONE, keys.TERMINATED)})

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        is_query = self._time == self.max_episode_steps - 1
        answer = self._value_of.gather(1, self._asked.unsqueeze(1)).squeeze(1)
        is_right = is_query & (tensordict.get(keys.ACTION) == answer)
        reward = is_right.float() * 2.0 - is_query.float()
        self._time = self._time + 1
        done = is_query.unsqueeze(-1)
        entries = {keys.SUCCESS: is_right.unsqueeze(-1), keys.DONE: done, keys.TERMINATED: done}
        return self._observe({keys.REWARD: reward.unsqueeze(-1), **entries})

    def _observe(self, entries: dict[str, Tensor]) -> TensorDict:
        observation = torch.zeros(self.num_envs, self.pairs + self.values + 1, device=self.device)
        is_pair = (self._time < self.pairs).unsqueeze(1)
        is_query = (self._time == self.max_episode_steps - 1).unsqueeze(1)
        shown = self._order.gather(1, self._time.clamp_max(self.pairs - 1).unsqueeze(1))
        key = torch.where(is_query, self._asked.unsqueeze(1), shown)
        observation.scatter_(1, key, (is_pair | is_query).float())
        observation.scatter_(1, self.pairs + self._value_of.gather(1, shown), is_pair.float())
        observation[:, -1:] = is_query.float()
        return TensorDict(
            {keys.OBSERVATION: observation, keys.TRUNCATED: self._false.clone(), **entries},
            self.batch_size,
            device=self.device,
        )

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self._generator.manual_seed(seed)


class _Oracle(TensorDictModuleBase):
    """Keeps the pairs of each environment in a table; knows the observations alone."""

    def __init__(self, pairs: int, values: int) -> None:
        super().__init__()
        self.pairs, self.values = pairs, values
        self.in_keys, self.out_keys = [keys.OBSERVATION], [keys.ACTION]
        self._table: Tensor | None = None

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        observation = tensordict.get(keys.OBSERVATION)
        key, value = observation[..., : self.pairs], observation[..., self.pairs : -1]
        if self._table is None or self._table.shape[:-2] != key.shape[:-1]:
            self._table = observation.new_zeros(*key.shape, self.values)
        is_pair = (value.sum(-1) > 0)[..., None, None] & (key > 0).unsqueeze(-1)
        self._table = torch.where(is_pair, value.unsqueeze(-2), self._table)
        return tensordict.set(keys.ACTION, (self._table * key.unsqueeze(-1)).sum(-2).argmax(-1))


def _answer_zero(observation: Tensor) -> Tensor:
    return observation.new_zeros(observation.shape[:-1], dtype=torch.long)


def oracle_policy(env: AssocRecallEnv) -> TensorDictModuleBase:
    """The policy that keeps all pairs: it always succeeds."""
    return _Oracle(env.pairs, env.values)


def memoryless_policy(env: AssocRecallEnv) -> TensorDictModuleBase:
    """The best that can be done from the present observation alone: one fixed answer, right by chance, 1 / values."""
    del env
    return TensorDictModule(_answer_zero, in_keys=[keys.OBSERVATION], out_keys=[keys.ACTION])
