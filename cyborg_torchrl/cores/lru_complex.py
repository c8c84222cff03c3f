"""The layers of `lru` with `is_complex`: their states rotate."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from cyborg_torchrl.cores.kernels.linear import linear
from cyborg_torchrl.cores.layered import LayerState, RecurrentLayer
from cyborg_torchrl.cores.scan import gated_linear_scan
from cyborg_torchrl.cores.timescale import log_spaced_timescales


class ComplexLRULayer(RecurrentLayer):
    """Gated linear recurrent unit with complex numbers, H / 2 of them.

        log a_t = -2 sigmoid(W_a x_t + c_a) softplus(rate)
        b_t     = sqrt(1 - a_t^2) * sigmoid(W_g x_t + c_g) * (W_x x_t)
        h_t     = a_t exp(i angle) * h_{t-1} + b_t

    A number turns by its angle at each step, so it shows how long ago it was written. Time constants start as in
    `LRULayer`, and periods log-uniform from 2 steps to ten horizons, in random order. State and output hold real and
    imaginary parts next to each other.

    Args:
        in_features: F, features of the input.
        hidden_size: H, even: real and imaginary parts.
        max_horizon: steps that memory should bridge.
        input_bias: add a bias to the values written into memory.

    Raises:
        ValueError: if H is odd.

    Source: Orvieto et al. (2023), "Resurrecting recurrent neural networks for long sequences" (LRU), with the gates of
    De et al. (2024), "Griffin". We differ from both in time constants and periods.
    """

    def __init__(self, in_features: int, hidden_size: int, max_horizon: int, input_bias: bool = False) -> None:
        super().__init__()
        if hidden_size % 2:
            raise ValueError(f"is_complex needs an even hidden_size; got {hidden_size}.")
        self.state_names = ("hidden",)
        self.features = hidden_size
        numbers = hidden_size // 2
        self.gates = nn.Linear(in_features, 2 * numbers)
        self.input = nn.Linear(in_features, hidden_size, bias=input_bias)
        rate = 1.0 / log_spaced_timescales(numbers, max_horizon)
        self.rate = nn.Parameter(torch.log(torch.expm1(rate)))
        periods = torch.logspace(math.log10(2.0), math.log10(10.0 * max_horizon), numbers)
        self.angle = nn.Parameter(2.0 * math.pi / periods[torch.randperm(numbers)])

    def step(self, x: Float[Tensor, "B F"], state: LayerState) -> tuple[Tensor, LayerState]:
        """Take one step."""
        decay, drive = self._gates(x)
        hidden = _real(torch.addcmul(drive, decay, _complex(state[0])))
        return hidden, (hidden,)

    def forward(
        self,
        x: Float[Tensor, "T B F"],
        state: LayerState,
        is_init: Bool[Tensor, "T B"],
        initial: LayerState,
    ) -> tuple[Tensor, LayerState]:
        """Run a sequence."""
        decay, drive = self._gates(x)
        hidden = _real(gated_linear_scan(decay, drive, _complex(state[0]), is_init, _complex(initial[0])))
        return hidden, (hidden[-1],)

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        decay_gate, input_gate = torch.sigmoid(linear(x, self.gates.weight, self.gates.bias)).chunk(2, -1)
        # loss = a - 1 gives 1 - a^2 without cancellation, as in `LRULayer`
        loss = torch.expm1(decay_gate * (-2.0 * F.softplus(self.rate)))
        power = torch.sqrt(-loss * (2.0 + loss))
        value = _complex(linear(x, self.input.weight, self.input.bias))
        return torch.polar(1.0 + loss, self.angle.expand_as(loss)), power * input_gate * value


def _complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x).flatten(-2)
