"""The base of all memory tasks: time, seeds, partial resets, specs, counting of answers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
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
"""The content of N episodes: named tensors [N, ...]."""
Memory = dict[str, Tensor]
"""What a reference policy remembers: named tensors [N, ...]."""


class Level(NamedTuple):
    """A level of difficulty."""

    horizon: int
    """Blank steps between the last cue and the first question."""
    size: int
    """How much has to be remembered, in the task's measure."""
    target: float
    """Success that counts as solved."""


class Sizes(NamedTuple):
    """Sizes of a task."""

    features: int
    """F, width of the observations."""
    actions: int
    """Number of actions."""
    answers: int
    """Answers in an episode."""
    steps: int
    """Steps of the longest episode."""


class Judgement(NamedTuple):
    """Result of a step's action; all tensors are [N]."""

    is_answer: Tensor
    """bool: the action was an answer."""
    is_right: Tensor
    """bool: it was a right answer."""
    is_over: Tensor
    """bool: the episode ends."""
    bonus: Tensor | None = None
    """float: reward added to that of answers."""


class Transition(NamedTuple):
    """Result of a step."""

    observation: Tensor
    """[N, F] float."""
    success: Tensor
    """[N, 1] float."""
    reward: Tensor
    """[N, 1] float."""
    terminated: Tensor
    """[N, 1] bool."""


