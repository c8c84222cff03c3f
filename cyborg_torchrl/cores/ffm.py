"""`ffm`: Fast and Forgetful Memory, a sum of past inputs that fade and turn."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from cyborg_torchrl.cores.abstract import Core, InitialState, State
from cyborg_torchrl.cores.kernels.linear import linear
from cyborg_torchrl.cores.scan import gated_linear_scan
from cyborg_torchrl.cores.timescale import log_spaced_timescales


class FFMBlock(Core):
    """A memory of M traces in C contexts, with complex numbers.

        u_t = (W_1 x_t) * sigmoid(W_2 x_t + b_2)
        S_t = exp(-softplus(rate)) exp(-i speed) * S_{t-1} + u_t 1^T        [M, C]
        z_t = W_3 (Re S_t, Im S_t)
        y_t = norm(z_t) * sigmoid(W_4 x_t + b_4) + (W_5 x_t) * (1 - sigmoid(W_4 x_t + b_4))

    Decay and rotation do not depend on the input: traces forget with time alone. Each trace has a rate, each context a
    speed. The rates start at time constants that are log-uniform from 1 step to ten horizons, the speeds at periods
    from 2 steps to ten horizons.

    State: `memory` [B, M, 2 C], real and imaginary parts next to each other.

    Args:
        d_model: width of input and output.
        trace_size: M.
        context_size: C.
        max_horizon: steps that memory should bridge.
        learn_initial_state: make the initial state a parameter.

    Source: Morad et al. (2023), "Reinforcement learning with Fast and Forgetful Memory". We differ in the start of
    rates and speeds, and W_1 and W_5 have no bias, so a blank step writes nothing.
    """

    def __init__(
        self,
        d_model: int,
        *,
        trace_size: int = 32,
        context_size: int = 4,
        max_horizon: int = 1000,
        learn_initial_state: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("trace_size", trace_size), ("context_size", context_size)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1; got {value}.")
        self.in_features = self.out_features = d_model
        self.traces, self.contexts = trace_size, context_size
        self.state_shapes = {"memory": (trace_size, 2 * context_size)}
        self.write = nn.Linear(d_model, trace_size, bias=False)
        self.write_gate = nn.Linear(d_model, trace_size)
        self.rate = nn.Parameter(torch.log(torch.expm1(1.0 / log_spaced_timescales(trace_size, max_horizon))))
        periods = torch.logspace(math.log10(2.0), math.log10(10.0 * max_horizon), context_size)
        self.speed = nn.Parameter(2.0 * math.pi / periods)
        self.read = nn.Linear(2 * trace_size * context_size, d_model)
        self.norm = nn.LayerNorm(d_model, elementwise_affine=False)
        self.output_gate = nn.Linear(d_model, d_model)
        self.skip = nn.Linear(d_model, d_model, bias=False)
        self.initial = InitialState(self.state_shapes, learn_initial_state)

    def initial_state(self, batch: int) -> State:
        """Return {"memory": [batch, M, 2 C]}."""
        return self.initial(batch)

    def step(self, x: Float[Tensor, "B F"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        """Take one step."""
        # In real numbers, since ONNX has no complex ones.
        real, imaginary = state["memory"].unflatten(-1, (self.contexts, 2)).unbind(-1)
        kept = torch.exp(-F.softplus(self.rate)).unsqueeze(-1)
        cos, sin = kept * self.speed.cos(), -kept * self.speed.sin()
        turned = self._written(x).unsqueeze(-1) + cos * real - sin * imaginary, sin * real + cos * imaginary
        memory = torch.stack(turned, -1).flatten(-2)
        return self._emit(memory.flatten(-2), x), {"memory": memory}

    def forward(
        self, x: Float[Tensor, "B T F"], state: State, is_init: Bool[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T D"], State]:
        """Run a sequence."""
        x, is_init = x.transpose(0, 1).contiguous(), is_init.transpose(0, 1).contiguous()
        kept = torch.exp(-F.softplus(self.rate)).unsqueeze(-1).expand(-1, self.contexts)
        decay = torch.polar(kept, -self.speed.expand_as(kept)).flatten()
        written = self._written(x).unsqueeze(-1).expand(*x.shape[:2], -1, self.contexts).flatten(-2)
        drive, initial = torch.complex(written, torch.zeros_like(written)), self.initial_state(x.shape[1])["memory"]
        memory = gated_linear_scan(decay.expand_as(drive), drive, _complex(state["memory"]), is_init, _complex(initial))
        memory = torch.view_as_real(memory).flatten(-2)
        last = memory[-1].unflatten(-1, (self.traces, -1))
        return self._emit(memory, x).transpose(0, 1), {"memory": last}

    def _written(self, x: Tensor) -> Tensor:
        return linear(x, self.write.weight) * torch.sigmoid(linear(x, self.write_gate.weight, self.write_gate.bias))

    def _emit(self, memory: Tensor, x: Tensor) -> Tensor:
        read = self.norm(linear(memory, self.read.weight, self.read.bias))
        gate = torch.sigmoid(linear(x, self.output_gate.weight, self.output_gate.bias))
        return torch.lerp(linear(x, self.skip.weight), read, gate)


def _complex(memory: Float[Tensor, "B M C"]) -> Tensor:
    return torch.view_as_complex(memory.unflatten(-1, (-1, 2)).contiguous()).flatten(-2)
