"""`lru`: a gated linear recurrence with real numbers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from cyborg_torchrl.cores.blocks import blocks
from cyborg_torchrl.cores.kernels.choice import kernel_for
from cyborg_torchrl.cores.kernels.gated_recurrence import gated_recurrence_cpp
from cyborg_torchrl.cores.kernels.linear import linear
from cyborg_torchrl.cores.kernels.triton.gated_recurrence import gated_recurrence_triton
from cyborg_torchrl.cores.layered import LayeredCore, LayerState, RecurrentLayer, layered_core_builder
from cyborg_torchrl.cores.lru_complex import ComplexLRULayer
from cyborg_torchrl.cores.resets import reset_steps
from cyborg_torchrl.cores.timescale import LONG_REACH, log_spaced_timescales
from cyborg_torchrl.registry import register_backbone, with_options_of


class _Gates(NamedTuple):
    """Decay and drive of the recurrence, with the intermediate values that the gradient needs."""

    decay: Tensor
    """a_t."""
    drive: Tensor
    """b_t."""
    opening: Tensor
    """Sigmoid of the decay gate."""
    power: Tensor
    """sqrt(1 - a_t^2)."""
    gate: Tensor
    """Sigmoid of the input gate."""


def _gates(decay_gate: Tensor, input_gate: Tensor, x: Tensor, rate: Tensor) -> _Gates:
    opening, gate = torch.sigmoid(decay_gate), torch.sigmoid(input_gate)
    # loss = a - 1. It gives 1 - a^2 without cancellation, even for time constants far above 1/eps steps.
    loss = torch.expm1(opening * (-2.0 * rate))
    power = torch.sqrt(-loss * (2.0 + loss))
    return _Gates(1.0 + loss, power * gate * x, opening, power, gate)


class _GatedRecurrence(torch.autograd.Function):
    """The recurrence, given the inputs of its gates, block by block. The backward pass recomputes the gates."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        decay_gate: Tensor,
        input_gate: Tensor,
        x: Tensor,
        rate: Tensor,
        h_0: Tensor,
        is_init: Tensor,
        initial: Tensor,
    ) -> Tensor:
        states = torch.empty_like(x)
        resets = reset_steps(is_init)
        h_t = h_0
        for span in blocks(x):
            gates = _gates(decay_gate[span], input_gate[span], x[span], rate)
            rows = zip(gates.decay.unbind(0), gates.drive.unbind(0), states[span].unbind(0), strict=True)
            for t, (a_t, b_t, out_t) in enumerate(rows, span.start):
                if resets[t]:
                    h_t = torch.where(is_init[t].unsqueeze(-1), initial, h_t)
                h_t = torch.addcmul(b_t, a_t, h_t, out=out_t)
        ctx.save_for_backward(decay_gate, input_gate, x, rate, states, h_0, is_init, initial)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_states: Tensor) -> tuple[Tensor | None, ...]:
        decay_gate, input_gate, x, rate, states, h_0, is_init, initial = ctx.saved_tensors
        resets = reset_steps(is_init)
        grads = torch.empty_like(decay_gate), torch.empty_like(input_gate), torch.empty_like(x)
        grad_rate, grad_initial, grad_t = torch.zeros_like(rate), torch.zeros_like(h_0), torch.zeros_like(h_0)
        for span in reversed(blocks(x)):
            gates = _gates(decay_gate[span], input_gate[span], x[span], rate)
            # grad_drive_t = grad_states_t + a_{t+1} grad_drive_{t+1}. `grad_t` carries the product across blocks.
            grad_drive = torch.empty_like(gates.drive)
            previous = torch.empty_like(gates.drive)
            previous[0] = states[span.start - 1] if span.start else h_0
            previous[1:] = states[span][:-1]
            rows = list(zip(gates.decay.unbind(0), grad_states[span].unbind(0), grad_drive.unbind(0), strict=True))
            for i, (a_t, g_t, out_t) in reversed(list(enumerate(rows))):
                t = span.start + i
                grad_t = torch.mul(a_t, torch.add(g_t, grad_t, out=out_t))
                if resets[t]:
                    mask = is_init[t].unsqueeze(-1)
                    grad_initial += grad_t.masked_fill(~mask, 0.0)
                    grad_t = grad_t.masked_fill(mask, 0.0)
                    previous[i] = torch.where(mask, initial, previous[i])
            grad_rate += _gates_backward(gates, x[span], rate, grad_drive, previous, [grad[span] for grad in grads])
        return *grads, grad_rate, grad_t, None, grad_initial


def _gates_backward(
    gates: _Gates, x: Tensor, rate: Tensor, grad_drive: Tensor, previous: Tensor, out: list[Tensor]
) -> Tensor:
    """Write the gradients of the gates' inputs to `out`. Return the gradient of the rates."""
    decay, _, opening, power, gate = gates
    grad_decay_gate, grad_input_gate, grad_x = out
    grad_power = torch.mul(grad_drive, gate)
    torch.mul(grad_power, power, out=grad_x)
    torch.mul(grad_x, x, out=grad_input_gate).mul_(1.0 - gate)  # sigmoid' = s (1 - s); grad_x has s
    # a d/da (h a + sqrt(1 - a^2) v) = a h - a^2 v / sqrt(1 - a^2)
    slope = torch.mul(decay, grad_power.mul_(x)).div_(power.clamp_min(1e-18))
    grad_log = torch.mul(grad_drive, previous).sub_(slope).mul_(decay).mul_(opening)
    torch.mul(grad_log, 1.0 - opening, out=grad_decay_gate).mul_(-2.0 * rate)
    return -2.0 * grad_log.sum((0, 1))