class MemoryTask(EnvBase):
    """A batch of episodes on one device, whose questions only memory can answer.

    A task draws the content of an episode, shows a part of it at each step, and judges the action. The reward is +1 for
    a right answer and -1 for a wrong one, plus the task's bonus. "success", [N, 1] float32, is the number of right
    answers so far, divided by all answers of the episode. At the last step it is the success of the episode.

    A subclass declares its levels, the name of the option that `Level.size` sets (`measure`), and the smallest value of
    each option (`least`). It implements the five abstract methods below. Its `__init__` has the task's own options, and
    `**shared` for those of this class. All that changes within an episode is in the latents: a CUDA graph may replay a
    step, without running Python. `has_fixed_length` tells that each episode lasts `max_episode_steps`.

    Args:
        num_envs: N, number of environments.
        options: integer options of the task, which become attributes; None for the measure: the level's size.
        horizon: blank steps between the last cue and the first question; None: the level's.
        level: easy, medium, hard or extreme; None: the task's default.
        device: device of all tensors.
        seed: seed of the episodes; None draws one from torch's generator.

    Raises:
        ValueError: if a number is too small or not an integer, or the level is unknown.
    """

    horizon: int
    levels: ClassVar[dict[str, Level]]
    default: ClassVar[Level]
    measure: ClassVar[str | None] = None
    least: ClassVar[dict[str, int]]
    has_fixed_length: ClassVar[bool] = False

    def __init__(
        self,
        num_envs: int,
        options: Mapping[str, int | None],
        /,
        *,
        horizon: int | None = None,
        level: str | None = None,
        device: torch.device | str | None = None,
        seed: int | None = None,
    ) -> None:
        if level is not None and level not in self.levels:
            raise ValueError(f"unknown level '{level}': {did_you_mean(level, self.levels)}")
        chosen = self.default if level is None else self.levels[level]
        options = {**options, "horizon": chosen.horizon if horizon is None else horizon}
        if self.measure is not None and options[self.measure] is None:
            options[self.measure] = chosen.size
        check_least("num_envs", num_envs, 1)
        for name, least in self.least.items():
            check_least(name, options[name], least)
        if seed is not None:
            check_least("seed", seed, 0)
        super().__init__(device=device, batch_size=[num_envs])
        self.num_envs = num_envs
        for name, value in options.items():
            setattr(self, name, value)
        self._make_specs(self.sizes())
        self._time = torch.zeros(num_envs, dtype=torch.long, device=self.device)
        self._num_right = torch.zeros(num_envs, device=self.device)
        self._latents: Latents = {}
        self._generator = torch.Generator(device=self.device)
        self.set_seed(int(torch.randint(2**31, ())) if seed is None else seed)

    def _make_specs(self, sizes: Sizes) -> None:
        self.num_answers, self.max_episode_steps = sizes.answers, sizes.steps
        flag, batch = (self.num_envs, 1), [self.num_envs]
        shape = (self.num_envs, sizes.features)
        self.observation_spec = Composite(
            {
                keys.OBSERVATION: Bounded(0.0, 1.0, shape, dtype=torch.float32, device=self.device),
                keys.SUCCESS: Bounded(0.0, 1.0, flag, dtype=torch.float32, device=self.device),
            },
            shape=batch,
        )
        self.action_spec = Categorical(sizes.actions, shape=batch, device=self.device)
        self.reward_spec = Unbounded(flag, device=self.device)
        ends = (keys.DONE, keys.TERMINATED, keys.TRUNCATED)
        self.done_spec = Composite(
            {key: Binary(1, flag, dtype=torch.bool, device=self.device) for key in ends}, shape=batch
        )

    @abstractmethod
    def sizes(self) -> Sizes:
        """Return the sizes that follow from the options."""

    @abstractmethod
    def _draw(self) -> Latents:
        """Draw the content of N new episodes."""

    @abstractmethod
    def _show(self, time: Tensor, latents: Latents) -> Tensor:
        """Return the observations [N, F] at the steps `time` [N]."""

    @abstractmethod
    def _judge(self, action: Tensor, time: Tensor, latents: Latents) -> Judgement:
        """Judge the actions [N] taken at the steps `time` [N]; may replace entries of the latents."""

    @abstractmethod
    def _oracle(self, observation: Tensor, memory: Memory) -> Tensor:
        """Return the right actions [N], from the observations [N, F] and a memory of earlier ones, which is updated."""

    def _memoryless(self, observation: Tensor, memory: Memory) -> Tensor:
        """Return the best actions [N] without memory: by default one fixed answer."""
        return torch.zeros(observation.shape[:-1], dtype=torch.long, device=observation.device)

    def randint(self, high: int, *shape: int) -> Tensor:
        """Draw integers in [0, high), [N, *shape]."""
        size = (self.batch_size[0], *shape)
        return torch.randint(high, size, generator=self._generator, device=self.device)

    def permutations(self, size: int, count: int | None = None) -> Tensor:
        """Draw a permutation of [0, size) for each environment, and return the first `count` of it, [N, count]."""
        shape = (self.batch_size[0], size)
        return torch.rand(shape, generator=self._generator, device=self.device).argsort(-1)[:, :count]

    def advance(self, action: Tensor) -> Transition:
        """Take a step in every environment, on tensors: the fused collectors call this instead of `step`.

        Args:
            action: [N].
        """
        is_answer, is_right, is_over, bonus = self._judge(action, self._time, self._latents)
        reward = is_right.float() * 2.0 - is_answer.float()
        # Setting an attribute of an EnvBase takes longer than the two sums, so write to its dict.
        self.__dict__.update(_time=self._time + 1, _num_right=self._num_right + is_right)
        reward = (reward if bonus is None else reward + bonus).unsqueeze(-1)
        return Transition(*self._observed(), reward, is_over.unsqueeze(-1))

    def restart(self, is_reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Begin episodes, on tensors.

        Args:
            is_reset: [N] bool, the environments in which an episode begins; None: all.

        Returns:
            Observations [N, F] and successes [N, 1] of all environments.
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

    def steps_left(self) -> int | None:
        """Return the number of steps after which all episodes end together; None if they may end at other times."""
        if not self.has_fixed_length or bool((self._time != self._time[0]).any()):
            return None
        return self.max_episode_steps - int(self._time[0])

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that a step reads and replaces."""
        return {"_time": self._time, "_num_right": self._num_right, **self._latents}

    def set_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the tensors of `tensors`."""
        self._latents = dict(tensors)
        self._time, self._num_right = self._latents.pop("_time"), self._latents.pop("_num_right")

    def get_state(self) -> dict[str, Any]:
        """Return the state of the environments between two steps (see `envs.state`)."""
        return {
            "time": self._time.clone(),
            "num_right": self._num_right.clone(),
            "latents": {name: value.clone() for name, value in self._latents.items()},
            "generator": self._generator.get_state(),
        }

    def set_state(self, state: Mapping[str, Any]) -> Tensor:
        """Restore a state of `get_state`. Return the environments that failed, [N] bool: none.

        Raises:
            ValueError: if the state has another number of environments.
        """
        if state["time"].shape != self._time.shape:
            raise ValueError(f"the state is for {len(state['time'])} environments; this one has {self.num_envs}.")
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
        return self._show(self._time, self._latents), self._succeeded().unsqueeze(-1)

    def _succeeded(self) -> Tensor:
        """Return the success so far, [N] float."""
        return self._num_right / self.num_answers

    def _entries(self, observation: Tensor, success: Tensor, done: Tensor) -> TensorDict:
        entries = {
            keys.OBSERVATION: observation,
            keys.SUCCESS: success,
            keys.DONE: done,
            keys.TERMINATED: done.clone(),  # two tensors: a write into one must not change the other
            keys.TRUNCATED: torch.zeros_like(done),
        }
        return TensorDict(entries, self.batch_size, device=self.device)

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self._generator.manual_seed(seed)


class QuestionTask(MemoryTask):
    """A memory task whose last steps are questions, each with one right answer.

    A subclass implements `_answer` instead of `_judge`.
    """

    has_fixed_length = True

    @property
    def first_question(self) -> int:
        """The step of the first question."""
        return self.max_episode_steps - self.num_answers

    @abstractmethod
    def _answer(self, time: Tensor, latents: Latents) -> Tensor:
        """Return the right actions [N] at the steps `time` [N]; the result before the first question is ignored."""

    def _judge(self, action: Tensor, time: Tensor, latents: Latents) -> Judgement:
        is_question = time >= self.first_question
        is_right = is_question & (action == self._answer(time, latents))
        return Judgement(is_question, is_right, time == self.max_episode_steps - 1)


class ReferencePolicy(TensorDictModuleBase):
    """A policy that knows the rules and reads only the observations.

    Args:
        act: returns the actions [N] for the observations [N, F]; its memory is a dictionary that it may change.
    """

    def __init__(self, act: Callable[[Tensor, Memory], Tensor]) -> None:
        super().__init__()
        self.in_keys, self.out_keys = [keys.OBSERVATION], [keys.ACTION]
        self._act = act
        self._memory: Memory = {}

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the action. It is a copy, so that nothing can write into the policy's memory."""
        action = self._act(tensordict.get(keys.OBSERVATION), self._memory)
        return tensordict.set(keys.ACTION, action.clone())


def four_levels(*levels: tuple[int, int, float]) -> dict[str, Level]:
    """Return the levels from easy to extreme; each is given as (horizon, size, target)."""
    names = ("easy", "medium", "hard", "extreme")
    return {name: Level(*level) for name, level in zip(names, levels, strict=True)}


def oracle_policy(env: MemoryTask) -> ReferencePolicy:
    """Return the policy that remembers everything it needs: it always succeeds."""
    return ReferencePolicy(env._oracle)


def memoryless_policy(env: MemoryTask) -> ReferencePolicy:
    """Return the best policy without memory: it succeeds by chance."""
    return ReferencePolicy(env._memoryless)


def recall(memory: Memory, name: str, initial: Tensor) -> Tensor:
    """Return a tensor of the memory; `initial` if there is none of that shape yet."""
    value = memory.get(name)
    return initial if value is None or value.shape != initial.shape else value


def recall_value(observation: Tensor, memory: Memory, num_keys: int, num_values: int) -> Tensor:
    """Return the value that was last shown with the key in the observation, [N], and remember the present pair.

    Args:
        observation: [N, F]: the key and its value, each as one-hot; a key without a value is a question.
        memory: the memory of the policy.
        num_keys: width of the keys, the first entries of an observation.
        num_values: width of the values, the next entries.
    """
    key, value = observation[..., :num_keys], observation[..., num_keys : num_keys + num_values]
    table = recall(memory, "table", observation.new_zeros(*key.shape, num_values))
    is_pair = (value.sum(-1) > 0)[..., None, None] & (key > 0).unsqueeze(-1)
    table = memory["table"] = torch.where(is_pair, value.unsqueeze(-2), table)
    return (table * key.unsqueeze(-1)).sum(-2).argmax(-1)


def one_hot(index: Tensor, size: int, is_shown: Tensor | None = None) -> Tensor:
    """Return one-hot vectors [*B, size] float of integers [*B]; all zero where `is_shown` is false."""
    # An integer that is not shown may be out of range.
    result = torch.nn.functional.one_hot(index.clamp(0, size - 1), size).float()
    return result if is_shown is None else result * is_shown.unsqueeze(-1)


def at(sequence: Tensor, index: Tensor) -> Tensor:
    """Return one entry of each row of [N, L], at an index [N] that is clamped into the row."""
    return sequence.gather(1, index.clamp(0, sequence.shape[1] - 1).unsqueeze(1)).squeeze(1)


def check_least(name: str, value: object, least: int) -> None:
    """Check that an option is an integer and large enough.

    Raises:
        ValueError: if it is not.
    """
    if not isinstance(value, Integral):
        raise ValueError(f"{name} must be an integer; got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be >= {least}; got {value}.")


def _where(is_reset: Tensor, fresh: Tensor, value: Tensor) -> Tensor:
    return torch.where(is_reset.reshape(-1, *[1] * (value.ndim - 1)), fresh, value)
