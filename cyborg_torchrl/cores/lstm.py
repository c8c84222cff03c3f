"""`lstm`: long short-term memory, with a sequence gradient written by hand."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from cyborg_torchrl.cores.kernels.choice import kernel_for
from cyborg_torchrl.cores.kernels.linear import linear
from cyborg_torchrl.cores.kernels.lstm import lstm_cpp
from cyborg_torchrl.cores.kernels.triton.lstm import lstm_triton
from cyborg_torchrl.cores.layered import LayerState, RecurrentLayer, layered_core_builder
from cyborg_torchrl.cores.resets import reset_steps
from cyborg_torchrl.cores.timescale import log_spaced_timescales
from cyborg_torchrl.registry import register_backbone


class _LSTMRecurrence(torch.autograd.Function):
    """The recurrence of h_t and c_t, given the input's part of the gates."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        gates_x: Tensor,
        weight_hh: Tensor,
        h_0: Tensor,
        c_0: Tensor,
        is_init: Tensor,
        initial_h: Tensor,
        initial_c: Tensor,
    ) -> tuple[Tensor, Tensor]:
        steps, batch, _ = gates_x.shape
        size = h_0.shape[-1]
        gates = torch.empty_like(gates_x)
        hidden, cell, cell_tanh, previous_h, previous_c = gates_x.new_empty(5, steps, batch, size).unbind(0)
        resets = reset_steps(is_init)
        weight_t = weight_hh.t()
        h_t, c_t = h_0, c_0
        rows = zip(
            *(v.unbind(0) for v in (gates_x, gates, hidden, cell, cell_tanh, previous_h, previous_c)), strict=True
        )
        for t, (x_t, gates_t, h_out, c_out, tanh_t, h_tm1, c_tm1) in enumerate(rows):
            if resets[t]:
                mask = is_init[t].unsqueeze(-1)
                h_t, c_t = torch.where(mask, initial_h, h_t), torch.where(mask, initial_c, c_t)
            h_tm1.copy_(h_t)
            c_tm1.copy_(c_t)
            torch.addmm(x_t, h_t, weight_t, out=gates_t)
            gates_t[:, : 2 * size].sigmoid_()
            gates_t[:, 2 * size : 3 * size].tanh_()
            gates_t[:, 3 * size :].sigmoid_()
            i_t, f_t, g_t, o_t = gates_t.chunk(4, -1)
            c_t = torch.addcmul(f_t * c_t, i_t, g_t, out=c_out)
            h_t = torch.mul(o_t, torch.tanh(c_t, out=tanh_t), out=h_out)
        ctx.save_for_backward(weight_hh, gates, cell_tanh, previous_h, previous_c, is_init)
        return hidden, cell

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_hidden: Tensor, grad_cell: Tensor) -> tuple[Tensor | None, ...]:
        weight_hh, gates, cell_tanh, previous_h, previous_c, is_init = ctx.saved_tensors
        steps, batch, size = cell_tanh.shape
        i, f, g, o = gates.chunk(4, -1)
        # slopes of the pre-activations with respect to c_t (i, f, g) and h_t (o), for all steps at once
        slopes = gates.new_empty(steps, batch, 3, size)
        torch.mul(g, i * (1 - i), out=slopes[:, :, 0])
        torch.mul(previous_c, f * (1 - f), out=slopes[:, :, 1])
        torch.mul(i, 1 - g * g, out=slopes[:, :, 2])
        slope_o = cell_tanh * (o * (1 - o))
        slope_c = o * (1 - cell_tanh * cell_tanh)
        keep = f.contiguous()
        grad_gates = gates.new_empty(steps, batch, 4, size)
        resets = reset_steps(is_init)
        carry_h, carry_c, grad_initial_h, grad_initial_c = gates.new_zeros(4, batch, size).unbind(0)
        rows = zip(
            *(v.unbind(0) for v in (grad_hidden, grad_cell, slopes, slope_o, slope_c, keep, grad_gates)),
            strict=True,
        )
        for t, (gh_t, gc_t, slopes_t, slope_o_t, slope_c_t, keep_t, out_t) in reversed(list(enumerate(rows))):
            grad_h = gh_t + carry_h
            grad_c = torch.addcmul(gc_t + carry_c, grad_h, slope_c_t)
            torch.mul(grad_c.unsqueeze(1), slopes_t, out=out_t[:, :3])
            torch.mul(grad_h, slope_o_t, out=out_t[:, 3])
            carry_h = out_t.view(batch, -1) @ weight_hh
            carry_c = grad_c * keep_t
            if resets[t]:
                mask = is_init[t].unsqueeze(-1)
                grad_initial_h = grad_initial_h + carry_h.masked_fill(~mask, 0.0)
                grad_initial_c = grad_initial_c + carry_c.masked_fill(~mask, 0.0)
                carry_h, carry_c = carry_h.masked_fill(mask, 0.0), carry_c.masked_fill(mask, 0.0)
        grad_weight = grad_gates.view(steps * batch, -1).t() @ previous_h.reshape(steps * batch, size)
        grad_gates_x = grad_gates.view(steps, batch, -1)
        return grad_gates_x, grad_weight, carry_h, carry_c, None, grad_initial_h, grad_initial_c