def gated_recurrence(
    inputs: Float[Tensor, "T B I"],
    rate: Float[Tensor, " D"],
    h_0: Float[Tensor, "B D"],
    is_init: Bool[Tensor, "T B"],
    initial: Float[Tensor, "B D"],
) -> Float[Tensor, "T B D"]:
    """Return the states of an `LRULayer`, given its gates' inputs. It equals `gated_recurrence_cpp`."""
    arguments = (*inputs.chunk(3, -1), rate, h_0, is_init, initial)
    return _GatedRecurrence.apply(*arguments)


RECURRENCES = {"cpp": gated_recurrence_cpp, "triton": gated_recurrence_triton, "torch": gated_recurrence}


class LRULayer(RecurrentLayer):
    """Gated real linear recurrent unit.

        log a_t = -2 sigmoid(W_a x_t + c_a) softplus(rate)
        b_t     = sqrt(1 - a_t^2) * sigmoid(W_g x_t + c_g) * (W_x x_t)
        h_t     = a_t * h_{t-1} + b_t

    The rates start at the inverse of time constants, log-uniform from 1 step to 1,000 horizons. The input has no bias
    unless `input_bias` is set, so a blank step writes nothing.

    Source: De et al. (2024), "Griffin", section 2.4 (RG-LRU), after Orvieto et al. (2023). We differ in the time
    constants (theirs: a^8 uniform in [0.9, 0.999]) and in the factor 2 (theirs: 8).
    """

    def __init__(self, in_features: int, hidden_size: int, max_horizon: int, input_bias: bool = False) -> None:
        super().__init__()
        self.state_names = ("hidden",)
        self.features = hidden_size
        self.decay_gate = nn.Linear(in_features, hidden_size)
        self.input_gate = nn.Linear(in_features, hidden_size)
        self.input = nn.Linear(in_features, hidden_size, bias=input_bias)
        self.has_input_bias = input_bias
        self.no_bias: Tensor
        self.register_buffer("no_bias", torch.zeros(hidden_size), persistent=False)
        rate = 1.0 / log_spaced_timescales(hidden_size, max_horizon, LONG_REACH)
        self.rate = nn.Parameter(torch.log(torch.expm1(rate)))

    def step(self, x: Float[Tensor, "B F"], state: LayerState) -> tuple[Tensor, LayerState]:
        """Take one step."""
        inputs, rate = linear(x, *self.joined_maps()), self.decay_rates()
        kernel = kernel_for(x)
        if kernel != "torch":  # the code of `forward`, so both round alike
            is_init = torch.zeros(1, x.shape[0], dtype=torch.bool, device=x.device)
            hidden = RECURRENCES[kernel](inputs.unsqueeze(0), rate, state[0], is_init, state[0]).squeeze(0)
        else:
            decay_gate, input_gate, value = inputs.chunk(3, -1)
            gates = _gates(decay_gate, input_gate, value, rate)
            hidden = torch.addcmul(gates.drive, gates.decay, state[0])
        return hidden, (hidden,)

    def forward(
        self,
        x: Float[Tensor, "T B F"],
        state: LayerState,
        is_init: Bool[Tensor, "T B"],
        initial: LayerState,
    ) -> tuple[Tensor, LayerState]:
        """Run a sequence."""
        recur = RECURRENCES[kernel_for(x)]
        inputs = linear(x, *self.joined_maps())
        hidden = recur(inputs, self.decay_rates(), state[0], is_init, initial[0])
        return hidden, (hidden[-1],)

    def joined_maps(self) -> tuple[Tensor, Tensor]:
        """Return the three linear maps joined: weight [3 D, F] and bias [3 D].

        One matrix product is faster than three.
        """
        maps = (self.decay_gate, self.input_gate, self.input)
        bias = self.input.bias if self.has_input_bias else self.no_bias
        return torch.cat([each.weight for each in maps]), torch.cat([maps[0].bias, maps[1].bias, bias])

    def decay_rates(self) -> Tensor:
        """Return softplus(rate), positive."""
        return F.softplus(self.rate)


_build_real, _build_complex = layered_core_builder(LRULayer), layered_core_builder(ComplexLRULayer)


@register_backbone("lru")
@with_options_of(_build_real)
def build_lru(in_features: int, *, is_complex: bool = False, **options: Any) -> LayeredCore:
    """Build the core of `backbone=lru`: a `LayeredCore` of `LRULayer`.

    Args:
        in_features: F, features of the input.
        is_complex: complex states, which rotate (`ComplexLRULayer`).
        options: those of every layered core: `hidden_size`, `num_layers`, `max_horizon`, `readout`, ...
    """
    return (_build_complex if is_complex else _build_real)(in_features, **options)
