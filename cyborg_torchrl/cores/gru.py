"""`gru`: the gated recurrent unit, with a sequence gradient written by hand."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from cyborg_torchrl.cores.kernels.choice import kernel_for
from cyborg_torchrl.cores.kernels.gru import gru_cpp
from cyborg_torchrl.cores.kernels.linear import linear
from cyborg_torchrl.cores.kernels.triton.gru import gru_triton
from cyborg_torchrl.cores.layered import LayerState, RecurrentLayer, layered_core_builder
from cyborg_torchrl.cores.resets import reset_steps
from cyborg_torchrl.cores.timescale import log_spaced_timescales
from cyborg_torchrl.registry import register_backbone


class _GRURecurrence(torch.autograd.Function):
    """The recurrence of h_t, given the input's part of the gates (r, u, n). The update is u = 1 - z.

    A step needs one matrix product and seven small operations, forward and backward.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        gates_x: Tensor,
        weight_hh: Tensor,
        bias_hh: Tensor,
        h_0: Tensor,
        is_init: Tensor,
        initial: Tensor,
    ) -> Tensor:
        steps, batch, _ = gates_x.shape
        size = h_0.shape[-1]
        states = gates_x.new_empty(steps, batch, size)
        previous = gates_x.new_empty(steps, batch, size)
        reset_update = gates_x.new_empty(steps, batch, 2 * size)
        candidate = gates_x.new_empty(steps, batch, size)
        candidate_h = gates_x.new_empty(steps, batch, size)
        resets = reset_steps(is_init)
        weight_t = weight_hh.t()
        gates_h = gates_x.new_empty(batch, 3 * size)
        h_t = h_0
        rows = zip(
            *(v.unbind(0) for v in (gates_x, previous, reset_update, candidate, candidate_h, states)), strict=True
        )
        for t, (x_t, previous_t, ru_t, n_t, nh_t, out_t) in enumerate(rows):
            if resets[t]:
                h_t = torch.where(is_init[t].unsqueeze(-1), initial, h_t)
            previous_t.copy_(h_t)
            torch.addmm(bias_hh, h_t, weight_t, out=gates_h)
            torch.add(x_t[:, : 2 * size], gates_h[:, : 2 * size], out=ru_t).sigmoid_()
            nh_t.copy_(gates_h[:, 2 * size :])
            torch.addcmul(x_t[:, 2 * size :], ru_t[:, :size], nh_t, out=n_t).tanh_()
            h_t = torch.lerp(h_t, n_t, ru_t[:, size:], out=out_t)
        ctx.save_for_backward(weight_hh, previous, reset_update, candidate, candidate_h, is_init)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_states: Tensor) -> tuple[Tensor | None, ...]:
        weight_hh, previous, reset_update, n, candidate_h, is_init = ctx.saved_tensors
        steps, batch, size = n.shape
        r, u = reset_update.split(size, -1)
        # Slopes of the pre-activations with respect to h_t, for all steps at once. The loop only multiplies.
        slope_n = u * (1 - n * n)
        slopes = torch.empty_like(grad_states, memory_format=torch.contiguous_format).new_empty(steps, batch, 3, size)
        torch.mul(slope_n * candidate_h, r * (1 - r), out=slopes[:, :, 0])
        torch.mul(n - previous, u * (1 - u), out=slopes[:, :, 1])
        torch.mul(slope_n, r, out=slopes[:, :, 2])
        keep = 1 - u
        grads = torch.empty_like(grad_states, memory_format=torch.contiguous_format)
        grad_gates_h = torch.empty_like(slopes)
        resets = reset_steps(is_init)
        grad_initial = torch.zeros_like(n[0])
        carry = torch.zeros_like(n[0])
        rows = zip(*(v.unbind(0) for v in (grad_states, grads, slopes, grad_gates_h, keep)), strict=True)
        for t, (g_t, grad_t, slopes_t, gates_t, keep_t) in reversed(list(enumerate(rows))):
            torch.add(g_t, carry, out=grad_t)
            torch.mul(grad_t.unsqueeze(1), slopes_t, out=gates_t)
            carry = torch.addmm(grad_t * keep_t, gates_t.view(batch, -1), weight_hh)
            if resets[t]:
                mask = is_init[t].unsqueeze(-1)
                grad_initial += carry.masked_fill(~mask, 0.0)
                carry = carry.masked_fill(mask, 0.0)
        flat = grad_gates_h.view(steps * batch, 3 * size)
        grad_weight = flat.t() @ previous.view(steps * batch, size)
        grad_bias = flat.sum(0)
        grad_gates_h[:, :, 2] = grads * slope_n  # now it holds the gradient of the input's part
        return flat.view(steps, batch, -1), grad_weight, grad_bias, carry, None, grad_initial


