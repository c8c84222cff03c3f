"""`lru`: a gated real linear recurrence."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from cyborg_torchrl.cores.layered import LayerState, RecurrentLayer, layered_core_builder
from cyborg_torchrl.cores.scan import gated_linear_scan
from cyborg_torchrl.cores.timescale import log_spaced_timescales
from cyborg_torchrl.registry import register_backbone


class LRULayer(RecurrentLayer):
    """Gated real linear recurrent unit.

        log a_t = -2 sigmoid(W_a x_t + c_a) softplus(rate)
        b_t     = sqrt(1 - a_t^2) * sigmoid(W_g x_t + c_g) * (W_x x_t)
        h_t     = a_t * h_{t-1} + b_t

    The rates start at one over time constants spread log-uniformly from 1 step to ten horizons. The input has no
    bias unless `input_bias`, so a blank step writes nothing.

    Source: De et al. (2024), "Griffin", section 2.4 (RG-LRU), after Orvieto et al. (2023). We differ in the time
    constants (theirs: a^8 uniform in [.9, .999]) and in the factor 2 (theirs: 8).
    """

    def __init__(self, in_features: int, hidden_size: int, max_horizon: int, input_bias: bool = False) -> None:
        super().__init__()
        self.state_names = ("hidden",)
        self.features = hidden_size
        self.decay_gate = nn.Linear(in_features, hidden_size)
        self.input_gate = nn.Linear(in_features, hidden_size)
        self.input = nn.Linear(in_features, hidden_size, bias=input_bias)
        rate = 1.0 / log_spaced_timescales(hidden_size, max_horizon)
        self.rate = nn.Parameter(torch.log(torch.expm1(rate)))

    def step(self, x: Float[Tensor, "B F"], state: LayerState) -> tuple[Tensor, LayerState]:
        """One step."""
        decay, drive = self._gates(x)
        hidden = torch.addcmul(drive, decay, state[0])
        return hidden, (hidden,)

    def forward(
        self,
        x: Float[Tensor, "T B F"],
        state: LayerState,
        is_init: Bool[Tensor, "T B"],
        initial: LayerState,
    ) -> tuple[Tensor, LayerState]:
        """A sequence."""
        decay, drive = self._gates(x)
        hidden = gated_linear_scan(decay, drive, state[0], is_init, initial[0])
        return hidden, (hidden[-1],)

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_decay = -2.0 * torch.sigmoid(self.decay_gate(x)) * F.softplus(self.rate)
        # expm1 keeps 1 - a^2 exact for time constants far beyond 1/eps steps
        power = torch.sqrt(-torch.expm1(2.0 * log_decay))
        return torch.exp(log_decay), power * torch.sigmoid(self.input_gate(x)) * self.input(x)


build_lru = register_backbone("lru")(layered_core_builder(LRULayer))
