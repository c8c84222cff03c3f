"""`rnn`: the simple recurrent network of Elman, with a sequence gradient written by hand."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from cyborg_torchrl.cores.kernels.linear import linear
from cyborg_torchrl.cores.layered import LayeredCore, LayerState, RecurrentLayer, bare_core
from cyborg_torchrl.cores.resets import reset_steps
from cyborg_torchrl.registry import check_known, register_backbone, with_options_of

NONLINEARITIES = {"tanh": torch.tanh, "relu": torch.relu}


class _Recurrence(torch.autograd.Function):
    """h_t = f(x_t + W h_{t-1}). A step needs one matrix product, forward and backward."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, h_0: Tensor, is_init: Tensor, initial: Tensor, nonlinearity: str
    ) -> Tensor:
        states, previous = torch.empty_like(x), torch.empty_like(x)
        resets, apply, weight_t = reset_steps(is_init), NONLINEARITIES[nonlinearity], weight.t()
        h_t = h_0
        for t, (x_t, before_t, out_t) in enumerate(zip(*(v.unbind(0) for v in (x, previous, states)), strict=True)):
            if resets[t]:
                h_t = torch.where(is_init[t].unsqueeze(-1), initial, h_t)
            before_t.copy_(h_t)
            h_t = out_t.copy_(apply(torch.addmm(x_t, h_t, weight_t)))
        ctx.save_for_backward(weight, previous, states, is_init)
        ctx.nonlinearity = nonlinearity
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_states: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad_states.device.type, enabled=False):  # it may be called under autocast
            return _backward(ctx, grad_states)


def _backward(ctx: FunctionCtx, grad_states: Tensor) -> tuple[Tensor | None, ...]:
    weight, previous, states, is_init = ctx.saved_tensors
    slopes = 1.0 - states.square() if ctx.nonlinearity == "tanh" else (states > 0.0).to(states.dtype)
    resets = reset_steps(is_init)
    grads = torch.empty_like(states)
    grad_initial, carry = torch.zeros_like(states[0]), torch.zeros_like(states[0])
    rows = zip(*(v.unbind(0) for v in (grad_states, slopes, grads)), strict=True)
    for t, (g_t, slope_t, grad_t) in reversed(list(enumerate(rows))):
        torch.mul(g_t + carry, slope_t, out=grad_t)
        carry = grad_t @ weight
        if resets[t]:
            mask = is_init[t].unsqueeze(-1)
            grad_initial += carry.masked_fill(~mask, 0.0)
            carry = carry.masked_fill(mask, 0.0)
    return grads, grads.flatten(0, 1).t() @ previous.flatten(0, 1), carry, None, grad_initial, None


class RNNLayer(RecurrentLayer):
    """Simple recurrent network.

        h_t = f(W_x x_t + b + W_h h_{t-1}),    f = tanh or relu

    W_h starts orthogonal with tanh, and as the identity with relu.

    Args:
        in_features: F, features of the input.
        hidden_size: H, units.
        nonlinearity: "tanh" or "relu".

    Source: Elman (1990), "Finding structure in time". The identity is from Le et al. (2015), "A simple way to
    initialize recurrent networks of rectified linear units".
    """

    def __init__(self, in_features: int, hidden_size: int, nonlinearity: str = "tanh") -> None:
        super().__init__()
        check_known("nonlinearity", nonlinearity, NONLINEARITIES)
        self.state_names = ("hidden",)
        self.features, self.nonlinearity = hidden_size, nonlinearity
        self.input = nn.Linear(in_features, hidden_size)
        recurrent = torch.eye(hidden_size) if nonlinearity == "relu" else torch.empty(hidden_size, hidden_size)
        self.recurrent = nn.Parameter(recurrent if nonlinearity == "relu" else nn.init.orthogonal_(recurrent))
        nn.init.zeros_(self.input.bias)

    def step(self, x: Float[Tensor, "B F"], state: LayerState) -> tuple[Tensor, LayerState]:
        """Take one step."""
        driven = F.linear(x, self.input.weight, self.input.bias)
        hidden = NONLINEARITIES[self.nonlinearity](torch.addmm(driven, state[0], self.recurrent.t()))
        return hidden, (hidden,)

    def forward(
        self,
        x: Float[Tensor, "T B F"],
        state: LayerState,
        is_init: Bool[Tensor, "T B"],
        initial: LayerState,
    ) -> tuple[Tensor, LayerState]:
        """Run a sequence."""
        driven = linear(x, self.input.weight, self.input.bias)
        hidden = _Recurrence.apply(driven, self.recurrent, state[0], is_init, initial[0], self.nonlinearity)
        return hidden, (hidden[-1],)


@register_backbone("rnn")
@with_options_of(LayeredCore, without=["readout", "readout_groups"])
def build_rnn(
    in_features: int, *, hidden_size: int = 64, num_layers: int = 1, nonlinearity: str = "tanh", **options: bool
) -> LayeredCore:
    """Build the core of `backbone=rnn`: a `LayeredCore` of `RNNLayer`, whose states are read out as they are.

    Args:
        in_features: F, features of the input.
        hidden_size: H, units of each layer.
        num_layers: number of layers.
        nonlinearity: "tanh" or "relu".
        options: other options of `LayeredCore`.

    Raises:
        ValueError: if a size is below 1, or the nonlinearity is unknown.
    """
    return bare_core(
        lambda width: RNNLayer(width, hidden_size, nonlinearity), in_features, hidden_size, num_layers, **options
    )
