"""The base of POPGym's environments as batches of tensors: clocks, resets, seeds, states, specs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor
from torchrl.data import Binary, Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase

from cyborg_torchrl import keys
from cyborg_torchrl.envs.memory.task import check_least
from cyborg_torchrl.registry import did_you_mean

Entries = dict[str, Tensor]
"""Named tensors, with one row for each episode."""
ENDS = (keys.DONE, keys.TERMINATED, keys.TRUNCATED)


class Spaces(NamedTuple):
    """Specs of one environment, and its longest episode."""

    observation: TensorSpec
    """Spec of the observation; a Composite has one entry for each part."""
    action: TensorSpec
    steps: int
    """Steps after which an episode ends."""


class Outcome(NamedTuple):
    """Result of a step's action."""

    reward: Tensor
    """[N, 1] float."""
    is_over: Tensor | None
    """[N, 1] bool, the episodes that terminate before the last step; None: none ever does."""


@dataclass
class Run:
    """The present episodes. A plain object, since setting an attribute of an EnvBase is slow."""

    deadline: Tensor
    """[N, 1] integer: the clock at which each episode reaches its last step."""
    clock: int = 0
    """Steps since all environments began an episode together."""
    next_end: int = 0
    """No deadline is earlier than this clock, so the deadlines are not read before."""
    entries: Entries = field(default_factory=dict)
    """The episodes; empty before the first reset."""
    stock: Entries = field(default_factory=dict)
    """Episodes that were drawn in advance."""
    used: int = 0
    """Episodes of the stock that have begun already."""


