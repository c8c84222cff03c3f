"""Stacks of cores, described by a list of layers."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from cyborg_torchrl.cores.abstract import Core, State, Terms
from cyborg_torchrl.cores.ffm import FFMBlock
from cyborg_torchrl.cores.gated_delta import GatedDeltaBlock
from cyborg_torchrl.cores.mamba import MambaBlock
from cyborg_torchrl.cores.mamba2 import Mamba2Block
from cyborg_torchrl.cores.mlp import MLPBlock
from cyborg_torchrl.cores.pseudo_mamba import PseudoMambaBlock
from cyborg_torchrl.registry import backbones, check_known, did_you_mean, register_backbone

BLOCKS: dict[str, Callable[..., Core]] = {
    "ffm": FFMBlock,
    "gated_delta": GatedDeltaBlock,
    "mamba": MambaBlock,
    "mamba2": Mamba2Block,
    "mlp": MLPBlock,
    "pseudo_mamba": PseudoMambaBlock,
}
"""Blocks that need the norms and residuals of a stack. They are not backbones by themselves."""


class StackCore(Core):
    """Layers of cores with pre-norm residuals.

        m_0 = 0;    m_i = m_{i-1} + P_i core_i(RMSNorm(W x + m_{i-1}));    y = m_L

    The output does not contain the input: an agent adds the present separately (see `PastPresentFusion`). W and P_i
    are linear maps if widths differ, and identities if they agree. There are no biases, so a blank input stays blank.

    State: the tensors of all layers. If several layers use a name, the layer's number is appended: `hidden_0`,
    `hidden_1`. The same holds for terms.

    Args:
        cores: the layers, each with `width` input features.
        in_features: F, features of the input.
        width: D, features between the layers and of the output.

    Raises:
        ValueError: if there is no layer, or a layer has another input width.
    """

    def __init__(self, cores: Sequence[Core], in_features: int, width: int) -> None:
        super().__init__()
        if not cores:
            raise ValueError("a stack needs at least one layer.")
        for core in cores:
            if core.in_features != width:
                raise ValueError(f"every layer must read the stack's width of {width}; got {core.in_features}.")
        self.in_features, self.out_features = in_features, width
        self.cores = nn.ModuleList(cores)
        self.input = _linear(in_features, width)
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-5) for _ in cores)
        self.outputs = nn.ModuleList(_linear(core.out_features, width) for core in cores)
        self.state_names = _unique_names([tuple(core.state_shapes) for core in cores])
        self.layer_term_names = _unique_names([core.term_names for core in cores])
        self.state_shapes = {
            names[name]: shape
            for core, names in zip(cores, self.state_names, strict=True)
            for name, shape in core.state_shapes.items()
        }
        self.counters = tuple(
            names[name] for core, names in zip(cores, self.state_names, strict=True) for name in core.counters
        )
        self.term_names = tuple(unique for names in self.layer_term_names for unique in names.values())

    def initial_state(self, batch: int) -> State:
        """Return the initial states of all layers."""
        return {
            names[name]: value
            for core, names in zip(self._layers(), self.state_names, strict=True)
            for name, value in core.initial_state(batch).items()
        }

    def step(self, x: Float[Tensor, "B F"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        """Take one step through all layers."""
        y, state, _ = self._through_layers(x, state, lambda core, y, state_i: (*core.step(y, state_i), {}))
        return y, state

    def forward(
        self, x: Float[Tensor, "B T F"], state: State, is_init: Bool[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T D"], State]:
        """Run a sequence, layer after layer."""
        y, state, _ = self._through_layers(x, state, lambda core, y, state_i: (*core(y, state_i, is_init), {}))
        return y, state

    def forward_with_terms(
        self, x: Float[Tensor, "B T F"], state: State, is_init: Bool[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T D"], State, Terms]:
        """Run a sequence, and return the terms of all layers too."""
        return self._through_layers(x, state, lambda core, y, state_i: core.forward_with_terms(y, state_i, is_init))

    def regularize(self, terms: Terms) -> dict[str, Tensor]:
        """Return the losses of all layers."""
        losses: dict[str, Tensor] = {}
        for index, (core, names) in enumerate(zip(self._layers(), self.layer_term_names, strict=True)):
            for name, value in core.regularize({name: terms[unique] for name, unique in names.items()}).items():
                losses[name if name not in losses else f"{name}_{index}"] = value
        return losses

    def _layers(self) -> list[Core]:
        return list(self.cores)  # pyright: ignore[reportReturnType]

    def _through_layers(
        self, x: Tensor, state: State, run: Callable[[Core, Tensor, State], tuple[Tensor, State, Terms]]
    ) -> tuple[Tensor, State, Terms]:
        x = self.input(x)
        memory: Tensor | None = None
        last: State = {}
        terms: Terms = {}
        for i, core in enumerate(self._layers()):
            states = self.state_names[i]
            before = self.norms[i](x if memory is None else x + memory)
            y, last_i, terms_i = run(core, before, {name: state[unique] for name, unique in states.items()})
            y = self.outputs[i](y)
            memory = y if memory is None else memory + y
            last |= {states[name]: value for name, value in last_i.items()}
            terms |= {self.layer_term_names[i][name]: value for name, value in terms_i.items()}
        assert memory is not None
        return memory, last, terms


def build_layer(layer: str | Mapping[str, Any], width: int, defaults: Mapping[str, Any]) -> Core:
    """Build one layer of a stack.

    Args:
        layer: name of a block or of a registered backbone, or a mapping with `name` and options.
        width: number of input features.
        defaults: options for all layers. A layer ignores those that it does not have.

    Raises:
        ValueError: for an unknown name or option.
    """
    options = {} if isinstance(layer, str) else {str(key): value for key, value in layer.items()}
    name = layer if isinstance(layer, str) else options.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(f"a layer is a name, or a mapping with a 'name'; got {layer!r}.")
    check_known("layer", name, {*BLOCKS, *backbones.names()})
    builder = BLOCKS.get(name) or backbones.get(name)
    known = list(inspect.signature(builder).parameters)[1:]
    for option in options:
        if option not in known:
            raise ValueError(f"unknown option '{option}' of layer '{name}': {did_you_mean(option, known)}")
    return builder(width, **{key: value for key, value in defaults.items() if key in known} | options)


@register_backbone("stack")
def build_stack(
    in_features: int,
    *,
    layers: Sequence[Any] = ("mamba", "gru"),
    depth: int = 1,
    hidden_size: int = 64,
    max_horizon: int | None = None,
    readout: str = "timescale_norm",
    readout_groups: int = 16,
    learn_initial_state: bool = False,
) -> StackCore:
    """Build a stack with pre-norm residuals from a list of layers.

    Args:
        in_features: F, features of the input.
        layers: names of blocks or backbones, or mappings with `name` and options, such as
            ["mamba", {"name": "gru", "hidden_size": 128}]. `mlp` is a layer without memory.
        depth: number of repetitions of the list.
        hidden_size: width of the stack, and of each layer without another `hidden_size`.
        max_horizon: steps that memory should bridge. None: 1000. A configured environment with a horizon sets it.
        readout: "timescale_norm" or "none", for every layer with a read-out.
        readout_groups: groups of the time-scale norm.
        learn_initial_state: make the initial states parameters.

    Raises:
        ValueError: for an unknown layer or option, or a number below 1.
    """
    horizon = 1000 if max_horizon is None else max_horizon
    for name, value in (("depth", depth), ("hidden_size", hidden_size), ("max_horizon", horizon)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1; got {value}.")
    defaults = {
        "hidden_size": hidden_size,
        "max_horizon": horizon,
        "readout": readout,
        "readout_groups": readout_groups,
        "learn_initial_state": learn_initial_state,
    }
    cores = [build_layer(layer, hidden_size, defaults) for _ in range(depth) for layer in layers]
    return StackCore(cores, in_features, hidden_size)


def _unique_names(names: Sequence[tuple[str, ...]]) -> list[dict[str, str]]:
    """Return for each layer a map from the layer's names to names that are unique in the stack."""
    count = Counter(name for layer in names for name in layer)
    return [{name: f"{name}_{i}" if count[name] > 1 else name for name in layer} for i, layer in enumerate(names)]


def _linear(in_features: int, out_features: int) -> nn.Module:
    return nn.Identity() if in_features == out_features else nn.Linear(in_features, out_features, bias=False)