def lstm_recurrence(
    gates_x: Float[Tensor, "T B G"],
    weight_hh: Float[Tensor, "G D"],
    h_0: Float[Tensor, "B D"],
    c_0: Float[Tensor, "B D"],
    is_init: Bool[Tensor, "T B"],
    initial_h: Float[Tensor, "B D"],
    initial_c: Float[Tensor, "B D"],
) -> tuple[Float[Tensor, "T B D"], Float[Tensor, "T B D"]]:
    """Return the states of an `LSTMLayer`, given its gates. Arguments and results are those of `lstm_cpp`."""
    arguments = (gates_x, weight_hh, h_0, c_0, is_init, initial_h, initial_c)
    return _LSTMRecurrence.apply(*arguments)


RECURRENCES = {"cpp": lstm_cpp, "triton": lstm_triton, "torch": lstm_recurrence}


class LSTMLayer(RecurrentLayer):
    """Long short-term memory, with torch's equations, gate order (i, f, g, o) and parameter shapes.

        i_t, f_t, o_t = sigmoid(W_x x_t + b_x + W_h h_{t-1} + b_h);   g_t = tanh(...)
        c_t = f_t c_{t-1} + i_t g_t;   h_t = o_t tanh(c_t)

    The forget bias starts at b and the input bias at -b. Here b is the logarithm of time constants, log-uniform from
    1 step to ten horizons. With the forget bias alone, agents do not learn at horizon 1000.

    The biases of g_t stay at zero unless `input_bias` is set. With them each blank step writes the same value into
    the slow units. After a thousand blank steps the cue is lost.

    Source: Hochreiter and Schmidhuber (1997), Gers et al. (2000). The biases follow Tallec and Ollivier (2018), but
    are evenly spaced and ordered, not random.
    """

    def __init__(self, in_features: int, hidden_size: int, max_horizon: int, input_bias: bool = False) -> None:
        super().__init__()
        self.state_names = ("hidden", "cell")
        self.features = hidden_size
        bound = hidden_size**-0.5  # as in torch.nn.LSTM
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden_size, in_features).uniform_(-bound, bound))
        self.weight_hh = nn.Parameter(nn.init.orthogonal_(torch.empty(4 * hidden_size, hidden_size)) * 0.1)
        self.bias_ih = nn.Parameter(torch.zeros(4 * hidden_size))
        self.bias_hh = nn.Parameter(torch.zeros(4 * hidden_size))
        bias_mask = torch.ones(4 * hidden_size)
        bias_mask[2 * hidden_size : 3 * hidden_size] = float(input_bias)
        self.bias_mask: Tensor
        self.register_buffer("bias_mask", bias_mask, persistent=False)
        log_timescales = log_spaced_timescales(hidden_size, max_horizon).log()
        with torch.no_grad():
            self.bias_hh[:hidden_size] = -log_timescales
            self.bias_hh[hidden_size : 2 * hidden_size] = log_timescales

    def step(self, x: Float[Tensor, "B F"], state: LayerState) -> tuple[Tensor, LayerState]:
        """Take one step."""
        hidden, cell = state
        kernel = kernel_for(x)
        if kernel != "torch":  # the code of `forward`, so both round alike
            is_init = torch.zeros(1, x.shape[0], dtype=torch.bool, device=x.device)
            gates_x = self._gates_x(x).unsqueeze(0)
            rows = RECURRENCES[kernel](gates_x, self.weight_hh, hidden, cell, is_init, hidden, cell)
            hidden, cell = rows[0].squeeze(0), rows[1].squeeze(0)
            return hidden, (hidden, cell)
        # Use the operations of `forward` in the same order, because the read-out's norm amplifies rounding.
        gates = torch.addmm(self._gates_x(x), hidden, self.weight_hh.t())
        i, f, g, o = gates.chunk(4, -1)
        cell = torch.addcmul(torch.sigmoid(f) * cell, torch.sigmoid(i), torch.tanh(g))
        hidden = torch.sigmoid(o) * torch.tanh(cell)
        return hidden, (hidden, cell)

    def forward(
        self,
        x: Float[Tensor, "T B F"],
        state: LayerState,
        is_init: Bool[Tensor, "T B"],
        initial: LayerState,
    ) -> tuple[Tensor, LayerState]:
        """Run a sequence."""
        recur = RECURRENCES[kernel_for(x)]
        (h_0, c_0), (initial_h, initial_c) = state, initial
        hidden, cell = recur(self._gates_x(x), self.weight_hh, h_0, c_0, is_init, initial_h, initial_c)
        return hidden, (hidden[-1], cell[-1])

    def bias(self) -> Tensor:
        """Return the bias of the gates, [4 D]."""
        return (self.bias_ih + self.bias_hh) * self.bias_mask

    def _gates_x(self, x: Tensor) -> Tensor:
        return linear(x, self.weight_ih, self.bias())


build_lstm = register_backbone("lstm")(layered_core_builder(LSTMLayer))
"""Build the core of `backbone=lstm`: a `LayeredCore` of `LSTMLayer`."""
