"""`min_gru`: a gated recurrent unit whose gates do not read the state."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cyborg_torchrl.cores.kernels.linear import linear
from cyborg_torchrl.cores.layered import LayerState, RecurrentLayer, layered_core_builder
from cyborg_torchrl.cores.scan import gated_linear_scan, gated_linear_step
from cyborg_torchrl.cores.timescale import log_spaced_timescales
from cyborg_torchrl.registry import register_backbone


class MinGRULayer(RecurrentLayer):
    """Minimal gated recurrent unit.

        z_t = sigmoid(W_z x_t + b_z)
        h_t = (1 - z_t) h_{t-1} + z_t (W_h x_t)

    The bias b_z starts at time constants that are log-uniform from 1 step to ten horizons. The candidate has no bias
    unless `input_bias` is set, so a blank step writes nothing.

    Source: Feng et al. (2024), "Were RNNs all we needed?", section 3.1.1. We differ in the bias and in the time
    constants. Theirs has also a form in logarithms with positive candidates, which is not implemented here.
    """

    def __init__(self, in_features: int, hidden_size: int, max_horizon: int, input_bias: bool = False) -> None:
        super().__init__()
        self.state_names = ("hidden",)
        self.features = hidden_size
        self.maps = nn.Linear(in_features, 2 * hidden_size, bias=False)
        self.gate_bias = nn.Parameter(_logit(-torch.expm1(-1.0 / log_spaced_timescales(hidden_size, max_horizon))))
        self.input_bias = nn.Parameter(torch.zeros(hidden_size)) if input_bias else None

    def step(self, x: Float[Tensor, "B F"], state: LayerState) -> tuple[Tensor, LayerState]:
        """Take one step."""
        decay, drive = self._gates(x)
        hidden = gated_linear_step(decay, drive, state[0])
        return hidden, (hidden,)

    def forward(
        self,
        x: Float[Tensor, "T B F"],
        state: LayerState,
        is_init: Bool[Tensor, "T B"],
        initial: LayerState,
    ) -> tuple[Tensor, LayerState]:
        """Run a sequence."""
        hidden = gated_linear_scan(*self._gates(x), state[0], is_init, initial[0])
        return hidden, (hidden[-1],)

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate, candidate = linear(x, self.maps.weight).chunk(2, -1)
        gate = gate + self.gate_bias
        if self.input_bias is not None:
            candidate = candidate + self.input_bias
        return torch.sigmoid(-gate), torch.sigmoid(gate) * candidate


def _logit(p: Tensor) -> Tensor:
    return torch.log(p) - torch.log1p(-p)


build_min_gru = register_backbone("min_gru")(layered_core_builder(MinGRULayer))
"""Build the core of `backbone=min_gru`: a `LayeredCore` of `MinGRULayer`."""