class PopgymEnv(EnvBase):
    """A batch of POPGym environments on one device, with the rules of popgym 1.0.7.

    Observations, rewards and ends are those of the package, step by step, if both get the same deck, board or noise.
    The same seed draws other episodes than the package does. "success" is NaN, since POPGym does not define it.

    A subclass declares its levels, and implements the abstract methods. Its entry "observation" is what agents see.

    Args:
        num_envs: N, number of environments.
        level: Easy, Medium or Hard.
        fixed: mend the faults of popgym that the family's docstring lists; no effect where it lists none.
        device: device of all tensors.
        seed: seed of the episodes; None draws one from torch's generator.

    Raises:
        ValueError: if a number is too small or not an integer, or the level is unknown.

    Source: Morad et al. (2023), POPGym: Benchmarking Partially Observable Reinforcement Learning.
    """

    levels: ClassVar[dict[str, dict[str, Any]]]
    """Values of the attributes that make the level."""
    is_prediction: ClassVar[bool] = False
    """Whether an action is an answer that changes nothing that follows."""
    is_terminal: ClassVar[bool] = False
    """Whether the last possible step terminates the episode; otherwise it is truncated."""
    rounds: ClassVar[int] = 1
    """Episodes that are drawn at once, for each environment."""

    def __init__(
        self,
        num_envs: int = 64,
        *,
        level: str = "Easy",
        fixed: bool = False,
        device: torch.device | str | None = None,
        seed: int | None = None,
    ) -> None:
        check_least("num_envs", num_envs, 1)
        if level not in self.levels:
            raise ValueError(f"unknown level '{level}': {did_you_mean(level, self.levels)}")
        if seed is not None:
            check_least("seed", seed, 0)
        super().__init__(device=device, batch_size=[num_envs])
        self.num_envs, self.level, self.fixed = num_envs, level, fixed
        for name, value in self.levels[level].items():
            setattr(self, name, value)
        self._make_specs(self.spaces())
        self._never = torch.zeros(num_envs, 1, dtype=torch.bool, device=self.device)
        self._success = torch.full((num_envs, 1), torch.nan, device=self.device)
        self._run = Run(torch.zeros(num_envs, 1, dtype=torch.long, device=self.device))
        self._generator = torch.Generator(device=self.device)
        # Numbers that are drawn in steps, so that the reset of one environment does not change the noise of others.
        self._step_generator = torch.Generator(device=self.device)
        self._prepare_tables()
        self.set_seed(int(torch.randint(2**31, ())) if seed is None else seed)

    def _make_specs(self, spaces: Spaces) -> None:
        self.max_episode_steps = self._num_steps = spaces.steps
        batch, flag = self.batch_size, (self.num_envs, 1)
        observation = Composite({keys.OBSERVATION: spaces.observation.to(self.device)}, device=self.device)
        self.observation_spec = observation.expand(*batch, *observation.shape)
        leaves = [unravel_key(key) for key in self.observation_spec.keys(True, True)]
        self._seen = {key: key if isinstance(key, str) else ".".join(key) for key in leaves}
        self.observation_spec[keys.SUCCESS] = Unbounded(flag, device=self.device)
        self.action_spec = spaces.action.to(self.device).expand(*batch, *spaces.action.shape)
        self.reward_spec = Unbounded(flag, device=self.device)
        self.done_spec = Composite(
            {key: Binary(1, flag, dtype=torch.bool, device=self.device) for key in ENDS}, shape=batch
        )

    @abstractmethod
    def spaces(self) -> Spaces:
        """Return the specs and the length that follow from the level."""

    def _prepare_tables(self) -> None:
        """Prepare the tensors that are the same in all episodes."""

    @abstractmethod
    def _draw(self, count: int) -> Entries:
        """Draw the random part of new episodes, [count, ...]."""

    @abstractmethod
    def _prepare(self, drawn: Entries) -> Entries:
        """Return the entries at the first step of episodes, [count, ...], from their random part."""

    @abstractmethod
    def _play(self, action: Tensor, entries: Entries) -> Outcome:
        """Take a step with the actions [N, ...], and replace the entries that change."""

    def advance(self, action: Tensor) -> dict[NestedKey, Tensor]:
        """Take a step in every environment, on tensors: the fused collectors call this instead of `step`.

        Args:
            action: [N, ...].

        Returns:
            The observations, "success", "reward" and the three flags of an end, [N, ...].
        """
        run = self._run
        run.clock += 1
        reward, is_over = self._play(action, run.entries)
        is_last = self._never if run.clock < run.next_end else self._is_last()
        terminated, truncated, done = self._ends(is_over, is_last)
        result = self._observed()
        result[keys.REWARD] = reward
        result[keys.TERMINATED], result[keys.TRUNCATED], result[keys.DONE] = terminated, truncated, done
        return result

    def _is_last(self) -> Tensor:
        """Return the episodes at their last step, [N, 1] bool, and find out when to look again."""
        run = self._run
        run.next_end = max(run.clock + 1, int(run.deadline.min()))
        return run.deadline == run.clock

    def _ends(self, is_over: Tensor | None, is_last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return which episodes are terminated, truncated, and either of them, [N, 1] bool.

        Args:
            is_over: the episodes that terminate by themselves; None: none.
            is_last: the episodes at their last step.
        """
        if self.is_terminal:
            return is_last, self._never, is_last
        if is_over is None:
            return self._never, is_last, is_last
        return is_over, is_last, is_over if is_last is self._never else is_over | is_last

    def restart(self, is_reset: Tensor | None = None) -> dict[NestedKey, Tensor]:
        """Begin episodes, on tensors.

        Args:
            is_reset: the environments in which an episode begins, [N] bool; None: all.

        Returns:
            The observations and "success" of all environments.
        """
        run = self._run
        index = None if is_reset is None else is_reset.nonzero().view(-1)
        if index is None or not run.entries or len(index) == self.num_envs:
            index, run.clock, run.next_end = None, 0, self._num_steps
            run.deadline.fill_(self._num_steps)
        else:
            run.deadline.index_fill_(0, index, run.clock + self._num_steps)
        self._begin(index, self._take(self.num_envs if index is None else len(index)))
        return self._observed()

    def _take(self, count: int) -> Entries:
        """Return the next episodes of the stock, [count, ...]; draw a new stock if too few are left."""
        run = self._run
        if not run.stock or run.used + count > self.rounds * self.num_envs:
            run.stock, run.used = self._prepare(self._draw(self.rounds * self.num_envs)), 0
        begin, run.used = run.used, run.used + count
        return {name: value[begin : run.used] for name, value in run.stock.items()}

    def _begin(self, index: Tensor | None, fresh: Entries) -> None:
        """Write fresh episodes [count, ...] into the environments of an index [count]; None: all environments."""
        entries = self._run.entries
        for name, value in fresh.items():
            entries[name] = value if index is None else entries[name].index_copy(0, index, value)

    def _observed(self) -> dict[NestedKey, Tensor]:
        """Return the present observations and "success"."""
        entries = self._run.entries
        result: dict[NestedKey, Tensor] = {key: entries[name] for key, name in self._seen.items()}
        result[keys.SUCCESS] = self._success
        return result

    def get_state(self) -> dict[str, Any]:
        """Return the state of the environments between two steps (see `envs.state`)."""
        run = self._run
        return {
            "clock": run.clock,
            "deadline": run.deadline.clone(),
            "next_end": run.next_end,
            "entries": {name: value.clone() for name, value in run.entries.items()},
            "stock": {name: value.clone() for name, value in run.stock.items()},
            "used": run.used,
            "generator": self._generator.get_state(),
            "step_generator": self._step_generator.get_state(),
        }

    def set_state(self, state: Mapping[str, Any]) -> Tensor:
        """Restore a state of `get_state`. Return the environments that failed, [N] bool: none.

        Raises:
            ValueError: if the state has another number of environments.
        """
        if state["deadline"].shape != self._run.deadline.shape:
            raise ValueError(f"the state is for {len(state['deadline'])} environments; this one has {self.num_envs}.")
        self._run = Run(
            # Copies, since steps write into some of these tensors.
            deadline=state["deadline"].to(self.device).clone(),
            clock=state["clock"],
            next_end=state["next_end"],
            entries={name: value.to(self.device).clone() for name, value in state["entries"].items()},
            stock={name: value.to(self.device).clone() for name, value in state["stock"].items()},
            used=state["used"],
        )
        self._generator.set_state(state["generator"])
        self._step_generator.set_state(state["step_generator"])
        return torch.zeros(self.num_envs, dtype=torch.bool)

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDict:
        is_reset = None if tensordict is None else tensordict.get("_reset", None)
        entries = self.restart(None if is_reset is None else is_reset.reshape(-1))
        entries |= {key: torch.zeros_like(self._never) for key in ENDS}
        return TensorDict(entries, self.batch_size, device=self.device)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        entries = self.advance(tensordict.get(keys.ACTION))
        # Separate tensors: a write into one must not change another, nor a tensor of this class.
        entries |= {key: entries[key].clone() for key in (*ENDS, keys.SUCCESS, keys.REWARD)}
        return TensorDict(entries, self.batch_size, device=self.device)

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self._generator.manual_seed(seed)
            self._step_generator.manual_seed(seed + 2**32)
            self._run.stock = {}

    def _constant(self, *values: float) -> Tensor:
        """Return numbers as a float tensor on the device: [count], or [] for one number."""
        numbers = torch.tensor(values, dtype=torch.float32, device=self.device)
        return numbers if len(values) > 1 else numbers.squeeze(0)

    def _first(self, size: int) -> Tensor:
        """Return the flat index of each environment's first number, [N], in a tensor [N, size]."""
        return torch.arange(0, self.num_envs * size, size, device=self.device)

    def _permutations(self, count: int, size: int) -> Tensor:
        """Draw permutations of [0, size), [count, size]."""
        # Integers are sorted faster than floats, and 31 random bits are enough to make ties rare.
        draw = torch.randint(2**31 - 1, (count, size), dtype=torch.int32, generator=self._generator, device=self.device)
        return draw.argsort(-1)

    def _random(self, draw: Callable[..., Tensor], *shape: int) -> Tensor:
        """Draw random numbers in a step, [N, *shape].

        Args:
            draw: `torch.rand` or `torch.randn`.
            shape: sizes of one environment's numbers.
        """
        return draw(self.num_envs, *shape, generator=self._step_generator, device=self.device)