def gru_recurrence(
    gates_x: Float[Tensor, "T B G"],
    weight_hh: Float[Tensor, "G D"],
    bias_hh: Float[Tensor, " G"],
    h_0: Float[Tensor, "B D"],
    is_init: Bool[Tensor, "T B"],
    initial: Float[Tensor, "B D"],
) -> Float[Tensor, "T B D"]:
    """Return the states of a `GRULayer`, given its gates. Arguments and results are those of `gru_cpp`."""
    arguments = (gates_x, weight_hh, bias_hh, h_0, is_init, initial)
    return _GRURecurrence.apply(*arguments)


RECURRENCES = {"cpp": gru_cpp, "triton": gru_triton, "torch": gru_recurrence}


class GRULayer(RecurrentLayer):
    """Gated recurrent unit, with torch's equations, gate order (r, z, n) and parameter shapes.

        r_t, z_t = sigmoid(W_x x_t + b_x + W_h h_{t-1} + b_h)
        n_t      = tanh(W_xn x_t + b_xn + r_t * (W_hn h_{t-1} + b_hn))
        h_t      = h_{t-1} + (1 - z_t) (n_t - h_{t-1})

    We compute 1 - z_t as sigmoid(-...). Slow units change little per step. The form (1 - z) n + z h, or 1 - z by
    subtraction, would round this change away. torch.nn.GRU has relative errors near 1e-3 in units with a time
    constant of 10,000 steps.

    The bias of the update gate starts at the logarithm of time constants, log-uniform from 1 step to ten horizons.

    b_xn and b_hn stay at zero unless `input_bias` is set. With them each blank step writes the same value into the
    slow units. After a thousand blank steps the cue is lost.

    Source: Cho et al. (2014). The bias is the "chrono" initialisation of Tallec and Ollivier (2018), but evenly
    spaced and ordered, not random.
    """

    def __init__(self, in_features: int, hidden_size: int, max_horizon: int, input_bias: bool = False) -> None:
        super().__init__()
        self.state_names = ("hidden",)
        self.features = hidden_size
        bound = hidden_size**-0.5  # as in torch.nn.GRU
        self.weight_ih = nn.Parameter(torch.empty(3 * hidden_size, in_features).uniform_(-bound, bound))
        self.weight_hh = nn.Parameter(nn.init.orthogonal_(torch.empty(3 * hidden_size, hidden_size)))
        self.bias_ih = nn.Parameter(torch.zeros(3 * hidden_size))
        self.bias_hh = nn.Parameter(torch.zeros(3 * hidden_size))
        bias_mask = torch.ones(3 * hidden_size)
        bias_mask[2 * hidden_size :] = float(input_bias)
        self.bias_mask: Tensor
        self.register_buffer("bias_mask", bias_mask, persistent=False)
        update = slice(hidden_size, 2 * hidden_size)
        sign = torch.ones(3 * hidden_size)
        sign[update] = -1.0
        self.sign: Tensor
        self.register_buffer("sign", sign, persistent=False)
        with torch.no_grad():
            self.weight_hh[update] *= 0.1
            self.bias_hh[update] = log_spaced_timescales(hidden_size, max_horizon).log()

    def step(self, x: Float[Tensor, "B F"], state: LayerState) -> tuple[Tensor, LayerState]:
        """Take one step."""
        size, kernel = self.features, kernel_for(x)
        if kernel != "torch":  # the code of `forward`, so both round alike
            is_init = torch.zeros(1, x.shape[0], dtype=torch.bool, device=x.device)
            weight_ih, bias_ih, weight, bias = self._signed()
            gates_x = linear(x, weight_ih, bias_ih).unsqueeze(0)
            hidden = RECURRENCES[kernel](gates_x, weight, bias, state[0], is_init, state[0]).squeeze(0)
            return hidden, (hidden,)
        gates_x = F.linear(x, self.weight_ih, self.bias_ih * self.bias_mask)
        gates_h = F.linear(state[0], self.weight_hh, self.bias_hh * self.bias_mask)
        reset = torch.sigmoid(gates_x[:, :size] + gates_h[:, :size])
        update = torch.sigmoid(-(gates_x[:, size : 2 * size] + gates_h[:, size : 2 * size]))
        candidate = torch.tanh(torch.addcmul(gates_x[:, 2 * size :], reset, gates_h[:, 2 * size :]))
        hidden = torch.lerp(state[0], candidate, update)
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
        weight_ih, bias_ih, weight, bias = self._signed()
        gates_x = linear(x, weight_ih, bias_ih)
        hidden = recur(gates_x, weight, bias, state[0], is_init, initial[0])
        return hidden, (hidden[-1],)

    def _signed(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return weights and biases of input and state, negated for the update gate: it becomes u = 1 - z."""
        rows, biases = self.sign.unsqueeze(-1), self.sign * self.bias_mask
        return self.weight_ih * rows, self.bias_ih * biases, self.weight_hh * rows, self.bias_hh * biases


build_gru = register_backbone("gru")(layered_core_builder(GRULayer))
"""Build the core of `backbone=gru`: a `LayeredCore` of `GRULayer`."""
