"""What all memory tasks share: time, seeds, resets of some environments, specs, counting of answers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from numbers import Integral
from typing import Any, ClassVar, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.data import Binary, Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from cyborg_torchrl import keys
from cyborg_torchrl.registry import did_you_mean

Latents = dict[str, Tensor]
"""What an episode is made of: named tensors [N, ...]."""


class Level(NamedTuple):
    """A difficulty."""

    horizon: int
    """Blank steps between the last cue and the first question."""
    size: int
    """The task's own measure of how much is to be remembered."""
    target: float
    """Success that counts as solved."""


class Judgement(NamedTuple):
    """What a step's action was worth. All [N]."""

    is_asked: Tensor
    """bool: the action was an answer."""
    is_right: Tensor
    """bool: and it was right."""
    is_over: Tensor
    """bool: the episode ends."""
    bonus: Tensor | None = None
    """float: reward beside that of answers."""


class Transition(NamedTuple):
    """What a step leads to."""

    observation: Tensor
    """[N, F] float."""
    success: Tensor
    """[N, 1] float."""
    reward: Tensor
    """[N, 1] float."""
    terminated: Tensor
    """[N, 1] bool."""


class MemoryTask(EnvBase):
    """Episodes on one device whose questions cannot be answered from what is seen when they are asked.

    A task draws what an episode is made of, shows a part of it at each step, and judges the action. Reward is +1 for a
    right answer and -1 for a wrong one (and the task's bonus, where it has one). "success", [N, 1] float32, is the
    share of right among the `num_answers` answers of the episode so far: at its end, the episode's.

    Args:
        num_envs: N, environments side by side.
        horizon: blank steps between the last cue and the first question.
        features: F, width of the observations, which lie in [0, 1].
        actions: number of actions.
        num_answers: answers that an episode asks for.
        max_episode_steps: steps of the longest episode.
        device: where it runs.
        seed: seed of the episodes; None draws one from torch's generator.
    """

    levels: ClassVar[dict[str, Level]]
    default: ClassVar[Level]

    def __init__(
        self,
        num_envs: int,
        horizon: int,
        *,
        features: int,
        actions: int,
        num_answers: int,
        max_episode_steps: int,
        device: torch.device | str | None,
        seed: int | None,
    ) -> None:
        if seed is not None:
            check_least(seed=(seed, 0))
        super().__init__(device=device, batch_size=[num_envs])
        self.num_envs, self.horizon, self.max_episode_steps = num_envs, horizon, max_episode_steps
        self.num_answers = num_answers
        flag, batch = (num_envs, 1), [num_envs]
        self.observation_spec = Composite(
            {
                keys.OBSERVATION: Bounded(0.0, 1.0, (num_envs, features), dtype=torch.float32, device=self.device),
                keys.SUCCESS: Bounded(0.0, 1.0, flag, dtype=torch.float32, device=self.device),
            },
            shape=batch,
        )
        self.action_spec = Categorical(actions, shape=batch, device=self.device)
        self.reward_spec = Unbounded(flag, device=self.device)
        ends = (keys.DONE, keys.TERMINATED, keys.TRUNCATED)
        self.done_spec = Composite(
            {key: Binary(1, flag, dtype=torch.bool, device=self.device) for key in ends}, shape=batch
        )
        self._time = torch.zeros(num_envs, dtype=torch.long, device=self.device)
        self._num_right = torch.zeros(num_envs, device=self.device)
        self._latents: Latents = {}
        self._generator = torch.Generator(device=self.device)
        self.set_seed(int(torch.randint(2**31, ())) if seed is None else seed)

    @abstractmethod
    def _draw(self) -> Latents:
        """What N new episodes are made of."""

    @abstractmethod
    def _show(self, time: Tensor, latents: Latents) -> Tensor:
        """Observations [N, F] at the steps `time` [N]."""

    @abstractmethod
    def _judge(self, action: Tensor, time: Tensor, latents: Latents) -> Judgement:
        """Judges the actions [N] taken at the steps `time` [N]; may change the latents in place of their entries."""

    @abstractmethod
    def oracle(self) -> ReferencePolicy:
        """The policy that remembers what matters: it always succeeds."""

    @abstractmethod
    def memoryless(self) -> ReferencePolicy:
        """The best that can be done from the present observation alone: it succeeds by chance."""

    @classmethod
    def choose(cls, level: str | None, horizon: int | None, size: int | None = None) -> tuple[int, int]:
        """The horizon and the size of a level, or what is given in their place.

        Args:
            level: easy, medium, hard or extreme; None: the task's default.
            horizon: None: the level's.
            size: the task's own measure; None: the level's.

        Raises:
            ValueError: if there is no such level.
        """
        if level is not None and level not in cls.levels:
            raise ValueError(f"unknown level '{level}': {did_you_mean(level, cls.levels)}")
        chosen = cls.default if level is None else cls.levels[level]
        return chosen.horizon if horizon is None else horizon, chosen.size if size is None else size

    def randint(self, high: int, *shape: int) -> Tensor:
        """Integers in [0, high), [N, *shape]."""
        size = (self.batch_size[0], *shape)
        return torch.randint(high, size, generator=self._generator, device=self.device)

    def permutations(self, size: int, count: int | None = None) -> Tensor:
        """A permutation of [0, size) for each environment; the first `count` of it, [N, count]."""
        shape = (self.batch_size[0], size)
        return torch.rand(shape, generator=self._generator, device=self.device).argsort(-1)[:, :count]

    def advance(self, action: Tensor) -> Transition:
        """Takes a step in every environment, on tensors alone: what `step` does, and all that `FusedCollector` needs.

        Args:
            action: [N].
        """
        is_asked, is_right, is_over, bonus = self._judge(action, self._time, self._latents)
        reward = is_right.float() * 2.0 - is_asked.float()
        # not by setattr, which takes longer for an environment than the sums themselves
        self.__dict__.update(_time=self._time + 1, _num_right=self._num_right + is_right)
        reward = (reward if bonus is None else reward + bonus).unsqueeze(-1)
        return Transition(*self._observed(), reward, is_over.unsqueeze(-1))

    def restart(self, is_reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Begins episodes, on tensors alone.

        Args:
            is_reset: [N] bool, in which environments; None: in all.

        Returns:
            The observations [N, F] and successes [N, 1] of all.
        """
        fresh = self._draw()
        if is_reset is None or not self._latents:
            self._latents = fresh
            self._time, self._num_right = torch.zeros_like(self._time), torch.zeros_like(self._num_right)
        else:
            self._latents = {name: _where(is_reset, fresh[name], value) for name, value in self._latents.items()}
            self._time = self._time.masked_fill(is_reset, 0)
            self._num_right = self._num_right.masked_fill(is_reset, 0.0)
        return self._observed()

    def get_state(self) -> dict[str, Any]:
        """What the environments are in the middle of (see `envs.state`)."""
        return {
            "time": self._time.clone(),
            "num_right": self._num_right.clone(),
            "latents": {name: value.clone() for name, value in self._latents.items()},
            "generator": self._generator.get_state(),
        }

    def set_state(self, state: Mapping[str, Any]) -> Tensor:
        """Goes back there. Returns which environments could not, [N] bool: none.

        Raises:
            ValueError: if the state is that of another number of environments.
        """
        if state["time"].shape != self._time.shape:
            raise ValueError(f"the state is that of {len(state['time'])} environments; here are {self.num_envs}.")
        self._time, self._num_right = state["time"].to(self.device), state["num_right"].to(self.device)
        self._latents = {name: value.to(self.device) for name, value in state["latents"].items()}
        self._generator.set_state(state["generator"])
        return torch.zeros(self.num_envs, dtype=torch.bool)

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDict:
        is_reset = None if tensordict is None else tensordict.get("_reset", None)
        observation, success = self.restart(None if is_reset is None else is_reset.reshape(self.num_envs))
        return self._entries(observation, success, torch.zeros(self.num_envs, 1, dtype=torch.bool, device=self.device))

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        observation, success, reward, terminated = self.advance(tensordict.get(keys.ACTION))
        return self._entries(observation, success, terminated).set(keys.REWARD, reward)

    def _observed(self) -> tuple[Tensor, Tensor]:
        return self._show(self._time, self._latents), (self._num_right / self.num_answers).unsqueeze(-1)

    def _entries(self, observation: Tensor, success: Tensor, done: Tensor) -> TensorDict:
        entries = {
            keys.OBSERVATION: observation,
            keys.SUCCESS: success,
            keys.DONE: done,
            keys.TERMINATED: done.clone(),  # whoever writes into one must not write into the other
            keys.TRUNCATED: torch.zeros_like(done),
        }
        return TensorDict(entries, self.batch_size, device=self.device)

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self._generator.manual_seed(seed)


class ReferencePolicy(TensorDictModuleBase):
    """A policy that knows the rules and reads the observations alone."""

    def __init__(self) -> None:
        super().__init__()
        self.in_keys, self.out_keys = [keys.OBSERVATION], [keys.ACTION]

    @abstractmethod
    def act(self, observation: Tensor) -> Tensor:
        """From observations [N, F], seen one after another, to actions [N]."""

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes the action, which is the tensordict's own: what is remembered cannot be written into."""
        return tensordict.set(keys.ACTION, self.act(tensordict.get(keys.OBSERVATION)).clone())


class ConstantAnswer(ReferencePolicy):
    """Always the same answer."""

    def act(self, observation: Tensor) -> Tensor:
        """Zero."""
        return torch.zeros(observation.shape[:-1], dtype=torch.long, device=observation.device)


def oracle_policy(env: MemoryTask) -> ReferencePolicy:
    """The policy that remembers what matters: it always succeeds."""
    return env.oracle()


def memoryless_policy(env: MemoryTask) -> ReferencePolicy:
    """The best that can be done from the present observation alone: it succeeds by chance."""
    return env.memoryless()


def one_hot(index: Tensor, size: int, is_shown: Tensor | None = None) -> Tensor:
    """One-hot [*B, size] float of integers [*B]; all zero where not shown."""
    # clamped: what is not shown may be any number
    result = torch.nn.functional.one_hot(index.clamp(0, size - 1), size).float()
    return result if is_shown is None else result * is_shown.unsqueeze(-1)


def at(sequence: Tensor, index: Tensor) -> Tensor:
    """The entry of each row [N, L] at its own index [N], which is clamped into the row."""
    return sequence.gather(1, index.clamp(0, sequence.shape[1] - 1).unsqueeze(1)).squeeze(1)


def check_least(**values: tuple[int, int]) -> None:
    """Refuses numbers, given as (value, least), that are no integers or too small.

    Raises:
        ValueError: with the name of the first.
    """
    for name, (value, least) in values.items():
        if not isinstance(value, Integral):
            raise ValueError(f"{name} must be an integer; got {value!r}.")
        if value < least:
            raise ValueError(f"{name} must be >= {least}; got {value}.")


def _where(is_reset: Tensor, fresh: Tensor, value: Tensor) -> Tensor:
    return torch.where(is_reset.reshape(-1, *[1] * (value.ndim - 1)), fresh, value)
