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
from cyborg_torchrl.cores.timescale import LONG_REACH, log_spaced_timescales


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
        rate = 1.0 / log_spaced_timescales(numbers, max_horizon, LONG_REACH)
        self.rate = nn.Parameter(torch.log(torch.expm1(rate)))
        periods = torch.logspace(math.log10(2.0), math.log10(10.0 * max_horizon), numbers)
        self.angle = nn.Parameter(2.0 * math.pi / periods[torch.randperm(numbers)])

    def step(self, x: Float[Tensor, "B F"], state: LayerState) -> tuple[Tensor, LayerState]:
        """Take one step, in real numbers, since ONNX has no complex ones."""
        kept, drive = self._gates(x)
        real, imaginary = state[0].unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = kept * self.angle.cos(), kept * self.angle.sin()
        turned = torch.stack([cos * real - sin * imaginary, sin * real + cos * imaginary], -1)
        hidden = turned.flatten(-2) + drive
        return hidden, (hidden,)

    def forward(
        self,
        x: Float[Tensor, "T B F"],
        state: LayerState,
        is_init: Bool[Tensor, "T B"],
        initial: LayerState,
    ) -> tuple[Tensor, LayerState]:
        """Run a sequence."""
        kept, drive = self._gates(x)
        decay = torch.polar(kept, self.angle.expand_as(kept))
        hidden = gated_linear_scan(decay, _complex(drive), _complex(state[0]), is_init, _complex(initial[0]))
        hidden = torch.view_as_real(hidden).flatten(-2)
        return hidden, (hidden[-1],)

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return a_t [*, H / 2], and b_t [*, H]: real and imaginary parts next to each other."""
        decay_gate, input_gate = torch.sigmoid(linear(x, self.gates.weight, self.gates.bias)).chunk(2, -1)
        # loss = a - 1 gives 1 - a^2 without cancellation, as in `LRULayer`
        loss = torch.expm1(decay_gate * (-2.0 * F.softplus(self.rate)))
        power = torch.sqrt(-loss * (2.0 + loss))
        value = linear(x, self.input.weight, self.input.bias).unflatten(-1, (-1, 2))
        return 1.0 + loss, ((power * input_gate).unsqueeze(-1) * value).flatten(-2)


def _complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
