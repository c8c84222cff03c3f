"""The interface of a core: a recurrent network over plain tensors."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

State = dict[str, Tensor]
"""A memory state: named tensors, batch first, [B, *shape]."""


Terms = dict[str, Tensor]
"""Metrics of each step, {name: [B, T]}. Some are only logged, others enter the core's losses."""


def without_autocast(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of a core, with the input first, that computes in the parameters' precision under autocast.

    A memory state would lose precision at every step, and the kernels take one type of numbers.
    """

    @functools.wraps(method)
    def in_parameters_precision(core: nn.Module, x: Tensor, *others: Any, **named: Any) -> Any:
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return method(core, x, *others, **named)
        dtype = next((p.dtype for p in core.parameters()), torch.get_default_dtype())
        with torch.autocast(device, enabled=False):
            return method(core, x.to(dtype), *others, **named)

    return in_parameters_precision


class Core(nn.Module, ABC):
    """A recurrent network over plain tensors. Implement this class to add a memory of your own design.

    Two rules hold up to rounding. First, `forward` over a sequence equals repeated calls of `step`, with the initial
    state restored wherever `is_init` is true. Second, a sequence can be split at any step if the state is passed on.

    Under `torch.autocast` a core computes in the precision of its parameters (`without_autocast`).
    """

    in_features: int
    out_features: int
    state_shapes: Mapping[str, tuple[int, ...]]
    """Shape of each named tensor of the state, without the batch dimension."""
    term_names: tuple[str, ...] = ()
    """Names of the terms that `forward_with_terms` returns. Most cores have none."""
    counters: tuple[str, ...] = ()
    """Names of the state's tensors that count steps, in whole numbers. No gradient passes through them."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Let the methods of every core, also those of other packages, compute without autocast."""
        super().__init_subclass__(**options)
        for name in {"step", "forward", "forward_with_terms"} & vars(cls).keys():
            setattr(cls, name, without_autocast(vars(cls)[name]))

    @abstractmethod
    def initial_state(self, batch: int) -> State:
        """Return the state before an episode's first step, {name: [batch, *shape]}. It is zero or learned."""

    @abstractmethod
    def step(self, x: Float[Tensor, "B F"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        """Take one step. Return the features and the next state. Do not modify `state`."""

    @abstractmethod
    def forward(
        self, x: Float[Tensor, "B T F"], state: State, is_init: Bool[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T D"], State]:
        """Run a sequence. Return the features of each step and the state after the last step."""

    def forward_with_terms(
        self, x: Float[Tensor, "B T F"], state: State, is_init: Bool[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T D"], State, Terms]:
        """Run a sequence. Return the results of `forward` and the terms named in `term_names`, each [B, T]."""
        return *self(x, state, is_init), {}

    def regularize(self, terms: Terms) -> dict[str, Tensor]:
        """Return the weighted losses to add to the objective, given the terms of the trained steps, {name: [M]}."""
        del terms
        return {}


class InitialState(nn.Module):
    """The initial state of a memory. Call it with a batch size.

    Args:
        shapes: shape of each named tensor, without the batch dimension.
        is_learned: make the initial state a parameter. Otherwise it is constant.
        start: initial values by name. Tensors without an entry start at zero.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        is_learned: bool = False,
        start: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.is_learned = is_learned
        self.names = tuple(shapes)
        start = start or {}
        for name, shape in shapes.items():
            value = start.get(name, torch.zeros(shape))
            if is_learned:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value, persistent=name in start)

    def forward(self, batch: int) -> State:
        """Return {name: [batch, *shape]}. Each is a view of one stored tensor."""
        values = ((name, getattr(self, name)) for name in self.names)
        return {name: value.expand(batch, *value.shape) for name, value in values}


def restart(state: State, initial: State, is_init: Bool[Tensor, " B"]) -> State:
    """Return the state, with the exact initial state in rows where an episode begins. NaN does not pass."""
    return {
        name: torch.where(is_init.view(-1, *(1,) * (value.ndim - 1)), initial[name], value)
        for name, value in state.items()
    }


def unroll(
    core: Core, x: Float[Tensor, "B T F"], state: State, is_init: Bool[Tensor, "B T"]
) -> tuple[Float[Tensor, "B T D"], State]:
    """Run `core.step` over a sequence. It serves as `forward` of simple cores and as reference in tests."""
    initial = core.initial_state(x.shape[0])
    outputs: list[Tensor] = []
    for x_t, is_init_t in zip(x.unbind(1), is_init.unbind(1), strict=True):
        y_t, state = core.step(x_t, restart(state, initial, is_init_t))
        outputs.append(y_t)
    return torch.stack(outputs, 1), state
