"""What a core is: a recurrent network over plain tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

State = dict[str, Tensor]
"""A memory state: named tensors, batch first, [B, *shape]."""


Terms = dict[str, Tensor]
"""Figures of each step, {name: [B, T]}: diagnostics, and what a core wants to be regularised by."""


class Core(nn.Module, ABC):
    """A recurrent network that knows only tensors. Third parties implement it; nothing else is needed.

    Two ways through it must agree to rounding: `forward` over a sequence equals `step` repeated, with the state
    replaced by the initial state wherever `is_init`; and splitting a sequence anywhere, carrying the state over,
    changes nothing.
    """

    in_features: int
    out_features: int
    state_shapes: Mapping[str, tuple[int, ...]]
    """Shape of each named tensor of the state, without the batch dimension."""
    term_names: tuple[str, ...] = ()
    """Names of the terms that `forward_with_terms` returns; most cores have none."""

    @abstractmethod
    def initial_state(self, batch: int) -> State:
        """The state before an episode's first step, {name: [batch, *shape]}; zero, or learned."""

    @abstractmethod
    def step(self, x: Float[Tensor, "B F"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        """One step. Returns the features and the next state; `state` is left as it was."""

    @abstractmethod
    def forward(
        self, x: Float[Tensor, "B T F"], state: State, is_init: Bool[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T D"], State]:
        """A sequence. Returns the features of each step and the state after the last."""

    def forward_with_terms(
        self, x: Float[Tensor, "B T F"], state: State, is_init: Bool[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T D"], State, Terms]:
        """As `forward`, with the figures of each step named in `term_names`, [B, T]."""
        return *self(x, state, is_init), {}

    def regularize(self, terms: Terms) -> dict[str, Tensor]:
        """From the terms of the trained steps, {name: [M]}, the weighted losses that are added to the objective."""
        del terms
        return {}


class InitialState(nn.Module):
    """The state that memory starts from; call it with a batch size.

    Args:
        shapes: shape of each named tensor, without the batch dimension.
        is_learned: make the initial state a parameter; otherwise it stays what it is.
        start: what each tensor is at first; zero where it is not named.
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
        """Returns {name: [batch, *shape]}, views of one stored tensor each."""
        values = ((name, getattr(self, name)) for name in self.names)
        return {name: value.expand(batch, *value.shape) for name, value in values}


def restart(state: State, initial: State, is_init: Bool[Tensor, " B"]) -> State:
    """Replaces the state by the initial state in the rows where an episode begins; exactly, whatever was there."""
    return {
        name: torch.where(is_init.view(-1, *(1,) * (value.ndim - 1)), initial[name], value)
        for name, value in state.items()
    }


def unroll(
    core: Core, x: Float[Tensor, "B T F"], state: State, is_init: Bool[Tensor, "B T"]
) -> tuple[Float[Tensor, "B T D"], State]:
    """Runs `core.step` over a sequence: a `forward` for cores without a faster one, and the reference in tests."""
    initial = core.initial_state(x.shape[0])
    outputs: list[Tensor] = []
    for x_t, is_init_t in zip(x.unbind(1), is_init.unbind(1), strict=True):
        y_t, state = core.step(x_t, restart(state, initial, is_init_t))
        outputs.append(y_t)
    return torch.stack(outputs, 1), state
