"""A policy of any library under test, given as plain functions over arrays."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor

from cyborg_torchrl import keys
from cyborg_torchrl.checks.nested import Tree, as_tensor, leaves_of, replace_leaves
from cyborg_torchrl.checks.policy_under_test import Acted, Pass, PolicyUnderTest, States

IS_FIRST, OUTPUTS, SCALE = "is_first", "outputs", "scale"


@runtime_checkable
class MemoryPolicy(Protocol):
    """Four plain functions that describe a recurrent policy of any library, in numpy or torch.

    Observations, states and outputs are arrays, or nested dicts, lists and tuples of arrays. B is a batch of
    environments and T a number of steps. Observations and outputs are batch first. The batch may be any dimension of
    a state, since it is found by comparing two batch sizes.

    Outputs are the numbers that describe the action distribution, such as logits, and the value estimate if there is
    one. Do not sample.

    Three more functions are optional:

    - `log_prob(outputs, actions)` returns the log-probs of recorded actions;
    - `value(outputs)` returns the value estimate;
    - `train(mode)` switches between training (True) and evaluation (False), as for a `torch.nn.Module`.
    """

    def initial_state(self, batch: int) -> Tree:
        """Return the memory state at the start of an episode, for `batch` environments."""
        ...

    def step(self, observation: Tree, state: Tree, is_first: Any) -> tuple[Tree, Tree]:
        """Act as in a rollout. Return the outputs [B, ...] and the next state.

        Args:
            observation: [B, ...].
            state: the state before the step. It comes from the last step, whether or not an episode ended.
            is_first: true where this step begins an episode, [B] bool.
        """
        ...

    def sequence(self, observations: Tree, state: Tree, is_first: Any) -> Tree:
        """Run as in the update. Return the outputs [B, T, ...], in the form that `step` returns them.

        Args:
            observations: [B, T, ...].
            state: the state before the first step.
            is_first: true where a step begins an episode, [B, T] bool.
        """
        ...

    def parameters(self) -> Iterable[Tensor]:
        """Return the trained tensors; none for a policy in numpy."""
        ...


class DiscreteActorCritic:
    """Base of a `MemoryPolicy` whose outputs are a pair: logits [..., A] of one discrete action, and values [...].

    A subclass adds `initial_state`, `step` and `sequence`.

    Args:
        model: the module whose parameters are trained; `torch.nn.ModuleList` if there are several.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def log_prob(self, outputs: tuple[Tensor, Tensor], actions: Tensor) -> Tensor:
        """Return log-probs of actions."""
        return torch.distributions.Categorical(logits=outputs[0]).log_prob(actions)

    def value(self, outputs: tuple[Tensor, Tensor]) -> Tensor:
        """Return the value estimates."""
        return outputs[1]

    def parameters(self) -> Iterable[Tensor]:
        """Return the module's parameters."""
        return self.model.parameters()


