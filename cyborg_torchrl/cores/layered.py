"""A core made of stacked layers of one kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cyborg_torchrl.cores.abstract import Core, InitialState, State
from cyborg_torchrl.cores.timescale import build_readout
from cyborg_torchrl.registry import with_options_of

LayerState = tuple[Tensor, ...]
"""State of one layer: tensors [B, H]."""


class RecurrentLayer(nn.Module, ABC):
    """One recurrent layer. Its state is a tuple of [B, H] tensors, in the order of `state_names`."""

    state_names: tuple[str, ...]
    features: int

    @abstractmethod
    def step(self, x: Float[Tensor, "B F"], state: LayerState) -> tuple[Tensor, LayerState]:
        """Take one step. Return the output [B, H] and the next state."""

    @abstractmethod
    def forward(
        self,
        x: Float[Tensor, "T B F"],
        state: LayerState,
        is_init: Bool[Tensor, "T B"],
        initial: LayerState,
    ) -> tuple[Tensor, LayerState]:
        """Run a sequence, time first. Return the outputs [T, B, H] and the last state."""


class LayeredCore(Core):
    """A stack of recurrent layers. The read-out of each layer is normalised by time-scale and feeds the next.

    Args:
        layers: layers of one kind. The first one gets the input.
        in_features: F, features of the input.
        readout: "timescale_norm" or "none", after each layer.
        readout_groups: groups of the time-scale norm.
        learn_initial_state: make the initial state a parameter.

    State: for each name of the layers, [B, layers, H].
    """

    def __init__(
        self,
        layers: Sequence[RecurrentLayer],
        in_features: int,
        *,
        readout: str = "timescale_norm",
        readout_groups: int = 16,
        learn_initial_state: bool = False,
    ) -> None:
        super().__init__()
        hidden_size = layers[0].features
        self.in_features, self.out_features = in_features, hidden_size
        self.layers = nn.ModuleList(layers)
        self.readouts = nn.ModuleList(build_readout(readout, hidden_size, readout_groups) for _ in layers)
        self.state_names = layers[0].state_names
        self.state_shapes: Mapping[str, tuple[int, ...]] = {
            name: (len(layers), hidden_size) for name in self.state_names
        }
        self._initial = InitialState(self.state_shapes, learn_initial_state)

    def initial_state(self, batch: int) -> State:
        """Return {name: [batch, layers, H]}."""
        return self._initial(batch)

    def step(self, x: Float[Tensor, "B F"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        """Take one step through all layers."""
        y = x
        last: list[LayerState] = []
        for index, (layer, readout) in enumerate(zip(self.layers, self.readouts, strict=True)):
            y, after = layer.step(y, self._of_layer(index, state))  # pyright: ignore[reportCallIssue]
            y = readout(y)
            last.append(after)
        return y, self._joined(last)

    def forward(
        self, x: Float[Tensor, "B T F"], state: State, is_init: Bool[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T D"], State]:
        """Run a sequence, layer after layer."""
        y, is_init = x.transpose(0, 1).contiguous(), is_init.transpose(0, 1).contiguous()
        initial = self.initial_state(x.shape[0])
        last: list[LayerState] = []
        for index, (layer, readout) in enumerate(zip(self.layers, self.readouts, strict=True)):
            y, after = layer(y, self._of_layer(index, state), is_init, self._of_layer(index, initial))
            y = readout(y)
            last.append(after)
        return y.transpose(0, 1), self._joined(last)

    def _of_layer(self, index: int, state: State) -> LayerState:
        return tuple(state[name].select(1, index) for name in self.state_names)

    def _joined(self, layers: list[LayerState]) -> State:
        if len(layers) == 1:  # a view is faster than a copy, and acting does this at every step
            return {name: value.unsqueeze(1) for name, value in zip(self.state_names, layers[0], strict=True)}
        columns = zip(*layers, strict=True)
        return {name: torch.stack(column, 1) for name, column in zip(self.state_names, columns, strict=True)}


def bare_core(
    layer: Callable[[int], RecurrentLayer], in_features: int, hidden_size: int, num_layers: int, **options: bool
) -> LayeredCore:
    """Build a core whose states are read out as they are.

    Args:
        layer: from its number of input features to a layer with `hidden_size` units.
        in_features: F, features of the input.
        hidden_size: H, units of each layer.
        num_layers: number of layers.
        options: other options of `LayeredCore`.

    Raises:
        ValueError: if a size is below 1.
    """
    for name, value in (("hidden_size", hidden_size), ("num_layers", num_layers)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1; got {value}.")
    layers = [layer(width) for width in (in_features, *[hidden_size] * (num_layers - 1))]
    return LayeredCore(layers, in_features, readout="none", **options)


def layered_core_builder(layer: Callable[[int, int, int, bool], RecurrentLayer]) -> Callable[..., LayeredCore]:
    """Return a builder of cores, given a builder `layer(in_features, hidden_size, max_horizon, input_bias)`."""

    @with_options_of(LayeredCore)
    def build(
        in_features: int,
        *,
        hidden_size: int = 64,
        num_layers: int = 1,
        max_horizon: int | None = None,
        input_bias: bool = False,
        **options: Any,
    ) -> LayeredCore:
        """Build the core.

        Args:
            in_features: F, features of the input.
            hidden_size: H, channels of each layer.
            num_layers: number of layers.
            max_horizon: steps that memory should bridge. Time-scales reach ten times as far, those of `lru` 1,000
                times. None: 1000. A configured environment with a horizon sets it.
            input_bias: add a bias to the values written into memory. Off, so that a blank step writes nothing.
            options: other options of `LayeredCore`.

        Raises:
            ValueError: if a size is below 1, or the read-out is unknown.
        """
        horizon = 1000 if max_horizon is None else max_horizon
        for name, value in (("hidden_size", hidden_size), ("num_layers", num_layers), ("max_horizon", horizon)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1; got {value}.")
        widths = [in_features, *[hidden_size] * (num_layers - 1)]
        layers = [layer(width, hidden_size, horizon, input_bias) for width in widths]
        return LayeredCore(layers, in_features, **options)

    return build
