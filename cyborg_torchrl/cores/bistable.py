"""`bistable`: the bistable recurrent cell, whose units keep one of two values for any time."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from cyborg_torchrl.cores.kernels.linear import linear
from cyborg_torchrl.cores.layered import LayeredCore, LayerState, RecurrentLayer, bare_core
from cyborg_torchrl.cores.resets import reset_steps
from cyborg_torchrl.registry import register_backbone, with_options_of


def _cell(feedback: Tensor, keep: Tensor, drive: Tensor, weights: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    """Return a_t, c_t, the candidate and h_t, given the input's part of each, and h_{t-1}."""
    a = torch.tanh(torch.addcmul(feedback, weights[0], h)) + 1.0
    c = torch.sigmoid(torch.addcmul(keep, weights[1], h))
    candidate = torch.tanh(torch.addcmul(drive, a, h))
    return a, c, candidate, torch.lerp(candidate, h, c)


class _Recurrence(torch.autograd.Function):
    """The cell over a sequence. It has no matrix product, so a step is a few operations on [B, H]."""

    @staticmethod
    def forward(ctx: FunctionCtx, inputs: Tensor, weights: Tensor, h_0: Tensor, is_init: Tensor, initial: Tensor):
        parts = inputs.chunk(3, -1)
        kept = [torch.empty_like(parts[0]) for _ in range(5)]  # a, c, candidate, h_t, h_{t-1}
        resets, h_t = reset_steps(is_init), h_0
        for t, (feedback, keep, drive) in enumerate(zip(*(part.unbind(0) for part in parts), strict=True)):
            if resets[t]:
                h_t = torch.where(is_init[t].unsqueeze(-1), initial, h_t)
            values = *_cell(feedback, keep, drive, weights, h_t), h_t
            for out, value in zip(kept, values, strict=True):
                out[t] = value
            h_t = values[3]
        ctx.save_for_backward(weights, is_init, *kept)
        return kept[3]

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_states: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad_states.device.type, enabled=False):  # it may be called under autocast
            return _backward(ctx, grad_states)


def _backward(ctx: FunctionCtx, grad_states: Tensor) -> tuple[Tensor | None, ...]:
    weights, is_init, a, c, candidate, states, previous = ctx.saved_tensors
    # What does not depend on the gradient is computed for all steps at once.
    to_drive = (1.0 - c) * (1.0 - candidate.square())
    to_feedback = to_drive * previous * a * (2.0 - a)  # tanh' = 1 - (a - 1)^2
    to_keep = (previous - candidate) * c * (1.0 - c)
    slopes = c + to_drive * a + to_feedback * weights[0] + to_keep * weights[1]  # of h_t in h_{t-1}
    resets = reset_steps(is_init)
    grads = torch.empty_like(states)
    grad_initial, carry = torch.zeros_like(states[0]), torch.zeros_like(states[0])
    for t in range(states.shape[0] - 1, -1, -1):
        torch.add(grad_states[t], carry, out=grads[t])
        carry = grads[t] * slopes[t]
        if resets[t]:
            mask = is_init[t].unsqueeze(-1)
            grad_initial += carry.masked_fill(~mask, 0.0)
            carry = carry.masked_fill(mask, 0.0)
    grad_feedback, grad_keep = grads * to_feedback, grads * to_keep
    grad_weights = torch.stack([(part * previous).sum((0, 1)) for part in (grad_feedback, grad_keep)])
    return torch.cat([grad_feedback, grad_keep, grads * to_drive], -1), grad_weights, carry, None, grad_initial


class BistableLayer(RecurrentLayer):
    """Bistable recurrent cell. Products are element by element, so a unit hears no other unit.

        a_t = 1 + tanh(W_a x_t + w_a h_{t-1} + b_a)
        c_t = sigmoid(W_c x_t + w_c h_{t-1} + b_c)
        h_t = c_t h_{t-1} + (1 - c_t) tanh(W_u x_t + a_t h_{t-1})

    A unit with a_t <= 1 forgets. With a_t > 1 it has two stable values, the solutions of h = tanh(a_t h), and returns
    to one of them after every disturbance that is small enough: it remembers a bit for any time. The input opens and
    closes the memory by a_t.

    Units start bistable, with b_a = 1. With b_a = 0.5, one of three seeds mixed bits that stay with values that fade,
    and failed in longer episodes. The candidate has no bias, so a blank step does not move a unit at zero.

    Args:
        in_features: F, features of the input.
        hidden_size: H, units.

    Source: Vecoven et al. (2021), "A bio-inspired bistable recurrent cell allows for long-lasting memory" (BRC). We
    differ in the biases b_a and b_c.
    """

    def __init__(self, in_features: int, hidden_size: int) -> None:
        super().__init__()
        self.state_names = ("hidden",)
        self.features = hidden_size
        self.maps = nn.Linear(in_features, 3 * hidden_size, bias=False)
        self.biases = nn.Parameter(torch.cat([torch.ones(hidden_size), torch.zeros(hidden_size)]))
        self.weights = nn.Parameter(torch.zeros(2, hidden_size))

    def step(self, x: Float[Tensor, "B F"], state: LayerState) -> tuple[Tensor, LayerState]:
        """Take one step."""
        feedback, keep, drive = self._inputs(x).chunk(3, -1)
        hidden = _cell(feedback, keep, drive, self.weights, state[0])[-1]
        return hidden, (hidden,)

    def forward(
        self,
        x: Float[Tensor, "T B F"],
        state: LayerState,
        is_init: Bool[Tensor, "T B"],
        initial: LayerState,
    ) -> tuple[Tensor, LayerState]:
        """Run a sequence."""
        hidden = _Recurrence.apply(self._inputs(x), self.weights, state[0], is_init, initial[0])
        return hidden, (hidden[-1],)

    def _inputs(self, x: Tensor) -> Tensor:
        """Return W_a x + b_a, W_c x + b_c and W_u x, joined, [..., 3 H]."""
        bias = torch.cat([self.biases, torch.zeros_like(self.weights[0])])
        return linear(x, self.maps.weight, bias)


@register_backbone("bistable")
@with_options_of(LayeredCore, without=["readout", "readout_groups"])
def build_bistable(in_features: int, *, hidden_size: int = 64, num_layers: int = 1, **options: bool) -> LayeredCore:
    """Build the core of `backbone=bistable`: a `LayeredCore` of `BistableLayer`, whose states are read out as they are.

    Args:
        in_features: F, features of the input.
        hidden_size: H, units of each layer.
        num_layers: number of layers.
        options: other options of `LayeredCore`.

    Raises:
        ValueError: if a size is below 1.
    """
    return bare_core(lambda width: BistableLayer(width, hidden_size), in_features, hidden_size, num_layers, **options)