class FunctionPolicy(PolicyUnderTest):
    """A `MemoryPolicy` with the keys that the checks need.

    Raises:
        ValueError: if the policy has no state, or a state without a batch dimension.
    """

    is_init_key = IS_FIRST
    recorded_keys = (keys.ACTION, keys.ACTION_LOG_PROB, OUTPUTS, SCALE)

    def __init__(self, policy: MemoryPolicy, observation: Tree) -> None:
        self.policy = policy
        self.name = type(policy).__name__
        self.observation = observation
        self.state = policy.initial_state(2)
        sizes = [[as_tensor(leaf).shape for leaf in leaves_of(policy.initial_state(batch))] for batch in (2, 3)]
        if not sizes[0]:
            raise ValueError(f"initial_state of {self.name} holds no array. There is no memory to check.")
        self.batch_dims = [_batch_dim(index, *pair) for index, pair in enumerate(zip(*sizes, strict=True))]
        self.is_numpy = any(isinstance(leaf, np.ndarray) for leaf in leaves_of(self.state))
        self.has_gradient = not self.is_numpy
        self.state_keys = [f"state_{index}" for index in range(len(sizes[0]))]
        self.input_keys = [f"observation_{index}" for index in range(len(leaves_of(observation)))]

    def parameters(self) -> list[Tensor]:
        """Return the parameters that require gradients."""
        return [parameter for parameter in self.policy.parameters() if parameter.requires_grad]

    def initial_states(self, batch: int) -> States:
        """Return the initial states as tensors, batch first."""
        return self.states_from(self.policy.initial_state(batch))

    def states_from(self, state: Tree) -> States:
        """Return a state of the library as tensors by key, batch first."""
        tensors = [as_tensor(leaf) for leaf in leaves_of(state)]
        if len(tensors) != len(self.state_keys):
            raise ValueError(
                f"a state has {len(self.state_keys)} arrays in initial_state and {len(tensors)} elsewhere."
            )
        moved = [tensor.movedim(dim, 0) for tensor, dim in zip(tensors, self.batch_dims, strict=True)]
        return dict(zip(self.state_keys, moved, strict=True))

    def inputs_from(self, observation: Tree) -> dict[str, Tensor]:
        """Return an observation of the library as tensors by key."""
        return dict(zip(self.input_keys, map(as_tensor, leaves_of(observation)), strict=True))

    def act(self, work: TensorDictBase) -> Acted:
        """Run one step of a batch [B]."""
        outputs, state = self.policy.step(*self._arguments(work, work))
        return Acted(self.flat(outputs, work.shape), outputs, self.states_from(state))

    def value(self, work: TensorDictBase) -> Tensor | None:
        """Return the policy's value estimates, [B]; None if it has no `value` function."""
        if not hasattr(self.policy, "value"):
            return None
        return as_tensor(self.policy.value(self.policy.step(*self._arguments(work, work))[0])).reshape(work.shape)

    def run_sequence(self, steps: TensorDictBase) -> Pass:
        """Run the policy's sequence function over steps [B, T]."""
        outputs = self.policy.sequence(*self._arguments(steps, steps[:, 0]))
        return Pass(self.flat(outputs, steps.shape), outputs, [])

    def score(self, params: Tensor, dist: Any, steps: TensorDictBase) -> Tensor:
        """Return the log-probs of the recorded actions, [*B, 1]; without actions the scaled outputs, [*B, P]."""
        if keys.ACTION in steps.keys():
            log_prob = self.policy.log_prob(dist, self._array(steps.get(keys.ACTION)))
            return as_tensor(log_prob).reshape(*steps.shape, 1)
        return params / steps.get(SCALE)

    def recorded_score(self, steps: TensorDictBase) -> Tensor:
        """Return the recorded log-probs, [*B, 1], or scaled outputs, [*B, P]."""
        if keys.ACTION in steps.keys():
            return steps.get(keys.ACTION_LOG_PROB).unsqueeze(-1)
        return steps.get(OUTPUTS) / steps.get(SCALE)

    def log_prob(self, run: Pass, steps: TensorDictBase) -> Tensor | None:
        """Return the log-probs of the recorded actions, [B, T]; None if there are none."""
        return self.score(run.params, run.dist, steps).squeeze(-1) if keys.ACTION in steps.keys() else None

    @contextmanager
    def evaluating(self) -> Generator[None, None, None]:
        """Call `train(False)` if the policy has this function, and afterwards `train` with its old mode, or True."""
        switch, is_training = getattr(self.policy, "train", lambda mode: None), getattr(self.policy, "training", True)
        switch(False)
        try:
            yield
        finally:
            switch(is_training)

    @contextmanager
    def in_float64(self) -> Generator[PolicyUnderTest, None, None]:
        """Give the parameters float64 data; afterwards they have their old data again."""
        parameters = self.parameters()
        before = [parameter.data for parameter in parameters]
        try:
            for parameter in parameters:
                parameter.data = parameter.data.double()
            yield self
        finally:
            for parameter, data in zip(parameters, before, strict=True):
                parameter.data = data

    def flat(self, outputs: Tree, shape: Sequence[int]) -> Tensor:
        """Return all outputs as one tensor [*shape, P]."""
        tensors = [as_tensor(leaf) for leaf in leaves_of(outputs)]
        for tensor in tensors:
            if tensor.shape[: len(shape)] != tuple(shape):
                raise ValueError(
                    f"{self.name} returned outputs of shape {list(tensor.shape)} for a batch {list(shape)}: outputs "
                    "are [B, ...] from step and [B, T, ...] from sequence."
                )
        tensors = [tensor if tensor.is_floating_point() else tensor.float() for tensor in tensors]
        return torch.cat([tensor.reshape(*shape, -1) for tensor in tensors], -1)

    def _arguments(self, steps: TensorDictBase, first: TensorDictBase) -> tuple[Tree, Tree, Any]:
        """Return observations, the state before the first step, and flags, in the library's form."""
        observation = replace_leaves(self.observation, [self._array(steps.get(key)) for key in self.input_keys])
        states = [first.get(key).movedim(0, dim) for key, dim in zip(self.state_keys, self.batch_dims, strict=True)]
        state = replace_leaves(self.state, [self._array(leaf) for leaf in states])
        return observation, state, self._array(steps.get(self.is_init_key).reshape(steps.shape))

    def _array(self, tensor: Tensor) -> Any:
        return tensor.detach().numpy().copy() if self.is_numpy else tensor


def _batch_dim(index: int, two: torch.Size, three: torch.Size) -> int:
    """Return the dimension that differs between batches of two and three."""
    differing = [dim for dim, sizes in enumerate(zip(two, three, strict=False)) if sizes == (2, 3)]
    if len(two) != len(three) or len(differing) != 1:
        raise ValueError(
            f"array {index} of initial_state has shape {list(two)} for 2 environments and {list(three)} for 3: exactly "
            "one dimension must be the batch. Repeat it for each environment, or leave it out of the state."
        )
    return differing[0]
